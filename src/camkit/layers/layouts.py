"""The order of the dimensions of an activation: channels first (NCHW), channels last (NHWC) or tokens.

All of camkit computes with activations ``(N, C, *spatial)``; a :class:`Layout` converts the output of a layer
to that shape and back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camkit._tools.checks import error_message, lengths, one_of, shape_of


@dataclass(frozen=True)
class Layout:
    """Describes how to read the output of a layer as an activation ``(N, C, *spatial)``.

    The dry run usually finds the layout by itself. Where it cannot, pass one to a method as ``layout=``, or
    pass ``"channels_first"`` or ``"channels_last"`` for one of the two layouts without tokens.

    Args:
        channel_dim: dimension of the channels: 1 (NCHW), or -1 (NHWC and tokens).
        grid: for tokens ``(N, L, C)``, the spatial size of the grid that they form, row by row; ``None`` if
            the output is not made of tokens.
        prefix: number of tokens before the grid (class and register tokens).
        suffix: number of tokens after the grid.

    Raises:
        ValueError: if ``channel_dim`` is neither 1 nor -1, if a length of the grid is not positive, if a grid
            comes with ``channel_dim=1``, or if ``prefix`` or ``suffix`` is negative or has no grid beside it.
        TypeError: if ``grid`` is not a tuple or list of ints.

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
        outside = (self.prefix, self.suffix)
        if min(outside) < 0 or (any(outside) and self.grid is None):
            raise ValueError(error_message("prefix, suffix", "numbers of tokens beside a grid", outside))

    def __str__(self) -> str:
        """Returns ``channels first``, ``channels last``, or the grid and the number of tokens outside it."""
        if self.grid is None:
            return "channels first" if self.channel_dim == 1 else "channels last"
        outside = [f"{n} {where}" for n, where in ((self.prefix, "before"), (self.suffix, "after")) if n]
        return ", ".join([f"tokens {shape_of(self.grid)}", *outside])

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the spatial size of an output of the given shape, which includes the batch."""
        if self.grid is not None:
            return self.grid
        channels = self.channel_dim % len(shape)
        return tuple(n for d, n in enumerate(shape) if d not in (0, channels))

    def channels_first(self, activation: torch.Tensor) -> torch.Tensor:
        """Returns an output of the layer as ``(N, C, *spatial)``, without the tokens outside the grid.

        Args:
            activation: an output of the layer, in this layout.

        Returns:
            A view of the output, differentiable.

        Raises:
            ValueError: if the number of tokens is not that of the grid, the prefix and the suffix.
        """
        if self.grid is None:
            return activation.movedim(self.channel_dim, 1)
        patches = math.prod(self.grid)
        if activation.shape[1] != self.prefix + patches + self.suffix:
            expected = f"{self.prefix} + {shape_of(self.grid)} + {self.suffix}"
            hint = "the layout was found at another input size"
            raise ValueError(error_message("tokens", expected, activation.shape[1], hint))
        grid = activation[:, self.prefix : self.prefix + patches]
        # Not len(grid), which is a plain int: torch.export would fix the batch size to it.
        return grid.reshape(grid.shape[0], *self.grid, -1).movedim(-1, 1)

    def restore(self, activation: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Returns an activation in the layout of the layer: the inverse of :meth:`channels_first`.

        Args:
            activation: shape ``(M * N, C, *spatial)``.
            original: an output of the layer for N images. The tokens outside the grid are copied from it, M
                times over.

        Returns:
            The activation in this layout, with M * N rows, differentiable.
        """
        if self.grid is None:
            return activation.movedim(1, self.channel_dim)
        tokens = activation.flatten(2).transpose(1, 2)
        times = len(tokens) // len(original)  # M
        before = original[:, : self.prefix].repeat(times, 1, 1)
        after = original[:, self.prefix + tokens.shape[1] :].repeat(times, 1, 1)
        return torch.cat([before, tokens, after], 1)


#: The layouts that ``layout=`` takes by name.
NAMED = {"channels_first": Layout(1), "channels_last": Layout(-1)}


def as_layout(layout: object) -> Layout:
    """Returns the layout that the user gave by name or as a :class:`Layout`.

    Raises:
        ValueError: if there is no layout of that name.
        TypeError: if it is neither a name nor a :class:`Layout`.
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
    """Returns the layout of an output with as many dimensions as the input; ``None`` if it is not spatial.

    If ``larger`` is given, the dimensions that differ between the two shapes are the spatial ones. If it is
    not given, or if no dimension differs, the spatial dimensions are those with the proportions of the input.

    Args:
        shape: shape of the output.
        input_shape: shape of the input that it was computed from.
        larger: shape of the output for a larger input.

    Raises:
        ValueError: if both NCHW and NHWC have the proportions of the input.
    """
    if len(shape) != len(input_shape):
        return None
    if larger is not None:
        changed = [d for d, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b]
        if changed == list(range(2, len(shape))):
            return Layout(1)
        if changed == list(range(1, len(shape) - 1)):
            return Layout(-1)
        if changed:  # another set of dimensions, such as a number of windows that grows
            return None
    # The output has one size for all inputs, as after a pooling to a fixed size, or only one run is known.
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
    """Whether one stride, the same on every side, leads from the input's size to this size.

    A side may be one position shorter or longer than the stride says, because layers round up or down. Of
    three sides the first is time, which has a stride of its own.
    """
    if len(size) == 3:
        return spatial[0] <= size[0] and _proportional(spatial[1:], size[1:])
    if len(set(size)) == 1:  # a square input gives a square map, whatever the stride
        return len(set(spatial)) == 1
    # Each side allows an interval of strides. If the intervals overlap, one stride fits all sides.
    lower = max(s / (n + 1) for n, s in zip(spatial, size, strict=True))
    upper = min(s / max(n - 1, 0.5) for n, s in zip(spatial, size, strict=True))
    return lower <= upper and max(spatial) <= max(size)
