"""Where pytorch-grad-cam, captum and torchcam are right, camkit agrees with them, up to their rescaling.

Where a peer departs from the paper, a comment says how, and the test chooses the case in which it does not.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LRP, DeepLift, GuidedBackprop, GuidedGradCam, LayerLRP
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, IdentityRule
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import camkit
from helpers.families import build

# captum says that it hooks modules, and that it wants a gradient of the input.
CAPTUM = (
    "ignore:Setting:UserWarning",
    "ignore:Input Tensor 0 did not already require gradients:UserWarning",
)
# Peers add an epsilon to denominators, which is next to nothing where scores are large.
SCALE = 1e6

SHAPES = {"resnet18": (2, 3, 64, 96), "vgg16": (2, 3, 48, 64), "alexnet": (2, 3, 64, 96)}

Targets = list[Callable[[Tensor], Tensor]]


@cache
def network(name: str) -> nn.Module:
    """A torchvision network in float64, its parameters fixed, out of place; classifiers with ten classes."""
    with torch.random.fork_rng():  # the same whichever test is the first to ask
        torch.manual_seed(0)
        model = build(name).requires_grad_(False)
        if name in ("vgg16", "alexnet"):
            size = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
            layers = nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
            model.classifier = nn.Sequential(*layers).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.double()


def small(*head: nn.Module, stride: int = 1, channels: int = 6) -> nn.Sequential:
    """A small network in float64: features that end in a ReLU and hold zeros, then the head."""
    features = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(5, channels, 3, padding=1), nn.ReLU()
    )
    return nn.Sequential(features, *head).double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Up to a fraction of the largest magnitude of an image's map, which is not zero."""
    assert ours.shape == theirs.shape
    largest = theirs.abs().flatten(1).amax(1)
    assert (largest > 0).all()
    off = (ours - theirs).abs().flatten(1).amax(1) / largest
    assert (off <= tolerance).all(), f"off by {off.tolist()}"


def by_largest(maps: Tensor) -> Tensor:
    return maps / maps.amax((1, 2), keepdim=True)


