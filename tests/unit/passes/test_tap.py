"""The output of layers, taken from one forward pass or replaced in it."""

import pytest
import torch
from torch import nn

import camkit
from helpers import reference
from helpers.families import (
    Residual,
    build,
    tiny,
)


@pytest.mark.parametrize("layer", ["stem", "norm", "body"])
def test_an_in_place_operation_after_the_layer_does_not_reach_the_map(layer: str) -> None:
    model = tiny(Residual)
    x = torch.randn(2, 3, 11, 13).double()
    explained = camkit.GradCAM(model, layer)(x, 1)
    for n in range(2):
        pair = reference.activation_and_gradient(model, layer, x[n], lambda y: y[1])
        torch.testing.assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("layer", ["features.0", "features.28", "features.29"])
def test_in_place_relus_of_vgg16(layer: str) -> None:
    """With every ReLU out of place the same network gives the same map."""
    model = build("vgg16").double()
    x = torch.randn(1, 3, 64, 64).double()
    maps = camkit.GradCAM(model, layer)(x, 3).maps
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    torch.testing.assert_close(maps, camkit.GradCAM(model, layer)(x, 3).maps, rtol=1e-12, atol=0)
