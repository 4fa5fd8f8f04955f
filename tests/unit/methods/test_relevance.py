"""LIFT-CAM and Relevance-CAM against propagation written out by hand, and what their rules promise."""

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import Inputs
from camkit.backward import lrp
from camkit.backward.gradients import gradients
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.methods.relevance import contributions
from camkit.passes.evidence import gather
from helpers import reference
from helpers.families import Branching, ChannelsLast, Digits, Plain, Residual, Skip, Tokens, build, tiny

# With few channels a class may have no positive weight, and then its relevance goes nowhere.
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM")


def activation_at(model: nn.Module, layer: str, image: Tensor) -> Tensor:
    return reference.activation_and_gradient(model, layer, image, lambda y: y.sum())[0]


def start(classes: int, c: int) -> Tensor:
    relevance = torch.full((classes,), -1 / classes, dtype=torch.float64)
    relevance[c] = 1
    return relevance


def pooled(a: Tensor, fc: nn.Linear, relevance: Tensor) -> Tensor:
    """Back through a linear layer and global average pooling, to the ``(C, h, w)`` that was pooled."""
    return reference.relevance_of_mean(
        a, reference.relevance_of_linear(a.mean((1, 2)), fc.weight.detach(), relevance)
    )


def conv(x: Tensor, layer: nn.Conv2d, relevance: Tensor) -> Tensor:
    assert not isinstance(layer.padding, str)
    weight, stride, padding = layer.weight.detach(), layer.stride[0], layer.padding[0]
    return reference.relevance_of_conv(x, weight, relevance, stride, padding)


def plain(model: Plain, layer: str, a: Tensor, relevance: Tensor) -> Tensor:
    if layer == "features":
        return pooled(a, model.fc, relevance)
    small = F.max_pool2d(a, 2)
    last = model.features[4]
    assert isinstance(last, nn.Conv2d)
    top = last(small[None])[0].detach().relu()
    return reference.relevance_of_pool(a, conv(small, last, pooled(top, model.fc, relevance)), winner=True)


def branching(model: Branching, layer: str, a: Tensor, relevance: Tensor, other: Tensor) -> Tensor:
    if layer == "mix":
        return pooled(a.relu(), model.classifier, relevance)  # ReLU hands on what it gets
    joined = torch.cat([a, other])
    top = model.mix(joined[None])[0].detach().relu()
    return conv(joined, model.mix, pooled(top, model.classifier, relevance))[: len(a)]


def skip(model: Skip, layer: str, a: Tensor, relevance: Tensor, other: Tensor) -> Tensor:
    """``other`` is the second summand of the residual block."""
    if layer == "last":
        return pooled(a.relu(), model.fc, relevance)
    small = a if layer == "pool" else F.avg_pool2d((a + other).relu(), 2)
    found = conv(small, model.last, pooled(model.last(small[None])[0].detach().relu(), model.fc, relevance))
    if layer == "pool":
        return found
    summed = a + other
    found = reference.relevance_of_pool(summed.relu(), found, winner=False)
    return torch.where(summed != 0, a / summed * found, 0)


def digits(model: Digits, a: Tensor, relevance: Tensor) -> Tensor:
    small = F.max_pool2d(a.relu(), 2)
    hidden = model.fc1(small.flatten()).detach().relu()
    below = reference.relevance_of_linear(hidden, model.fc2.weight.detach(), relevance)
    below = reference.relevance_of_linear(small.flatten(), model.fc1.weight.detach(), below)
    return reference.relevance_of_pool(a.relu(), below.reshape(small.shape), winner=True)