def up_to_sign(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    signs = (ours * theirs).flatten(1).sum(1).sign()[:, None, None]
    close(ours, theirs * signs, tolerance)


def peer(kind: Any, model: nn.Module, layer: str, x: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """pytorch-grad-cam's own call: its map before it is cut off at zero, resized and scaled, and after."""
    kept: list[Any] = []
    with kind(model, [model.get_submodule(layer)]) as cam:
        its_own = cam.get_cam_image

        def get_cam_image(*args: Any) -> Any:
            kept.append(its_own(*args))
            return kept[-1]

        cam.get_cam_image = get_cam_image
        final = cam(x.clone().requires_grad_(), targets)
    (raw,) = kept
    return torch.as_tensor(raw).double(), torch.as_tensor(final).double()


def scaled(classes: list[int]) -> tuple[Targets, Callable[[Tensor], Tensor]]:
    """The scores of one class per image, times SCALE, for the peer and for camkit."""
    theirs: Targets = [lambda y, c=c: SCALE * y[c] for c in classes]  # type: ignore[misc]
    return theirs, lambda y: SCALE * y[range(len(classes)), classes]


@cache
def case(name: str, layer: str) -> tuple[nn.Module, Tensor, list[int]]:
    """A network, two images, and for each a class whose map at the layer is not zero everywhere."""
    model, x = network(name), inputs(*SHAPES[name])
    maps = camkit.GradCAM(model, layer)(x, [list(range(8))] * 2).maps
    return model, x, maps.amax((2, 3)).argmax(1).tolist()


LAYERS = [("resnet18", "layer4"), ("resnet18", "layer3.0.conv1"), ("vgg16", "features.29")]


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM", "XGradCAM", "LayerCAM", "GradCAMPlusPlus"])
def test_gradient_methods_of_pytorch_grad_cam(method: str, name: str, layer: str) -> None:
    model, x, classes = case(name, layer)
    theirs, ours = scaled(classes)
    raw, final = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    explained = getattr(camkit, method)(model, layer)(x, ours)
    # Only XGradCAM and GradCAMPlusPlus add an epsilon.
    tolerance = {"XGradCAM": 1e-5, "GradCAMPlusPlus": 1e-5}.get(method, 1e-12)
    close(explained.maps, raw if method == "HiResCAM" else raw.relu(), tolerance)
    if method != "HiResCAM":  # which it cuts off at zero before it scales
        close(explained.heatmaps(), final, 1e-4 if tolerance > 1e-12 else 1e-6)


def test_hirescams_positive_part_is_pytorch_grad_cams_picture() -> None:
    model, x, classes = case("vgg16", "features.29")
    theirs, ours = scaled(classes)
    _, final = peer(pytorch_grad_cam.HiResCAM, model, "features.29", x, theirs)
    maps = camkit.HiResCAM(model, "features.29")(x, ours).maps.relu()
    resized = F.interpolate(maps[:, None], x.shape[2:], mode="bilinear")[:, 0]
    close(camkit.normalize(resized), final, 1e-6)


class Centred(nn.Module):
    """Each channel less its mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("method", "layer"), [("EigenCAM", "layer4"), ("EigenCAM", "layer1"), ("EigenGradCAM", "layer4")]
)
def test_eigen_methods_of_pytorch_grad_cam(method: str, layer: str) -> None:
    """pytorch-grad-cam centres each channel, as Eigen-CAM's paper does not, and leaves the sign open.

    Of centred channels both have the same directions, and so have they of centred channels times a gradient
    that is the same everywhere. There are more channels than positions in layer4, and fewer in layer1.
    """
    model = copy.deepcopy(network("resnet18"))
    setattr(model, layer, nn.Sequential(model.get_submodule(layer), Centred()))
    x = inputs(*SHAPES["resnet18"])
    theirs, ours = scaled([3, 8])
    raw, _ = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    up_to_sign(getattr(camkit, method)(model, layer)(x, ours).maps, raw, 1e-6)  # it gives float32
    model = network("resnet18")
    raw, _ = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    with pytest.raises(AssertionError, match="off by"):
        up_to_sign(getattr(camkit, method)(model, layer)(x, ours).maps, raw, 0.1)


@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_kpca_cam_of_pytorch_grad_cam(name: str, layer: str) -> None:
    """The same up to the sign, which pytorch-grad-cam leaves open."""
    model, x, classes = case(name, layer)
    raw, _ = peer(pytorch_grad_cam.KPCA_CAM, model, layer, x, scaled(classes)[0])
    up_to_sign(camkit.KPCACAM(model, layer)(x, classes).maps, raw, 1e-6)  # it gives float32


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_kpca_cam_of_pytorch_grad_cam_with_a_gamma(gamma: float) -> None:
    def kind(*args: Any) -> Any:
        return pytorch_grad_cam.KPCA_CAM(*args, gamma=gamma)

    model, x = network("vgg16"), inputs(*SHAPES["vgg16"])
    raw, _ = peer(kind, model, "features.21", x, scaled([3, 8])[0])
    up_to_sign(camkit.KPCACAM(model, "features.21", gamma=gamma)(x).maps, raw, 1e-6)


@pytest.mark.parametrize("head", [nn.Tanh(), nn.SiLU(), nn.Softplus()], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("rest", [False, True], ids=["logit", "ReST"])
def test_shapley_cam_of_pytorch_grad_cam(head: nn.Module, rest: bool) -> None:
    """With a smooth head, and with the paper's own target: logit less cross-entropy."""
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), head, nn.Linear(8, 4))
    x, classes = inputs(3, 3, 10, 8), [0, 2, 3]
    theirs, ours = scaled(classes)
    if rest:
        theirs = [ClassifierOutputReST(c) for c in classes]

        def ours(y: Tensor) -> Tensor:
            chosen = torch.tensor(classes)
            return y[range(3), classes] - F.cross_entropy(y, chosen, reduction="none")

    raw, _ = peer(pytorch_grad_cam.ShapleyCAM, model, "0", x, theirs)
    maps = camkit.ShapleyCAM(model, "0")(x, ours).maps
    close(maps, raw.relu(), 1e-12)
    with pytest.raises(AssertionError, match="off by"):  # there is a curvature to correct for
        close(camkit.GradCAM(model, "0")(x, ours).maps, raw.relu(), 1e-3)


