"""The dry run, which needs only shapes, or runs on numbers if the model needs them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.written import Model


def branch(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x).mean((2, 3))) if x.sum() > -1e9 else None


def draw(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x).mean((2, 3))) * float(torch.rand(()) * 0 + 1)


def make(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x - torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize("head", [branch, draw, make])
@pytest.mark.parametrize("layer", [None, "f"])
def test_models_that_need_numbers_to_run(head: Callable[[Any, Tensor], Any], layer: str | None) -> None:
    model, x = Model(head).train(), torch.rand(2, 3, 32, 24)
    state = torch.get_rng_state()
    assert camkit.GradCAM(model, layer)(x).layer == "f"
    assert torch.equal(torch.get_rng_state(), state)
    assert camkit.attach_gap_head(model, 2, input_shape=(3, 32, 24))(x).shape == (2, 2)


def test_a_dry_run_with_numbers_leaves_the_buffers() -> None:
    def count(s: Any, x: Tensor) -> Any:
        s.count += 1
        return branch(s, x)

    model = Model(count)
    model.register_buffer("count", torch.zeros(()))
    assert camkit.list_layers(model, (3, 32, 24))[-1].name == "f"
    assert model.get_buffer("count") == 0


def test_a_too_small_input_is_told_a_size_that_fits() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)) for _ in range(3)))
    assert model(torch.rand(1, 3, 22, 22)).shape[-1] == 1  # 22 x 22 is the smallest size that fits
    with pytest.raises(
        ValueError,
        match=r"^x: expected larger images for Sequential, got 3 x 16 x 16 .*; 32 x 32 is large enough$",
    ):
        camkit.GradCAM(model)(torch.rand(1, 3, 16, 16))
    with pytest.raises(
        ValueError,
        match=r"^input_shape: expected larger images for Sequential, got 3 x 16 x 16 .*; 32 x 32 is large",
    ):
        camkit.list_layers(model, (3, 16, 16))
