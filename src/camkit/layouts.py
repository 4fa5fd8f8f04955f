"""Where an activation keeps its channels and its positions: NCHW, NHWC or tokens.

Everything in camkit works on ``(N, C, *spatial)``; a :class:`Layout` turns what a layer gives into that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camkit._checks import complaint, shape_of


@dataclass(frozen=True)
class Layout:
    """How to read one layer's output as ``(N, C, *spatial)``.

    Attributes:
        channel_dim: the dimension of the channels: 1 (NCHW) or -1 (NHWC, tokens).
        grid: for tokens ``(N, L, C)``, the grid that the last ``L - prefix`` tokens form.
        prefix: for tokens, how many come before the grid (class and register tokens).
    """

    channel_dim: int = 1
    grid: tuple[int, ...] | None = None
    prefix: int = 0

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
        tokens = self.prefix + math.prod(self.grid)
        if activation.shape[1] != tokens:
            raise ValueError(
                complaint(
                    "tokens",
                    f"{tokens} ({self.prefix} + a grid of {shape_of(self.grid)})",
                    activation.shape[1],
                    "the layout was found at another input size",
                )
            )
        patches = activation[:, self.prefix :]
        return patches.reshape(len(patches), *self.grid, -1).movedim(-1, 1)


def infer_layout(
    shape: Sequence[int],
    input_shape: Sequence[int],
    larger: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Layout | None:
    """The layout of an output of ``shape`` for an input of ``input_shape``; ``None`` if not spatial.

    With ``larger``, the pair (shape, input shape) of a second run at another size, the dimensions that
    changed are the spatial ones. Without it, or where none changed, the spatial dimensions are those
    with the proportions of the input.

    Raises:
        ValueError: if the shape can be read in two ways.
    """
    size = tuple(input_shape[2:])
    if len(shape) == len(size) + 2:
        if larger is not None:
            changed = [d for d, (a, b) in enumerate(zip(shape, larger[0], strict=True)) if a != b]
            if changed == list(range(2, len(shape))):
                return Layout(1)
            if changed == list(range(1, len(shape) - 1)):
                return Layout(-1)
        return _by_proportion(tuple(shape), size)
    if len(shape) == 3 and len(size) == 2:
        layout = _tokens(shape[1], size)
        if layout is not None and larger is not None:
            again = _tokens(larger[0][1], tuple(larger[1][2:]))
            if larger[0][1] != shape[1] and (again is None or again.prefix != layout.prefix):
                return None
        return layout
    return None


def _by_proportion(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    first, last = shape[2:], shape[1:-1]
    plausible = [
        channel_dim
        for channel_dim, spatial in ((1, first), (-1, last))
        if math.prod(spatial) > 1 and _proportional(spatial, size)
    ]
    if len(plausible) == 2:
        raise ValueError(
            complaint(
                "layer",
                "an output whose channels can be told from its positions",
                f"shape {shape_of(shape)}, which reads as NCHW and as NHWC",
            )
        )
    return Layout(plausible[0]) if plausible else None


def _proportional(spatial: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether one stride explains every side, up to the rounding of a side by one position."""
    lower = max(s / (n + 1) for n, s in zip(spatial, size, strict=True))
    upper = min(s / max(n - 1, 0.5) for n, s in zip(spatial, size, strict=True))
    if len(set(size)) == 1:
        return len(set(spatial)) == 1
    return lower <= upper and max(spatial) <= max(size)


def _tokens(length: int, size: tuple[int, ...]) -> Layout | None:
    """The finest grid of whole patches that ``length`` tokens can hold; the rest come before it."""
    for patch in range(1, min(size) + 1):
        if any(s % patch for s in size):
            continue
        grid = tuple(s // patch for s in size)
        prefix = length - math.prod(grid)
        if prefix >= 0:
            # A class token and a few registers come first; more than 16 is no grid of patches.
            return Layout(-1, grid, prefix) if math.prod(grid) > 1 and prefix <= 16 else None
    return None
