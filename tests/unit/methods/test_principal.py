"""The methods that project an activation onto its first principal component."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.families import Plain, tiny
from helpers.registry import images, make


@pytest.mark.parametrize("name", ["EigenCAM", "KPCACAM", "EigenGradCAM"])
def test_one_channel_has_no_principal_direction(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    with pytest.raises(
        ValueError, match="^layer: expected a layer with two channels or more, got '1', which has 1$"
    ):
        make(name, model)(torch.rand(1, 3, 12, 10))


@pytest.mark.parametrize("name", ["EigenCAM", "KPCACAM", "EigenGradCAM"])
def test_the_sign_of_the_singular_vector_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(Plain), images(name, 3)
    expected = make(name, model)(x, 1).maps
    eigh = torch.linalg.eigh

    # The sign of an eigenvector is arbitrary, so the opposite vectors must give the same maps.
    def flipped(matrix: Tensor) -> Any:
        values, vectors = eigh(matrix)
        return type(eigh(matrix))((values, -vectors))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert torch.equal(make(name, model)(x, 1).maps, expected)
