"""Principal components of the positions of an activation."""

import torch

from camkit import maps
from camkit._tools import checks


def principal_map(activation: torch.Tensor, name: str) -> torch.Tensor:
    """Projects each activation on the first right singular vector of its matrix of positions by channels.

    The sign is chosen so that the map agrees with the sum of the channels.

    Args:
        activation: shape ``(N, K, C, *spatial)``.
        name: the name of its layer, for the error message.

    Returns:
        Shape ``(N, K, *spatial)``. An activation of zeros gives zeros.

    Raises:
        ValueError: if there is only one channel.
    """
    matrix = positions_by_channels(activation, name)
    # The eigenvectors of the smaller Gram matrix give the same projection as an SVD, at a lower cost.
    with maps.full_precision(matrix):
        if matrix.shape[2] <= matrix.shape[3]:
            projection = first_component(matrix @ matrix.mT)
        else:
            direction = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -1:]
            projection = (matrix @ direction)[..., 0]
    return with_sign_of(projection, matrix.sum(3)).reshape(*activation.shape[:2], *activation.shape[3:])


def positions_by_channels(activation: torch.Tensor, name: str) -> torch.Tensor:
    """Returns an activation ``(N, K, C, *spatial)`` as matrices ``(N, K, Z, C)``, in float32 or better.

    Raises:
        ValueError: if there is only one channel.
    """
    channels = activation.shape[2]
    if channels < 2:
        got = f"{name!r}, which has {channels}"
        raise ValueError(checks.error_message("layer", "a layer with two channels or more", got))
    return maps.at_least_float32(activation).flatten(3).mT


def first_component(gram: torch.Tensor) -> torch.Tensor:
    """Returns the first principal component ``(..., Z)`` of Z points, from their inner products."""
    values, vectors = torch.linalg.eigh(gram)  # the largest eigenvalue is the last
    # Rounding can make an eigenvalue of zero negative, and its square root NaN.
    component: torch.Tensor = vectors[..., -1] * values[..., -1:].clamp(min=0).sqrt()
    return component


def with_sign_of(component: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Returns the component ``(..., Z)`` with the sign that agrees with a reference of the same shape.

    The sign of an eigenvector is arbitrary, and may differ between devices and versions of torch.
    """
    agreement = (component * reference).sum(-1, keepdim=True)
    return torch.where(agreement < 0, -component, component)
