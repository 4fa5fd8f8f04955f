"""LIFT-CAM and Relevance-CAM against their rules, written out, and their warnings."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import Inputs
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.methods.relevance import contributions
from camkit.passes.evidence import gather
from helpers import reference
from helpers.families import Branching, ChannelsLast, Digits, Plain, Skip, Tokens, build, tiny

# With few channels a class may have no positive weight. Its relevance is then lost, which gives a warning.
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM")


def start(classes: int, c: int) -> Tensor:
    """The relevance at the output: 1 at the class and -1 / classes at all others."""
    relevance = torch.full((classes,), -1 / classes, dtype=torch.float64)
    relevance[c] = 1
    return relevance


def conv(x: Tensor, layer: nn.Conv2d, relevance: Tensor) -> Tensor:
    assert not isinstance(layer.padding, str)
    weight, stride, padding = layer.weight.detach(), layer.stride[0], layer.padding[0]
    return reference.relevance_of_conv(x, weight, relevance, stride, padding)


def plain(model: Plain, layer: str, a: Tensor, relevance: Tensor) -> Tensor:
    if layer == "features":
        return reference.relevance_of_pooled(a, model.fc, relevance)
    small = F.max_pool2d(a, 2)
    last = model.features[4]
    assert isinstance(last, nn.Conv2d)
    top = last(small[None])[0].detach().relu()
    return reference.relevance_of_pool(
        a, conv(small, last, reference.relevance_of_pooled(top, model.fc, relevance)), winner=True
    )


def branching(model: Branching, layer: str, a: Tensor, relevance: Tensor, other: Tensor) -> Tensor:
    if layer == "mix":
        return reference.relevance_of_pooled(
            a.relu(), model.classifier, relevance
        )  # a ReLU passes relevance on unchanged
    joined = torch.cat([a, other])
    top = model.mix(joined[None])[0].detach().relu()
    return conv(joined, model.mix, reference.relevance_of_pooled(top, model.classifier, relevance))[: len(a)]


def skip(model: Skip, layer: str, a: Tensor, relevance: Tensor, other: Tensor) -> Tensor:
    """``other`` is the second summand of the residual block."""
    if layer == "last":
        return reference.relevance_of_pooled(a.relu(), model.fc, relevance)
    small = a if layer == "pool" else F.avg_pool2d((a + other).relu(), 2)
    found = conv(
        small,
        model.last,
        reference.relevance_of_pooled(model.last(small[None])[0].detach().relu(), model.fc, relevance),
    )
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
        a = reference.activation_at(model, layer, image)
        for k, c in enumerate(classes[n].tolist()):
            relevance = start(explained.output.shape[1], c)
            match model:
                case Plain():
                    found = plain(model, layer, a, relevance)
                case Branching():
                    found = branching(model, layer, a, relevance, model.right(image[None])[0].detach())
                case ChannelsLast():
                    a = reference.nchw(a, "NHWC") if k == 0 else a
                    found = reference.relevance_of_pooled(a, model.head, relevance)
                case Digits():
                    found = digits(model, a, relevance)
                case Skip():
                    found = skip(model, layer, a, relevance, model.stem(image[None])[0].detach().relu())
            weights = [float(channel.mean()) for channel in found]
            expected = reference.weighted(a, weights, relu=False)
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(explained.maps[n, k], expected, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("squeezenet1_1", None), ("shufflenet_v2_x0_5", "stage2"), ("mobilenet_v2", "features.1")],
)
def test_where_the_rules_do_not_conserve_the_ratio_is_told(name: str, layer: str | None) -> None:
    with pytest.warns(
        UserWarning, match=r"^RelevanceCAM: 0\.\d+ of the relevance at the output of \w+ comes"
    ):
        camkit.RelevanceCAM(build(name).double(), layer)(torch.randn(1, 3, 96, 80).double(), 1)


@pytest.mark.parametrize("kind", [Plain, ChannelsLast])
def test_lift_cam_of_a_linear_head_is_closed(kind: type[nn.Module]) -> None:
    """Each weight is Z mean(g) mean(A), with Z the number of positions."""
    model = tiny(kind)
    shape = (3, 12, 10) if kind is Plain else (3, 16, 12)
    x = torch.randn(2, *shape).double()
    place = locate(DryRun.of(model, (2, *shape)), "features" if kind is Plain else "norm")
    (evidence,) = gather(model, Inputs(x), [[0, 1], [2, 3]], [place], gradient=True)
    a, g = evidence.activation.flatten(2), evidence.gradient.flatten(3)
    weights, _ = contributions(evidence)
    torch.testing.assert_close(weights, a.shape[2] * g.mean(3) * a.mean(2)[:, None], rtol=1e-9, atol=1e-13)


def test_lift_cam_tells_where_it_is_not_complete() -> None:
    with pytest.warns(
        UserWarning, match="^LIFTCAM: Tokens after 'norm1', or the target, has functions for which"
    ):
        camkit.LIFTCAM(tiny(Tokens))(torch.randn(2, 3, 16, 12).double(), 1)