def test_ablation_cam_of_pytorch_grad_cam() -> None:
    """Where the smallest activation is zero; pytorch-grad-cam puts -1e7 for a channel where it is not."""
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), nn.ReLU(), nn.Linear(8, 4))
    x = inputs(3, 3, 10, 8)
    classes = camkit.AblationCAM(model, "0")(x, [[0, 1, 2, 3]] * 3).maps.amax((2, 3)).argmax(1).tolist()
    raw, final = peer(pytorch_grad_cam.AblationCAM, model, "0", x, [lambda y, c=c: y[c] for c in classes])  # type: ignore[misc]
    explained = camkit.AblationCAM(model, "0")(x, classes)
    close(explained.maps, raw.relu(), 1e-5)  # its scores are float32
    close(explained.heatmaps(), final, 1e-4)


def test_score_cam_of_pytorch_grad_cam() -> None:
    """pytorch-grad-cam takes a softmax of the scores over the channels.

    Of scores that are logarithms of p it is p by its sum, so that maps are proportional. And it lets corners
    meet when it resizes, so that the layer has the input's resolution here.
    """
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), nn.ReLU(), nn.Linear(8, 4))
    x, classes = inputs(2, 3, 10, 8), [1, 3]
    theirs: Targets = [lambda y, c=c: y.log_softmax(0)[c] for c in classes]  # type: ignore[misc]
    raw, final = peer(pytorch_grad_cam.ScoreCAM, model, "0", x, theirs)
    explained = camkit.ScoreCAM(model, "0")(x, classes)
    close(by_largest(explained.maps), by_largest(raw.relu()), 1e-6)
    close(explained.heatmaps(), final, 1e-6)


