"""Pure functions on maps: tensors whose last dimensions are spatial."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from camkit import _checks

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def normalize(maps: torch.Tensor, dims: int = 2) -> torch.Tensor:
    """Each map shifted and scaled to [0, 1] by its own minimum and maximum; a constant map is all zeros.

    Args:
        maps: maps of any float type, shape ``(..., *spatial)``.
        dims: number of spatial dimensions.

    Returns:
        The same shape and type, in [0, 1].

    Raises:
        ValueError: if a map holds NaN or infinity, or has too few dimensions.

    Example:
        >>> import camkit, torch
        >>> camkit.normalize(torch.tensor([[-1.0, 0.0], [1.0, 3.0]]))
        tensor([[0.0000, 0.2500],
                [0.5000, 1.0000]])
    """
    _checks.tensor("maps", maps)
    if maps.ndim < dims or not maps.is_floating_point():
        got = f"{maps.dtype}, {_checks.shape_of(maps)}"
        raise ValueError(_checks.complaint("maps", f"floats with {dims} spatial dimensions", got))
    if not torch.isfinite(maps).all():
        raise ValueError(_checks.complaint("maps", "finite values", "NaN or infinity"))
    axes = tuple(range(-dims, 0))
    # In half precision the span of large values would overflow.
    wide = maps if maps.dtype == torch.float64 else maps.float()
    low = wide.amin(axes, keepdim=True)
    span = wide.amax(axes, keepdim=True) - low
    return torch.where(span > 0, (wide - low) / span, 0).clamp(0, 1).to(maps)


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps at another spatial size, by linear interpolation between the centres of positions.

    Args:
        maps: shape ``(..., *spatial)``, with as many spatial dimensions as ``size`` has entries.
        size: the new spatial size.

    Returns:
        Shape ``(..., *size)``.
    """
    dims = len(size)
    flat = maps.reshape(-1, 1, *maps.shape[-dims:])
    resized = F.interpolate(flat, size=tuple(size), mode=_INTERPOLATION[dims], align_corners=False)
    return resized.reshape(*maps.shape[:-dims], *size)
