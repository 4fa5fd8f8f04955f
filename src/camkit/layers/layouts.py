"""Where an activation keeps its channels and its positions: NCHW, NHWC or tokens.

Everything in camkit works on ``(N, C, *spatial)``; a :class:`Layout` turns what a layer gives into that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camkit._tools.checks import error_message, lengths, one_of, shape_of


@dataclass(frozen=True)
class Layout:
    """How to read one layer's output as ``(N, C, *spatial)``.

    ``layout=`` of every method takes one where a model leaves it open; ``"channels_first"`` and
    ``"channels_last"`` are short for the two without a grid.

    Args:
        channel_dim: the dimension of the channels: 1 (NCHW) or -1 (NHWC, tokens).
        grid: for tokens ``(N, L, C)``, the grid that they form, row by row.
        prefix: how many tokens come before the grid (class and register tokens).
        suffix: how many come after it.

    Raises:
        ValueError: for a dimension, a grid or a number that cannot be.

    Example:
        >>> import camkit
        >>> print(camkit.Layout(-1, grid=(14, 14), prefix=1))
        tokens 14 x 14, 1 before
    """

    channel_dim: int = 1
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        if self.channel_dim not in (1, -1):
            raise ValueError(error_message("channel_dim", "1 or -1", self.channel_dim))
        if self.grid is not None:
            lengths("grid", "positive lengths", self.grid)
            if self.channel_dim != -1:
                raise ValueError(error_message("channel_dim", "-1 with a grid", self.channel_dim))
        beside = (self.prefix, self.suffix)
        if min(beside) < 0 or (any(beside) and self.grid is None):
            raise ValueError(error_message("prefix, suffix", "numbers of tokens beside a grid", beside))

    def __str__(self) -> str:
        """In words: channels first, channels last, or the grid of tokens and what stands beside it."""
        if self.grid is None:
            return "channels first" if self.channel_dim == 1 else "channels last"
        beside = [f"{n} {where}" for n, where in ((self.prefix, "before"), (self.suffix, "after")) if n]
        return f"tokens {shape_of(self.grid)}" + (f", {', '.join(beside)}" if beside else "")

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial size of an output of ``shape``."""
        if self.grid is not None:
            return self.grid
        channels = self.channel_dim % len(shape)
        return tuple(n for d, n in enumerate(shape) if d not in (0, channels))

    def channels_first(self, activation: torch.Tensor) -> torch.Tensor:
        """``activation`` as ``(N, C, *spatial)``: a view, differentiable.

        Raises:
            ValueError: if the tokens are not as many as the grid holds.
        """
        if self.grid is None:
            return activation.movedim(self.channel_dim, 1)
        patches = math.prod(self.grid)
        if activation.shape[1] != self.prefix + patches + self.suffix:
            expected = f"{self.prefix} + {shape_of(self.grid)} + {self.suffix}"
            hint = "the layout was found at another input size"
            raise ValueError(error_message("tokens", expected, activation.shape[1], hint))
        grid = activation[:, self.prefix : self.prefix + patches]
        # Not len(grid), a number: torch.export would take it for that of every batch.
        return grid.reshape(grid.shape[0], *self.grid, -1).movedim(-1, 1)

    def restore(self, activation: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """What :meth:`channels_first` reads as ``activation``, differentiable.

        Args:
            activation: shape ``(N, C, *spatial)``.
            original: an output of the layer, from which the tokens beside the grid are taken; for as many
                images, or for one batch of them that comes several times.
        """
        if self.grid is None:
            return activation.movedim(1, self.channel_dim)
        tokens = activation.flatten(2).transpose(1, 2)
        times = len(tokens) // len(original)
        before = original[:, : self.prefix].repeat(times, 1, 1)
        after = original[:, self.prefix + tokens.shape[1] :].repeat(times, 1, 1)
        return torch.cat([before, tokens, after], 1)


#: Layouts by name, as ``layout=`` takes them.
NAMED = {"channels_first": Layout(1), "channels_last": Layout(-1)}


def as_layout(layout: object) -> Layout:
    """A layout that is given by name or as such.

    Raises:
        ValueError: for another name.
        TypeError: for anything else.
    """
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        expected = f"{', '.join(map(repr, NAMED))} or a camkit.Layout"
        raise TypeError(error_message("layout", expected, type(layout).__name__))
    one_of("layout", layout, NAMED)
    return NAMED[layout]


def infer_layout(
    shape: Sequence[int],
    input_shape: Sequence[int],
    larger: Sequence[int] | None = None,
) -> Layout | None:
    """The layout of an output that has as many dimensions as its input; ``None`` if it is not spatial.

    Args:
        shape: the output's shape.
        input_shape: the shape of the input that gave it.
        larger: the output's shape for a larger input. The dimensions that changed are the spatial ones;
            without it, or where none changed, those with the proportions of the input are.

    Raises:
        ValueError: if the shape can be read in two ways.
    """
    if len(shape) != len(input_shape):
        return None
    if larger is not None:
        changed = [d for d, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b]
        if changed == list(range(2, len(shape))):
            return Layout(1)
        if changed == list(range(1, len(shape) - 1)):
            return Layout(-1)
        if changed:
            return None
    size = tuple(input_shape[2:])
    plausible = [
        channel_dim
        for channel_dim, spatial in ((1, tuple(shape[2:])), (-1, tuple(shape[1:-1])))
        if math.prod(spatial) > 1 and _proportional(spatial, size)
    ]
    if len(plausible) == 2:
        raise ValueError(
            error_message(
                "layer",
                "an output whose channels can be told from its positions",
                f"shape {shape_of(shape)}, which reads as NCHW and as NHWC",
                "layout= says which",
            )
        )
    return Layout(plausible[0]) if plausible else None


def _proportional(spatial: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether one stride explains every side, up to the rounding of a side by one position.

    Time, the first of three sides, has a stride of its own.
    """
    if len(size) == 3:
        return spatial[0] <= size[0] and _proportional(spatial[1:], size[1:])
    if len(set(size)) == 1:
        return len(set(spatial)) == 1
    lower = max(s / (n + 1) for n, s in zip(spatial, size, strict=True))
    upper = min(s / max(n - 1, 0.5) for n, s in zip(spatial, size, strict=True))
    return lower <= upper and max(spatial) <= max(size)