def test_fullgrad_of_pytorch_grad_cam(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-grad-cam scales every channel for itself, the authors' program and camkit a layer's together.

    Here it has to scale them together too; gradients, biases and sums are its own.
    """

    def together(products: Any, size: tuple[int, int]) -> Any:
        maps = torch.as_tensor(products)
        low, high = (f((1, 2, 3), keepdim=True) for f in (maps.amin, maps.amax))
        return F.interpolate((maps - low) / (high - low), size[::-1], mode="bilinear").numpy()

    model, x = network("resnet18"), inputs(*SHAPES["resnet18"])
    theirs, ours = scaled([3, 8])
    explained = camkit.FullGrad(model)(x, ours)
    with pytorch_grad_cam.FullGrad(model, []) as cam:
        apart = torch.as_tensor(cam(x, theirs)).double()
        monkeypatch.setattr(pytorch_grad_cam.fullgrad_cam, "scale_accross_batch_and_channels", together)
        close(explained.heatmaps(), torch.as_tensor(cam(x, theirs)).double(), 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        close(explained.heatmaps(), apart, 1e-2)


def test_fem_as_the_paper_has_it() -> None:
    """Fuad et al. sum the binary maps of what is strong, weighed by the channels' means.

    pytorch-grad-cam's FEM sums the activation instead, weighed by the share of positions that are strong: it
    is another map.
    """
    model, x = network("vgg16"), inputs(*SHAPES["vgg16"])
    features = model.get_submodule("features.21")
    kept: list[Tensor] = []
    handle = features.register_forward_hook(lambda module, args, out: kept.append(out))
    model(x)
    handle.remove()
    expected = torch.zeros(2, *kept[0].shape[2:], dtype=torch.float64)
    for image, result in zip(kept[0], expected, strict=True):
        for channel in image:
            values = channel.flatten().tolist()
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            for i, row in enumerate(channel.tolist()):
                for j, value in enumerate(row):
                    result[i, j] += mean if value >= mean + 2 * deviation else 0
    maps = camkit.FEM(model, "features.21")(x).maps
    close(maps, expected, 1e-12)
    raw, _ = peer(pytorch_grad_cam.FEM, model, "features.21", x, scaled([0, 0])[0])
    shares = torch.stack(
        [(a > a.mean() + 2 * a.std(correction=0)).double().mean() for a in kept[0].flatten(0, 1)]
    )
    close((shares.reshape(2, -1, 1, 1) * kept[0]).sum(1), raw, 1e-12)
    with pytest.raises(AssertionError, match="off by"):
        close(camkit.normalize(maps), camkit.normalize(raw), 0.1)


@pytest.mark.parametrize("method", ["GradCAM", "XGradCAM", "LayerCAM"])
@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_gradient_methods_of_torchcam(method: str, name: str, layer: str) -> None:
    """Its GradCAMpp sums g^3 A where the paper has g^3 times the sum of A, and then divides a copy."""
    model, x, classes = case(name, layer)
    with getattr(torchcam.methods, method)(model, layer) as cam:
        output = model(x.clone().requires_grad_())
        (theirs,) = cam(classes, SCALE * output, normalized=False)
    ours = getattr(camkit, method)(model, layer)(x, scaled(classes)[1]).maps
    close(ours, theirs, 1e-6 if method == "XGradCAM" else 1e-12)  # which adds an epsilon


def test_cam_of_torchcam() -> None:
    model, x = network("resnet18"), inputs(*SHAPES["resnet18"])
    with torchcam.methods.CAM(model, "layer4", "fc") as cam:
        model(x)
        (theirs,) = cam([3, 8], normalized=False)
    close(camkit.CAM(model)(x, [3, 8]).maps, theirs, 1e-12)


def test_score_cam_of_torchcam() -> None:
    """torchcam takes a softmax of the differences to the score of the input over the channels.

    Of logarithms of p it is p by its sum, so that maps are proportional. And it scales the activation to
    [0, 1] before it resizes, not after it; where each side is three times as long both are the same.
    """
    model = small(nn.Flatten(), nn.Linear(7 * 32, 8), nn.ReLU(), nn.Linear(8, 4), stride=3, channels=7)
    x, classes = inputs(2, 3, 24, 12), [1, 3]
    targets: Any = [lambda y, c=c: y.log_softmax(0)[c] for c in classes]
    with torchcam.methods.ScoreCAM(model, "0") as cam, torch.no_grad():
        model(x)
        (theirs,) = cam(targets=targets, normalized=False)
    close(by_largest(camkit.ScoreCAM(model, "0")(x, classes).maps), by_largest(theirs), 1e-8)


def test_legrad_of_torchcam() -> None:
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    x, classes = inputs(2, 3, 32, 32), [1, 4]
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    with torchcam.methods.LeGrad(model, list(blocks)) as cam:
        model(x)
        (theirs,) = cam(classes, normalized=False)
    close(camkit.LeGrad(model)(x, classes).maps, theirs, 1e-12)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_guided_backpropagation_of_captum(name: str) -> None:
    model, x = network(name), inputs(*SHAPES[name])
    theirs = GuidedBackprop(model).attribute(x.clone(), [3, 8])
    close(camkit.guided_backprop(model, x, [3, 8]), theirs, 1e-12)


def test_guided_backpropagation_of_pytorch_grad_cam() -> None:
    model, x = copy.deepcopy(network("vgg16")), inputs(*SHAPES["vgg16"])
    ours = camkit.guided_backprop(model, x, [3, 8])
    guided = pytorch_grad_cam.GuidedBackpropReLUModel(model)
    theirs = [guided(x[n : n + 1].clone(), c) for n, c in enumerate([3, 8])]
    close(ours, torch.stack([torch.as_tensor(each).permute(2, 0, 1) for each in theirs]), 1e-12)


@pytest.mark.filterwarnings(*CAPTUM)
@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_guided_grad_cam_of_captum(name: str, layer: str) -> None:
    """captum keeps the channels of the input apart."""
    model, x, classes = case(name, layer)
    guided = GuidedGradCam(model, model.get_submodule(layer))
    theirs = guided.attribute(x.clone(), classes, interpolate_mode="bilinear").sum(1)
    close(camkit.GuidedGradCAM(model, layer)(x, classes).maps, theirs, 1e-12)


class Copy(nn.Module):
    """captum's rule for a pooling, unlike camkit's, is lost where it pools what a ReLU module has just given.

    Its hook that keeps what arrives at the ReLU comes before the one with the pooling's rule.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Head(nn.Module):
    """What follows one of the features, with copies after the ReLUs."""

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
    """LRP is linear in what it starts with: -1/C for each class, and 1 for the explained one."""
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
    """captum's rule is for what is positive: a negative number is a positive one with the opposite weight."""
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
