"""Principal directions of an activation's positions."""

import torch

from camkit import maps
from camkit._tools import checks


def principal_map(activation: torch.Tensor, name: str) -> torch.Tensor:
    """``(N, K, C, *spatial)`` projected on the first right singular vector of its positions by channels.

    Args:
        activation: shape ``(N, K, C, *spatial)``.
        name: its layer, for the message.

    Returns:
        Shape ``(N, K, *spatial)``; zeros for what is zero everywhere.

    Raises:
        ValueError: if there is one channel only.
    """
    matrix = positions_by_channels(activation, name)
    # The smaller of the two Gram matrices has the same first direction, and no SVD is needed.
    with maps.full_precision(matrix):
        if matrix.shape[2] <= matrix.shape[3]:
            projection = first_component(matrix @ matrix.mT)
        else:
            direction = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -1:]
            projection = (matrix @ direction)[..., 0]
    return with_sign_of(projection, matrix.sum(3)).reshape(*activation.shape[:2], *activation.shape[3:])


def positions_by_channels(activation: torch.Tensor, name: str) -> torch.Tensor:
    """``(N, K, C, *spatial)`` as matrices ``(N, K, Z, C)``, in single precision or better."""
    channels = activation.shape[2]
    if channels < 2:
        got = f"{name!r}, which has {channels}"
        raise ValueError(checks.error_message("layer", "a layer with two channels or more", got))
    return maps.at_least_float32(activation).flatten(3).mT


def first_component(gram: torch.Tensor) -> torch.Tensor:
    """The first principal component ``(..., Z)`` of points whose inner products are ``(..., Z, Z)``."""
    values, vectors = torch.linalg.eigh(gram)
    component: torch.Tensor = vectors[..., -1] * values[..., -1:].clamp(min=0).sqrt()
    return component


def with_sign_of(component: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The component ``(..., Z)`` with the sign, which is arbitrary, that agrees with a reference."""
    agreement = (component * reference).sum(-1, keepdim=True)
    return torch.where(agreement < 0, -component, component)
