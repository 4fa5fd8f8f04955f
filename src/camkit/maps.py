"""Pure functions on maps: tensors whose last dimensions are spatial."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from camkit._tools import checks

#: How the maps of several layers become one.
FUSIONS = ("mean", "product", "hierarchical")
# How many units in the last place the same sum may differ by from one position to another.
_ROUNDING = 16
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def normalize(maps: torch.Tensor, dims: int = 2) -> torch.Tensor:
    """Each map shifted and scaled to [0, 1] by its own minimum and maximum; a constant map is all zeros.

    What differs by no more than the rounding of a sum is constant.

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
    checks.tensor("maps", maps)
    if maps.ndim < dims or not maps.is_floating_point():
        got = f"{maps.dtype}, {checks.shape_of(maps)}"
        raise ValueError(checks.error_message("maps", f"floats with {dims} spatial dimensions", got))
    if not torch.isfinite(maps).all():
        raise ValueError(checks.error_message("maps", "finite values", "NaN or infinity"))
    axes = tuple(range(-dims, 0))
    # In half precision the span of large values would overflow.
    values = at_least_float32(maps)
    low = values.amin(axes, keepdim=True)
    high = values.amax(axes, keepdim=True)
    span = high - low
    rounding = _ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(high.abs(), low.abs())
    return safe_divide(values - low, span, span > rounding).clamp(0, 1).to(maps)


def safe_divide(
    numerator: torch.Tensor, denominator: torch.Tensor, where: torch.Tensor | None = None
) -> torch.Tensor:
    """One by the other where that is asked for, and zero elsewhere; if nothing is said, where it can be.

    Its gradient is finite, which that of a division by zero is not, whatever is done with the result.
    """
    where = denominator != 0 if where is None else where
    return torch.where(where, numerator, 0) / torch.where(where, denominator, 1)


def weighted_sum(weights: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """The channels of an activation ``(N, C, *spatial)`` with weights ``(N, K, C)``: ``(N, K, *spatial)``."""
    with full_precision(activation):
        flat = weights.to(activation) @ activation.flatten(2)
    return flat.reshape(*flat.shape[:2], *activation.shape[2:])


def full_precision(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Outside the caller's autocast, which is for the model: products are of the type of their factors."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """In single precision or better: products of gradients vanish in half."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fuse(parts: Sequence[torch.Tensor], how: str = "mean") -> torch.Tensor:
    r"""Maps of several layers as one, at the finest of their resolutions.

    Each map is first divided by its largest magnitude, so that every layer counts the same.

    Args:
        parts: the layers' maps, from the shallowest layer to the deepest, each ``(N, K, *spatial)``.
        how: ``"mean"``; ``"product"`` of what is positive; or ``"hierarchical"``, LayerCAM's fusion: the
            maximum, with :math:`\tanh(2 M / \max M)` of all but the deepest layer's map.

    Returns:
        Shape ``(N, K, *spatial)``; that map itself, if it is only one.

    References:
        Jiang et al., *LayerCAM: Exploring Hierarchical Class Activation Maps for Localization*, IEEE TIP
        2021, section III-C.
    """
    if len(parts) == 1:
        return parts[0]
    size = max((part.shape[2:] for part in parts), key=math.prod)
    dims = tuple(range(2, len(size) + 2))
    scaled = []
    for part in parts:
        largest = part.abs().amax(dims, keepdim=True)
        scaled.append(resize(safe_divide(part, largest), size))
    if how == "hierarchical":
        scaled[:-1] = [(2 * part).tanh() for part in scaled[:-1]]
    stacked = torch.stack(scaled)
    if how == "product":
        return stacked.clamp(min=0).prod(0)
    return stacked.amax(0) if how == "hierarchical" else stacked.mean(0)


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps at another spatial size, by linear interpolation between the centres of positions.

    Args:
        maps: shape ``(..., *spatial)``, with as many spatial dimensions as ``size`` has entries.
        size: the new spatial size.

    Returns:
        Shape ``(..., *size)``.
    """
    dims = len(size)
    if maps.shape[-dims:] == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-dims:])
    resized = F.interpolate(flat, size=tuple(size), mode=_INTERPOLATION[dims], align_corners=False)
    return resized.reshape(*maps.shape[:-dims], *size)