@lost
@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [
        (Plain, "features", (3, 12, 10)),
        (Plain, "features.2", (3, 12, 10)),
        (Branching, "mix", (1, 6, 8)),
        (Branching, "left", (1, 6, 8)),
        (ChannelsLast, "norm", (3, 16, 12)),
        (Digits, "conv2", (1, 28, 28)),
        (Skip, "block", (3, 11, 12)),
        (Skip, "pool", (3, 11, 12)),
        (Skip, "last", (3, 11, 12)),
    ],
)
def test_relevance_cam_equals_its_rules_written_out(
    kind: type[nn.Module], layer: str, shape: tuple[int, ...]
) -> None:
    model = tiny(kind)
    x = torch.randn(2, *shape).double()
    classes = torch.tensor([[0, 2], [1, 1]])
    explained = camkit.RelevanceCAM(model, layer)(x, classes)
    for n, image in enumerate(x):
        a = activation_at(model, layer, image)
        for k, c in enumerate(classes[n].tolist()):
            relevance = start(explained.output.shape[1], c)
            match model:
                case Plain():
                    found = plain(model, layer, a, relevance)
                case Branching():
                    found = branching(model, layer, a, relevance, model.right(image[None])[0].detach())
                case ChannelsLast():
                    a = reference.nchw(a, "NHWC") if k == 0 else a
                    found = pooled(a, model.head, relevance)
                case Digits():
                    found = digits(model, a, relevance)
                case Skip():
                    found = skip(model, layer, a, relevance, model.stem(image[None])[0].detach().relu())
            weights = [float(channel.mean()) for channel in found]
            expected = reference.weighted(a, weights, relu=False)
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(explained.maps[n, k], expected, rtol=1e-9, atol=1e-11 * scale)


def relevance_at(model: nn.Module, layer: str, x: Tensor, target: object) -> tuple[Tensor, float]:
    """The relevance ``(N, K, C, *spatial)`` at a layer for a start of ones, and how much is conserved."""
    place = locate(DryRun.of(model, (2, *x.shape[1:])), layer)
    (evidence,) = gather(model, Inputs(x), target, [place], gradient=False)  # type: ignore[arg-type]
    leaf = evidence.activation.clone().requires_grad_()
    with lrp.Relevance(leaf, "Model") as rules:
        (output,) = evidence.outputs(leaf[None])
    scores = evidence.score(output)
    return gradients(scores, leaf, layer, keep=True), rules.conservation([output], scores, leaf)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("alexnet", "features.2"),
        ("vgg11", "features.2"),
        ("resnet18", "maxpool"),
        ("resnet18", "layer2"),
        ("densenet121", "features.denseblock2"),
        ("googlenet", "inception3b"),
        ("inception_v3", "Mixed_5b"),
    ],
)
def test_relevance_is_conserved_down_to_shallow_layers(name: str, layer: str) -> None:
    """Of a start of one, one arrives."""
    model = build(name).double()
    x = torch.randn(1, 3, 96, 80).double()
    relevance, ratio = relevance_at(model, layer, x, [[3, 7]])
    torch.testing.assert_close(relevance.flatten(2).sum(2), torch.ones(1, 2).double(), rtol=1e-2, atol=0)
    assert abs(ratio - 1) < 1e-2


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["stem", "block", "pool", "last"]))
def test_relevance_is_conserved_or_its_loss_is_told(seed: int, layer: str) -> None:
    """Also inside the block, where some of it goes around the layer."""
    torch.manual_seed(seed)
    model, x = tiny(Skip), torch.randn(2, 3, 11, 12).double()
    _, ratio = relevance_at(model, layer, x, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        camkit.RelevanceCAM(model, layer)(x, lambda y: y[:, 1])
    assert bool(told) == (abs(ratio - 1) > 0.05)


def test_relevance_through_a_bias_and_a_scale() -> None:
    """What is no activation gets nothing, and takes nothing."""

    class Scaled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = 2 * (self.features(x) * self.shift + self.shift + 1) / 3
            return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]

    model = tiny(Scaled)
    x = torch.randn(2, 3, 12, 10).double()
    a = model.features(x).detach()
    top = 2 * (a * model.shift.detach() + model.shift.detach() + 1) / 3
    found, _ = relevance_at(model, "features", x, 1)
    for n in range(2):
        expected = pooled(top[n], model.fc, torch.eye(4).double()[1])
        torch.testing.assert_close(found[n, 0], expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "layer", "function"),
    [
        ("mobilenet_v3_small", None, "hardswish"),
        ("efficientnet_b0", "features.3", "silu"),
        ("regnet_y_400mf", "trunk_output.block3", "sigmoid"),
        ("convnext_tiny", None, "layer_norm"),
        ("vit_b_32", None, "multi_head_attention_forward"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(name: str, layer: str | None, function: str) -> None:
    size = 224 if name == "vit_b_32" else 64
    message = (
        r"^model: expected an architecture of convolutions, linear layers, ReLUs, poolings and sums, got "
        rf"\w+, which uses '{function}' after the layer; there relevance has no rule; a method of gradients"
    )
    with pytest.raises(ValueError, match=message):
        camkit.RelevanceCAM(build(name), layer)(torch.randn(1, 3, size, size), 1)


def test_a_gate_is_refused() -> None:
    class Gated(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x)
            return self.fc((y * y.mean((2, 3), keepdim=True)).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="which uses 'mul' after the layer"):
        camkit.RelevanceCAM(Gated(), "features")(torch.rand(1, 3, 12, 10), 1)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("squeezenet1_1", None), ("shufflenet_v2_x0_5", "stage2"), ("mobilenet_v2", "features.1")],
)
def test_where_the_rules_do_not_conserve_the_ratio_is_told(name: str, layer: str | None) -> None:
    with pytest.warns(
        UserWarning, match=r"^RelevanceCAM: 0\.\d+ of the relevance at the output of \w+ comes"
    ):
        camkit.RelevanceCAM(build(name).double(), layer)(torch.randn(1, 3, 96, 80).double(), 1)


