"""Functions of maps, without side effects. A map is a tensor whose last dimensions are spatial."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from camkit._tools import checks

#: Ways to combine the maps of several layers; see :func:`fuse`.
FUSIONS = ("mean", "product", "hierarchical")
# Rounding makes the values of a map that should be constant differ. This many units in the last place are
# taken for rounding.
_ROUNDING_UNITS = 16
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def normalize(maps: torch.Tensor, dims: int = 2) -> torch.Tensor:
    r"""Scales each map to [0, 1] by its own minimum and maximum.

    .. math:: \frac{M - \min M}{\max M - \min M}

    A constant map becomes all zeros. A map also counts as constant if its values differ by no more than the
    rounding of a sum, so that noise is not stretched to the full range.

    Args:
        maps: maps of any floating-point dtype, shape ``(..., *spatial)``.
        dims: number of spatial dimensions.

    Returns:
        Maps of the same shape and dtype, in [0, 1].

    Raises:
        ValueError: if a map holds NaN or infinity, is not of floats, or has fewer than ``dims`` dimensions.
        TypeError: if ``maps`` is not a tensor.

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
    # Compute in float32: in half precision, the span of large values would overflow.
    values = at_least_float32(maps)
    low = values.amin(axes, keepdim=True)
    high = values.amax(axes, keepdim=True)
    span = high - low
    rounding = _ROUNDING_UNITS * torch.finfo(values.dtype).eps * torch.maximum(high.abs(), low.abs())
    return safe_divide(values - low, span, span > rounding).clamp(0, 1).to(maps)


def safe_divide(
    numerator: torch.Tensor, denominator: torch.Tensor, where: torch.Tensor | None = None
) -> torch.Tensor:
    """Divides where that is possible, and returns zero elsewhere.

    Args:
        numerator: tensor of any shape.
        denominator: tensor that can be broadcast with it.
        where: bools, true where to divide; by default where the denominator is not zero.

    Returns:
        The quotient, with a finite gradient everywhere.
    """
    where = denominator != 0 if where is None else where
    # Replace both operands before the division. If only the quotient were replaced, its gradient would still
    # be NaN where the denominator is zero.
    return torch.where(where, numerator, 0) / torch.where(where, denominator, 1)


def weighted_sum(weights: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    r"""Sums the channels of an activation with weights, as most CAM methods do.

    .. math:: M_{nk} = \sum_c w_{nkc} A_{nc}

    Args:
        weights: K weights for each channel, ``(N, K, C)``.
        activation: shape ``(N, C, *spatial)``.

    Returns:
        Maps ``(N, K, *spatial)``, with the dtype of ``activation``.
    """
    with full_precision(activation):
        flat = weights.to(activation) @ activation.flatten(2)
    return flat.reshape(*flat.shape[:2], *activation.shape[2:])


def full_precision(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Returns a context without autocast, in which a product has the dtype of its factors.

    The caller may have switched autocast on for the model, but maps must not lose precision because of it.
    """
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in single or double precision. In half precision, products of gradients underflow."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fuse(parts: Sequence[torch.Tensor], how: str = "mean") -> torch.Tensor:
    r"""Combines the maps of several layers into one map, at the finest of their resolutions.

    Each map is first divided by its largest magnitude, so that every layer counts the same.

    Args:
        parts: the maps of each layer, from the shallowest layer to the deepest, each ``(N, K, *spatial)``.
        how: ``"mean"``; ``"product"`` of the positive parts; or ``"hierarchical"``, the fusion of LayerCAM:
            the maximum, after :math:`\tanh(2 M / \max |M|)` of every map except that of the deepest layer.

    Returns:
        Maps ``(N, K, *spatial)``. If there is only one layer, its maps are returned unchanged.

    References:
        Jiang et al., *LayerCAM: Exploring Hierarchical Class Activation Maps for Localization*, IEEE TIP
        2021, section III-C.
    """
    if len(parts) == 1:
        return parts[0]
    size = max((part.shape[2:] for part in parts), key=math.prod)  # the size with the most positions
    dims = tuple(range(2, len(size) + 2))
    scaled = []
    for part in parts:
        largest = part.abs().amax(dims, keepdim=True)
        scaled.append(resize(safe_divide(part, largest), size))
    if how == "hierarchical":
        # The tanh raises small values, so that shallow layers count in the maximum.
        scaled[:-1] = [(2 * part).tanh() for part in scaled[:-1]]
    stacked = torch.stack(scaled)
    if how == "product":
        return stacked.clamp(min=0).prod(0)
    return stacked.amax(0) if how == "hierarchical" else stacked.mean(0)


def resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes maps by linear interpolation between the centres of positions (``align_corners=False``).

    Args:
        maps: shape ``(..., *spatial)``, with as many spatial dimensions as ``size`` has entries.
        size: the new spatial size, of one to three dimensions.

    Returns:
        Maps ``(..., *size)``; ``maps`` itself if it has that size.
    """
    dims = len(size)
    if maps.shape[-dims:] == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-dims:])
    resized = F.interpolate(flat, size=tuple(size), mode=_INTERPOLATION[dims], align_corners=False)
    return resized.reshape(*maps.shape[:-dims], *size)
