"""CAM without surgery: exact maps, the heads that it supports, and the heads that it refuses."""

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers import reference
from helpers.families import FAMILIES, Branching, ChannelsLast, Family, Plain, build, images, tiny

EXACT = [f for f in FAMILIES if f.exact]
OTHERS = [f for f in FAMILIES if not f.exact]


@pytest.mark.parametrize("family", EXACT, ids=lambda f: f.name)
def test_exact_without_surgery(family: Family) -> None:
    """The mean of the map plus the constant of the head is the logit, for every class."""
    model = build(family.name).double()
    x = images(family).double()
    classes = torch.tensor([[3, 999, 3], [0, 281, 7]])
    explanation = camkit.CAM(model)(x, classes)
    added = {
        "squeezenet1_1": lambda: torch.zeros(2, 3).double(),
        "convnext_tiny": lambda: _convnext_offset(model)[classes],
    }.get(family.name, lambda: _last_linear(model).bias[classes])()
    assert explanation.maps.shape[:2] == (2, 3)
    logits = explanation.output.gather(1, classes)
    torch.testing.assert_close(explanation.maps.mean((2, 3)) + added, logits, rtol=1e-9, atol=1e-12)
    assert torch.equal(explanation.output, model(x).detach())


def _last_linear(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def _convnext_offset(model: nn.Module) -> Tensor:
    linear = _last_linear(model)
    norm = model.get_submodule("classifier.0")
    assert isinstance(norm, nn.LayerNorm)
    return linear.weight @ norm.bias + linear.bias


@pytest.mark.parametrize("family", OTHERS, ids=lambda f: f.name)
def test_another_head_is_refused_and_the_operation_named(family: Family) -> None:
    message = (
        rf"^model: expected only global pooling .* where '{family.in_the_way}'.*attach_gap_head.*GradCAM"
    )
    with pytest.raises(ValueError, match=message):
        camkit.CAM(build(family.name))(images(family))


@pytest.mark.parametrize(
    ("kind", "shape", "layer", "layout"),
    [
        (Plain, (3, 12, 10), "features", "NCHW"),
        (Branching, (1, 6, 8), "mix", "NCHW"),
        (ChannelsLast, (3, 16, 12), "norm", "NHWC"),
    ],
)
def test_equals_the_papers_sum(
    kind: type[nn.Module], shape: tuple[int, int, int], layer: str, layout: str
) -> None:
    model = tiny(kind)
    x = torch.randn(3, *shape).double()
    explanation = camkit.CAM(model)(x, [0, 2, 1])
    for n, c in enumerate([0, 2, 1]):
        activation, _ = reference.activation_and_gradient(model, layer, x[n], lambda y: y.sum())
        activation = reference.nchw(activation, layout)
        if kind is Branching:
            activation = activation.relu()
        expected = reference.cam(activation, _last_linear(model).weight[c].detach())
        torch.testing.assert_close(explanation.maps[n], expected, rtol=1e-9, atol=1e-12)


def test_convnext_map_is_the_layer_norm_written_out() -> None:
    model = build("convnext_tiny").double()
    nn.init.normal_(model.get_parameter("classifier.0.weight"))
    nn.init.normal_(model.get_parameter("classifier.0.bias"))
    x = torch.randn(2, 3, 96, 64).double()
    features = model.get_submodule("features")(x).detach()
    maps = camkit.CAM(model)(x, [5, 6]).maps
    weight, gamma = _last_linear(model).weight.detach(), model.get_parameter("classifier.0.weight").detach()
    for n, c in enumerate([5, 6]):
        pooled = features[n].mean((1, 2))
        sigma = (((pooled - pooled.mean()) ** 2).mean() + 1e-6).sqrt()
        # The LayerNorm after the pooling is linear once its standard deviation is known.
        v = weight[c] * gamma
        expected = reference.cam(features[n], (v - v.mean()) / sigma)
        torch.testing.assert_close(maps[n], expected, rtol=1e-9, atol=1e-12)


def test_a_network_that_only_looks_linear_is_refused() -> None:
    """The dry run records the right operations, but a hook that writes only on the CPU changes the logits."""
    model = tiny(Plain)
    x = torch.randn(2, 3, 12, 10).double()
    camkit.CAM(model)(x)
    model.fc.register_forward_hook(lambda m, a, out: out.mul_(2) if out.device.type == "cpu" else None)
    with pytest.raises(ValueError, match="^model: expected logits that are the linear layer of the pooled"):
        camkit.CAM(model)(x)


@pytest.mark.parametrize("name", ["flatten", "no pooling", "two linear", "sum of two"])
def test_heads_that_are_almost_linear(name: str) -> None:
    trunk = nn.Conv2d(3, 4, 3)
    model = {
        "flatten": nn.Sequential(trunk, nn.Flatten(), nn.Linear(4 * 8 * 8, 3)),
        "no pooling": trunk,
        "two linear": nn.Sequential(
            trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 3)
        ),
        "sum of two": _SumOfTwo(),
    }[name]
    with pytest.raises(ValueError, match="^model: expected"):
        camkit.CAM(model)(torch.rand(2, 3, 10, 10))


class _SumOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.mean((2, 3)) + x.amax((2, 3)))  # type: ignore[no-any-return]


def test_the_weights_are_those_of_the_moment() -> None:
    model = tiny(Plain)
    method = camkit.CAM(model)
    x = torch.randn(1, 3, 12, 10).double()
    before = method(x, 1).maps
    with torch.no_grad():
        model.fc.weight *= 2
    torch.testing.assert_close(method(x, 1).maps, 2 * before)


def test_half_precision_and_a_linear_layer_without_bias() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3, bias=False)
    )
    x = torch.randn(2, 3, 9, 9)
    expected = camkit.CAM(model)(x, 1).maps
    torch.testing.assert_close(expected.mean((1, 2)), model(x)[:, 1].detach())
    half = camkit.CAM(model.bfloat16())(x.bfloat16(), 1).maps
    assert half.dtype == torch.float32  # sums of many products lose digits in bfloat16
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)


def test_a_one_by_one_convolution_is_a_linear_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.Flatten()
    ).double()
    explanation = camkit.CAM(model)(torch.randn(2, 3, 9, 9).double(), [1, 2])
    mean = explanation.maps.mean((1, 2)) + model.get_parameter("2.bias")[[1, 2]]
    torch.testing.assert_close(mean, explanation.output[[0, 1], [1, 2]])