def test_lift_cam_of_two_linear_layers_with_tanh() -> None:
    """DeepLIFT's rescale rule by hand, on Residual's head."""
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    first, _, second = model.head
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    w1, b1, w2 = first.weight.detach(), first.bias.detach(), second.weight.detach()
    explained = camkit.LIFTCAM(model)(x, [4, 1])
    for n, c in enumerate([4, 1]):
        a = activation_at(model, "out", x[n])
        mean = a.mean((1, 2))
        weights = []
        for k in range(len(a)):
            contribution = 0.0
            for j in range(len(w1)):
                hidden, base = w1[j] @ mean + b1[j], b1[j]
                contribution += float(
                    w2[c, j] * (hidden.tanh() - base.tanh()) / (hidden - base) * w1[j, k] * mean[k]
                )
            weights.append(contribution)
        torch.testing.assert_close(explained.maps[n], reference.weighted(a, weights), rtol=1e-9, atol=1e-13)


def test_lift_cam_through_relu_max_pooling_and_two_linear_layers() -> None:
    model, x = tiny(Digits), torch.randn(1, 1, 28, 28).double()
    w1, b1, w2 = model.fc1.weight.detach(), model.fc1.bias.detach(), model.fc2.weight.detach()
    a = activation_at(model, "conv2", x[0])
    small = F.max_pool2d(a.relu(), 2)
    hidden = w1 @ small.flatten() + b1
    slopes = (hidden.relu() - b1.relu()) / (hidden - b1)
    contributions = ((w2[7] * slopes) @ w1 * small.flatten()).reshape(small.shape)
    weights = [
        float(channel.sum()) for channel in contributions
    ]  # pooling hands it to a position of its channel
    expected = reference.weighted(a, weights)
    torch.testing.assert_close(camkit.LIFTCAM(model)(x, 7).maps[0], expected, rtol=1e-9, atol=1e-12)


