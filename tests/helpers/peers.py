"""Networks, inputs and comparisons for tests against other libraries."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

import camkit
from helpers.families import build

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
