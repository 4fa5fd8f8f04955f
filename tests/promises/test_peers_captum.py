"""Where captum is right, camkit agrees with it.

Where captum departs from the paper, a comment says how, and the test chooses the case in which it does not.
"""

from collections.abc import Callable

import pytest
import torch
from captum.attr import LRP, DeepLift, GuidedBackprop, GuidedGradCam, LayerLRP
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, IdentityRule
from torch import Tensor, nn

import camkit
from helpers.peers import LAYERS, SHAPES, case, close, inputs, network, small

# captum says that it hooks modules, and that it wants a gradient of the input.
CAPTUM = (
    "ignore:Setting:UserWarning",
    "ignore:Input Tensor 0 did not already require gradients:UserWarning",
)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_guided_backpropagation_of_captum(name: str) -> None:
    model, x = network(name), inputs(*SHAPES[name])
    theirs = GuidedBackprop(model).attribute(x.clone(), [3, 8])
    close(camkit.guided_backprop(model, x, [3, 8]), theirs, 1e-12)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_guided_grad_cam_of_captum(name: str, layer: str) -> None:
    """captum keeps the channels of the input apart."""
    model, x, classes = case(name, layer)
    guided = GuidedGradCam(model, model.get_submodule(layer))
    theirs = guided.attribute(x.clone(), classes, interpolate_mode="bilinear").sum(1)
    close(camkit.GuidedGradCAM(model, layer)(x, classes).maps, theirs, 1e-12)


class Copy(nn.Module):
    """captum loses its rule for a pooling whose input is the output of a ReLU module; camkit does not.

    Its hook that keeps what arrives at the ReLU comes before the one with the pooling's rule.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Head(nn.Module):
    """The part of a network after one of its features, with a copy after each ReLU."""

    def __init__(self, model: nn.Module, after: int) -> None:
        super().__init__()
        features = model.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        copied = [[m, Copy()] if isinstance(m, nn.ReLU) else [m] for m in features[after + 1 :]]
        self.features = nn.Sequential(*(m for ms in copied for m in ms))
        self.pool, self.classifier = model.get_submodule("avgpool"), model.get_submodule("classifier")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


def activation(model: nn.Module, after: int, x: Tensor) -> Tensor:
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    result: Tensor = features[: after + 1](x)
    return result


def by_weights(weights: Tensor, of: Tensor) -> Tensor:
    return (weights[:, :, None, None] * of).sum(1)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize(("name", "after"), [("alexnet", 12), ("vgg16", 29), ("vgg16", 28), ("vgg16", 22)])
def test_lift_cams_weights_are_deeplift_of_captum(name: str, after: int) -> None:
    """After the last pooling, before it, before the ReLU before that, and a block earlier."""
    model, x = network(name), inputs(*SHAPES[name])
    lift, at = camkit.LIFTCAM(model, f"features.{after}"), activation(model, after, x)
    classes = lift(x, [list(range(8))] * 2).maps.amax((2, 3)).argmax(1).tolist()
    contributions = DeepLift(Head(model, after)).attribute(at, torch.zeros_like(at), classes)
    close(lift(x, classes).maps, by_weights(contributions.sum((2, 3)), at).relu(), 1e-12)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize("function", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU])
def test_lift_cam_of_other_functions_is_deeplift_of_captum(function: type[nn.Module]) -> None:
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(120, 8), function(), nn.Linear(8, 6), function())
    x = inputs(2, 3, 10, 8)
    at = model[0](x).detach()
    contributions = DeepLift(model[1:]).attribute(at, torch.zeros_like(at), [3, 5])
    expected = by_weights(contributions.sum((2, 3)), at).relu()
    close(camkit.LIFTCAM(model, "0")(x, [3, 5]).maps, expected, 1e-9)


@pytest.mark.filterwarnings(*CAPTUM)
def test_deeplift_of_captum_loses_what_overlapping_windows_share() -> None:
    """Of a maximum that two windows have, captum keeps one: contributions miss some of the score."""
    model = small(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(6 * 12, 8), nn.ReLU(), nn.Linear(8, 4))
    x = inputs(2, 3, 10, 8)
    at = model[0](x).detach()
    head = model[1:]
    deeplift = DeepLift(head)
    theirs = deeplift.attribute(at, torch.zeros_like(at), [1, 3])
    differences = (head(at) - head(torch.zeros_like(at)))[range(2), [1, 3]].detach()
    assert ((theirs.sum((1, 2, 3)) - differences).abs() > 0.01 * differences.abs()).all()
    # camkit's contributions are complete, or it would warn, which is an error here.
    assert camkit.LIFTCAM(model, "0")(x, [1, 3]).maps.any()


def positive_rules(model: nn.Module) -> nn.Module:
    """captum's alpha-1-beta-0 rule for every layer with weights, without their biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
        elif isinstance(module, nn.BatchNorm2d):
            module.rule = IdentityRule()
    return model


