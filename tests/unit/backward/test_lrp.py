"""The rules of LRP: they conserve relevance, or the loss is reported, or the model is refused."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import camkit
from camkit import Inputs
from camkit.backward import lrp
from camkit.backward.gradients import gradients
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.passes.evidence import gather
from helpers import reference
from helpers.families import Plain, Skip, build, tiny


def relevance_at(model: nn.Module, layer: str, x: Tensor, target: object) -> tuple[Tensor, float]:
    """The relevance ``(N, K, C, *spatial)`` at a layer, and the share of it that the rules conserve.

    The relevance of each score starts with one at the output.
    """
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
    """Relevance that starts with a sum of one arrives with a sum of one."""
    model = build(name).double()
    x = torch.randn(1, 3, 96, 80).double()
    relevance, ratio = relevance_at(model, layer, x, [[3, 7]])
    torch.testing.assert_close(relevance.flatten(2).sum(2), torch.ones(1, 2).double(), rtol=1e-2, atol=0)
    assert abs(ratio - 1) < 1e-2


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["stem", "block", "pool", "last"]))
def test_relevance_is_conserved_or_its_loss_is_told(seed: int, layer: str) -> None:
    """Inside the block, too, where some of the relevance goes around the layer."""
    torch.manual_seed(seed)
    model, x = tiny(Skip), torch.randn(2, 3, 11, 12).double()
    _, ratio = relevance_at(model, layer, x, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        camkit.RelevanceCAM(model, layer)(x, lambda y: y[:, 1])
    assert bool(told) == (abs(ratio - 1) > 0.05)


def test_relevance_through_a_bias_and_a_scale() -> None:
    """Parameters and numbers get no relevance, so that all of it goes to the activation."""

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
        expected = reference.relevance_of_pooled(top[n], model.fc, torch.eye(4).double()[1])
        torch.testing.assert_close(found[n, 0], expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "layer", "function"),
    [
        ("mobilenet_v3_small", "features.1", "hardsigmoid"),
        ("efficientnet_b0", "features.3", "sigmoid"),
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


@pytest.mark.parametrize("expand", [True, False])
def test_a_sum_with_one_number_for_each_channel_shares_its_relevance(expand: bool) -> None:
    """The pooled features are added to all positions, as they are or expanded before."""

    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            f = self.trunk(x)
            context = f.mean((2, 3), keepdim=True)
            f = f + (context.expand_as(f) if expand else context)
            return self.fc(f.mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Context().double().eval(), torch.rand(2, 3, 8, 7).double()
    relevance, kept = relevance_at(model, "trunk", x, 1)
    assert kept == pytest.approx(1)
    # The features reach the sum twice with equal totals: each way takes its share of every position.
    with torch.no_grad():
        f = model.trunk(x)
        context = f.mean((2, 3), keepdim=True)
        weight = model.fc.weight[1].clamp(min=0)
        total = f + context
        linear = weight[:, None, None] * total.mean((2, 3), keepdim=True)
        linear = linear / linear.sum(1, keepdim=True)  # the relevance of each channel, which sums to 1
        at_sum = linear * total / total.sum((2, 3), keepdim=True)
        direct = at_sum * f / total
        pooled = (at_sum * context / total).sum((2, 3), keepdim=True)
        expected = direct + pooled * f / f.sum((2, 3), keepdim=True)
    torch.testing.assert_close(relevance[:, 0], expected)