def test_lift_cam_through_a_relu_over_positions() -> None:
    model, x = tiny(Branching), torch.randn(1, 1, 6, 8).double()
    a = activation_at(model, "mix", x[0])
    weights = (model.classifier.weight[2] * a.relu().mean((1, 2))).tolist()
    torch.testing.assert_close(
        camkit.LIFTCAM(model)(x, 2).maps[0], reference.weighted(a, weights), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("kind", [Plain, ChannelsLast])
def test_lift_cam_of_a_linear_head_is_closed(kind: type[nn.Module]) -> None:
    """Z mean(g) mean(A)."""
    model = tiny(kind)
    shape = (3, 12, 10) if kind is Plain else (3, 16, 12)
    x = torch.randn(2, *shape).double()
    place = locate(DryRun.of(model, (2, *shape)), "features" if kind is Plain else "norm")
    (evidence,) = gather(model, Inputs(x), [[0, 1], [2, 3]], [place], gradient=True)
    a, g = evidence.activation.flatten(2), evidence.gradient.flatten(3)
    weights, _ = contributions(evidence)
    torch.testing.assert_close(weights, a.shape[2] * g.mean(3) * a.mean(2)[:, None], rtol=1e-9, atol=1e-13)


class Mixed(nn.Module):
    """Every kind of function that DeepLIFT has a rule for, in and out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(80, 6), nn.Sigmoid(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.stem(x)), inplace=True)
        y = self.conv(x)
        y += x
        y = F.silu(F.max_pool2d(F.relu_(y), 2)) + F.avg_pool2d(torch.tanh(x), 2)
        return self.fc(y)  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["stem", "norm", "conv"]))
def test_contributions_sum_to_the_difference_of_the_scores(seed: int, layer: str) -> None:
    torch.manual_seed(seed)
    model, x = tiny(Mixed), torch.randn(2, 3, 12, 10).double()
    place = locate(DryRun.of(model, (2, 3, 12, 10)), layer)
    (evidence,) = gather(model, Inputs(x), [[0, 1], [2, 0]], [place], gradient=False)
    weights, differences = contributions(evidence)
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: torch.zeros_like(output)
    )
    without = model(x).detach()
    handle.remove()
    expected = (model(x).detach() - without).gather(1, torch.tensor([[0, 1], [2, 0]]))
    torch.testing.assert_close(differences, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.sum(2), expected, rtol=1e-8, atol=1e-11)


def test_lift_cam_tells_where_it_is_not_complete() -> None:
    with pytest.warns(
        UserWarning, match="^LIFTCAM: Tokens after 'norm1', or the target, has functions for which"
    ):
        camkit.LIFTCAM(tiny(Tokens))(torch.randn(2, 3, 16, 12).double(), 1)


def test_liftcam_refuses_what_chooses_by_numbers() -> None:
    """As detectors choose their boxes: the run on zeros does not do the same."""

    class Chooses(Plain):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x).mean((2, 3))
            chosen = F.relu(f[:, f[0] > 0])
            return torch.stack([chosen.sum(1), f.sum(1)], 1)

    message = (
        "^model: expected one that does the same with an activation of zeros, .* got one that chooses by"
    )
    with pytest.raises(ValueError, match=message):
        camkit.LIFTCAM(tiny(Chooses), "features")(torch.rand(2, 3, 12, 10).double(), 0)


@pytest.mark.parametrize("method", [camkit.LIFTCAM, camkit.GuidedGradCAM])
def test_a_number_made_of_a_tensor_is_no_operation_in_place(method: Any) -> None:
    class Counts(Plain):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            steps = int(f.sum()) * 0 + 1
            return self.fc(F.relu(f.mean((2, 3)))) / steps  # type: ignore[no-any-return]

    model, x = tiny(Counts), torch.rand(2, 3, 12, 10).double()
    plain = nn.Sequential(
        OrderedDict(features=model.features, mean=Mean(), relu=nn.ReLU(), fc=model.fc)
    ).eval()
    torch.testing.assert_close(method(model, "features")(x, 1).maps, method(plain, "features")(x, 1).maps)


class Mean(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return f.mean((2, 3))
