"""The head that CAM reads (pooling, a norm and one linear layer) in every spelling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from helpers.written import Model, find


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: y.mean((2, 3)),
        lambda y: y.mean(3).mean(2),
        lambda y: y.flatten(2).mean(-1),
        lambda y: y.view(len(y), 8, -1).mean(-1),
        lambda y: F.adaptive_avg_pool2d(y, 1)[:, :, 0, 0],
        lambda y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
    ],
)
def test_every_spelling_of_global_average_pooling(pool: Callable[[Tensor], Tensor]) -> None:
    model = Model(lambda s, x: s.fc(pool(s.f(x)))).double()
    x = torch.randn(2, 3, 32, 24).double()
    assert find(model).name == "f"
    cam = camkit.CAM(model)(x, 1)
    torch.testing.assert_close(cam.maps.mean((1, 2)) + model.fc.bias[1], cam.output[:, 1])
    torch.testing.assert_close(camkit.GradCAM(model)(x, 1).maps, cam.maps.relu() / cam.maps[0].numel())
    net = camkit.attach_gap_head(model, 3, input_shape=(3, 32, 24))
    assert net.class_maps(x).maps.shape == (2, 3, 8, 6)


def test_weight_norm_and_parametrizations() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    torch.nn.utils.parametrizations.weight_norm(model.f[2])
    x = torch.rand(2, 3, 32, 24)
    cam = camkit.CAM(model)(x, 1)
    assert cam.layer == "f"
    torch.testing.assert_close(camkit.GradCAM(model)(x, 1).maps, cam.maps.relu() / 48)


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_linear_layer(parametrize: str) -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3)))).double()
    getattr(torch.nn.utils.parametrizations, parametrize)(model.fc)
    cam = camkit.CAM(model)(torch.randn(2, 3, 32, 24).double(), 1)
    torch.testing.assert_close(cam.maps.mean((1, 2)) + model.fc.bias[1], cam.output[:, 1])


def test_a_weight_that_depends_on_the_input() -> None:
    model = Model(lambda s, x: F.linear(s.f(x).mean((2, 3)), s.fc.weight * x.mean(), s.fc.bias))
    with pytest.raises(ValueError, match="got Model, where 'linear' is in the way after 'f'"):
        camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_a_weight_that_nobody_holds() -> None:
    model = Model(lambda s, x: F.linear(s.f(x).mean((2, 3)), s.fc.weight * 2))
    with pytest.raises(
        ValueError, match="^model: expected a linear layer that has its weight, got Model, where ''"
    ):
        camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_another_head_since_the_last_call() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    method, x = camkit.CAM(model), torch.rand(2, 3, 32, 24)
    method(x)
    model.fc = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'tanh' in 'fc.1' is in the way"):
        method(x)
    model.fc = nn.Linear(8, 6)
    assert method(x).output.shape == (2, 6)


def test_grouped_and_spatial_convolutions_are_no_linear_layer() -> None:
    grouped = Model(lambda s, x: s.g(s.f(x).mean((2, 3), keepdim=True)).flatten(1))
    grouped.g = nn.Conv2d(8, 4, 1, groups=2)
    spatial = Model(lambda s, x: s.more(s.f(x).mean((2, 3), keepdim=True)).flatten(1))
    for model in (grouped, spatial):
        with pytest.raises(ValueError, match="'conv2d' in '.*' is in the way"):
            camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_arguments_by_name_and_a_norm_without_bias() -> None:
    def head(s: Any, x: Tensor) -> Any:
        return F.linear(s.norm(s.f(x).mean((2, 3))), bias=s.fc.bias, weight=s.fc.weight)

    model = Model(head).double()
    model.norm = nn.LayerNorm(8, bias=False).double()
    nn.init.normal_(model.norm.weight)
    explained = camkit.CAM(model)(torch.randn(2, 3, 32, 24).double(), 1)
    torch.testing.assert_close(explained.maps.mean((1, 2)) + model.fc.bias[1], explained.output[:, 1])