def logits(*classes: int) -> Callable[[Tensor], Tensor]:
    """A target of which relevance starts with one at each image's class and nothing elsewhere."""
    return lambda y: y[range(len(classes)), classes]


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize("pooling", [30, 16])
def test_relevance_cam_is_lrp_of_captum(pooling: int) -> None:
    """At the input of a pooling of VGG16; captum's relevance starts with the logit."""
    model, x, target = network("vgg16"), inputs(*SHAPES["vgg16"]), logits(3, 8)
    at = activation(model, pooling - 1, x)
    layer = LayerLRP(positive_rules(model), model.get_submodule(f"features.{pooling}"))
    relevance = layer.attribute(x.clone(), [3, 8], attribute_to_layer_input=True)
    relevance = relevance / target(model(x)).reshape(2, 1, 1, 1)
    ours = camkit.RelevanceCAM(model, f"features.{pooling - 1}")(x, target).maps
    close(ours, by_weights(relevance.mean((2, 3)), at), 1e-6)  # it adds an epsilon to each denominator


@pytest.mark.filterwarnings(*CAPTUM)
def test_relevance_cam_of_a_class_is_lrp_of_captum_from_that_class_against_the_others() -> None:
    """LRP is linear in the relevance at its start: -1/C for each class, and 1 for the explained one."""
    model, x, after = network("vgg16"), inputs(*SHAPES["vgg16"]), 29
    at, head = activation(model, after, x), Head(model, after)
    relevance = torch.zeros_like(at)
    for c in range(10):
        each = LRP(positive_rules(head)).attribute(at.clone(), c).detach()
        start = torch.tensor([1 if c == chosen else -1 / 10 for chosen in (3, 8)], dtype=torch.float64)
        relevance += (start / head(at)[:, c]).reshape(2, 1, 1, 1) * each
    ours = camkit.RelevanceCAM(model, f"features.{after}")(x, [3, 8]).maps
    close(ours, by_weights(relevance.mean((2, 3)), at), 1e-6)


class Block(nn.Module):
    """A residual block and a head, of modules that captum has rules for."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(6)
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), norm, nn.ReLU())
        self.sum, self.pool, self.fc = Addition_Module(), nn.AvgPool2d(2), nn.Linear(6 * 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.sum(x, self.body(x))).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings(*CAPTUM)
def test_relevance_cam_of_sums_is_lrp_of_captum() -> None:
    """With a residual sum, and with a normalisation that hands relevance on."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), Block()).double().eval()
    x, target = inputs(2, 3, 10, 8), logits(2, 0)
    at = model[0](x).detach()
    relevance = LRP(positive_rules(model[1])).attribute(at.clone(), [2, 0])
    relevance = relevance / target(model(x)).reshape(2, 1, 1, 1)
    expected = by_weights(relevance.mean((2, 3)), at)
    close(camkit.RelevanceCAM(model, "0")(x, target).maps, expected, 1e-6)


class Shallow(nn.Module):
    """A convolution, a ReLU and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Linear(120, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings(*CAPTUM)
def test_relevance_cam_of_negative_activations_is_lrp_of_captum() -> None:
    """captum's rule is for positive inputs: a negative one becomes positive with the opposite weight."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Shallow(6)).double().eval()
    x, target = inputs(2, 3, 10, 8), logits(2, 0)
    at = model[0](x).detach()
    weights = model[1].state_dict()
    weights["conv.weight"] = torch.cat([weights["conv.weight"], -weights["conv.weight"]], 1)
    doubled = Shallow(12).double()
    doubled.load_state_dict(weights)
    parts = torch.cat([at.relu(), (-at).relu()], 1)
    torch.testing.assert_close(doubled(parts), model(x))
    relevance = LRP(positive_rules(doubled)).attribute(parts, [2, 0]) / target(model(x)).reshape(2, 1, 1, 1)
    expected = by_weights((relevance[:, :6] + relevance[:, 6:]).mean((2, 3)), at)
    close(camkit.RelevanceCAM(model, "0")(x, target).maps, expected, 1e-6)
