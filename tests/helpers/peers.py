"""Networks, inputs and comparisons for the tests against other libraries, the peers."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

import camkit
from helpers.families import build

# Peers add an epsilon to denominators. Scores are multiplied by this number, to make the epsilon negligible.
SCALE = 1e6

SHAPES = {"resnet18": (2, 3, 64, 96), "vgg16": (2, 3, 48, 64), "alexnet": (2, 3, 64, 96)}

Targets = list[Callable[[Tensor], Tensor]]


@cache
def network(name: str) -> nn.Module:
    """A torchvision network in float64, with fixed parameters and no in-place ReLU.

    AlexNet and VGG16 get a small classifier with ten classes.
    """
    with torch.random.fork_rng():  # the weights do not depend on which test calls first
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
    """A small network in float64: features that end in a ReLU, so that some are zero, then the head."""
    features = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(5, channels, 3, padding=1), nn.ReLU()
    )
    return nn.Sequential(features, *head).double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Asserts that maps agree up to a fraction of the largest magnitude in the peer's map of each image.

    Fails if the peer's map of an image is zero everywhere.
    """
    assert ours.shape == theirs.shape
    largest = theirs.abs().flatten(1).amax(1)
    assert (largest > 0).all()
    off = (ours - theirs).abs().flatten(1).amax(1) / largest
    assert (off <= tolerance).all(), f"off by {off.tolist()}"


def scaled(classes: list[int]) -> tuple[Targets, Callable[[Tensor], Tensor]]:
    """Targets, for the peer and for camkit, whose score is SCALE times the logit of one class per image."""
    theirs: Targets = [lambda y, c=c: SCALE * y[c] for c in classes]  # type: ignore[misc]
    return theirs, lambda y: SCALE * y[range(len(classes)), classes]


@cache
def case(name: str, layer: str) -> tuple[nn.Module, Tensor, list[int]]:
    """A network, two images, and for each image the class with the largest Grad-CAM at the layer."""
    model, x = network(name), inputs(*SHAPES[name])
    maps = camkit.GradCAM(model, layer)(x, [list(range(8))] * 2).maps
    return model, x, maps.amax((2, 3)).argmax(1).tolist()


LAYERS = [("resnet18", "layer4"), ("resnet18", "layer3.0.conv1"), ("vgg16", "features.29")]
