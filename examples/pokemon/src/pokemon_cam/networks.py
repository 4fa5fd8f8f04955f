"""The three networks of the paper, with published weights or as smaller relatives from scratch."""

from __future__ import annotations

import http.client
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import camkit
import torch
from torch import Tensor, nn
from torchvision.models import (
    AlexNet_Weights,
    VGG16_Weights,
    VGG19_Weights,
    WeightsEnum,
    alexnet,
    vgg16,
    vgg19,
)
from torchvision.models.vgg import make_layers

PAPER_SIZE = 224
SCRATCH_SIZE = 112


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        text: the recipe in words, for the report.
        epochs: passes over the training pictures.
        batch_size: pictures per step.
        optimizer: makes the optimiser of the given parameters.
        rate: factor on the learning rate, by the epochs done so far (a fraction) and their number.
        label_smoothing: share of the target's probability that is spread over all classes.
        augment: changes a batch ``(N, 3, H, W)`` of normalised training pictures.
    """

    text: str
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate: Callable[[float, int], float]
    label_smoothing: float
    augment: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """One row of the table: a network, how it is trained and how it is explained.

    Attributes:
        name: the paper's name of the row.
        description: what the network really is.
        image_size: height and width of its pictures, in pixels.
        model: maps normalised pictures ``(N, 3, H, W)`` to logits ``(N, K)``.
        explain: explains the predicted class of a batch of normalised pictures.
        recipe: how it is trained.
    """

    name: str
    description: str
    image_size: int
    model: nn.Module
    explain: Callable[[Tensor], camkit.Explanation]
    recipe: Recipe

    @property
    def parameters(self) -> int:
        """Number of all its parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of its parameters that training changes."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


# A builder makes one network for a number of classes; it is given the rows before it, trained.
Builder = Callable[[int, Mapping[str, "Network"]], Network]
StateDict = Mapping[str, Any]


def _steps(epoch: float, epochs: int) -> float:
    return float(0.1 ** (int(epoch) // 7))


def _one_cycle(epoch: float, epochs: int) -> float:
    warm_up = 0.3 * epochs
    if epoch < warm_up:
        return 0.04 + 0.96 * epoch / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _mirrored(x: Tensor) -> Tensor:
    """Half of the pictures, by chance, mirrored left to right."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(3), x)


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def _adamw(
    rate: float,
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)


# The paper gives no step; 7 epochs and 0.1 are what usually go with its other numbers.
_PAPER = Recipe(
    "SGD, learning rate 0.001 times 0.1 every 7 epochs, momentum 0.9",
    epochs=10,
    batch_size=1,
    optimizer=_sgd,
    rate=_steps,
    label_smoothing=0.0,
    augment=_unchanged,
)
# Without smoothing the networks grow sure, and their maps' maxima stray off the creature.
_SCRATCH = Recipe(
    "AdamW, learning rate 0.003 in one cycle, weight decay 0.01, label smoothing 0.1, "
    "mirrored at random",
    epochs=6,
    batch_size=32,
    optimizer=_adamw(0.003),
    rate=_one_cycle,
    label_smoothing=0.1,
    augment=_mirrored,
)
_FINE_TUNING = replace(
    _SCRATCH,
    text=_SCRATCH.text.replace("0.003", "0.001"),
    epochs=3,
    optimizer=_adamw(0.001),
)


# --- with published weights: the paper's networks ---


def published(weights: WeightsEnum) -> StateDict:
    """Download published weights, or take them from torch's cache.

    Args:
        weights: which, such as ``VGG16_Weights.DEFAULT``.

    Returns:
        The state dict.

    Raises:
        ValueError: when they cannot be had.
    """
    try:
        state: StateDict = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ValueError(
            f"--weights: expected to download {weights.url}, got {error!r}; "
            "give 'none' to train from scratch, or a folder that holds "
            f"{', '.join(_file_name(w) for w in PUBLISHED.values())}"
        ) from error
    return state


def from_folder(folder: Path, weights: WeightsEnum) -> StateDict:
    """Read published weights from a folder of checkpoint files.

    Args:
        folder: where the files are, under the names they are published with.
        weights: which, such as ``VGG16_Weights.DEFAULT``.

    Returns:
        The state dict.

    Raises:
        ValueError: when the file is not there or is no checkpoint.
    """
    path = folder / _file_name(weights)
    if not path.is_file():
        raise ValueError(
            f"--weights: expected 'default', 'none' or a folder that holds {path.name}, "
            f"got '{folder}'"
        )
    try:
        state: StateDict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--weights: expected a checkpoint, got '{path}': {error}") from error
    return state


def pretrained(load: Callable[[WeightsEnum], StateDict]) -> dict[str, Builder]:
    """The paper's networks, trained by the paper's recipe.

    Args:
        load: gives the state dict of published weights, and raises ``ValueError`` if it cannot.

    Returns:
        For each row's name its builder.
    """

    def cam(name: str, make: Callable[..., nn.Module], weights: WeightsEnum) -> Builder:
        def build(num_classes: int, earlier: Mapping[str, Network]) -> Network:
            model = _with_weights(make, load(weights), weights)
            net = camkit.attach_gap_head(
                model,
                num_classes,
                layer="features",
                input_shape=(3, PAPER_SIZE, PAPER_SIZE),
                freeze=True,
            )
            text = f"{make.__name__} features (ImageNet weights, frozen) + GAP + linear"
            return Network(name, text, PAPER_SIZE, net, camkit.CAM(net), _PAPER)

        return build

    def build_vgg19(num_classes: int, earlier: Mapping[str, Network]) -> Network:
        weights = VGG19_Weights.DEFAULT
        model = _with_weights(vgg19, load(weights), weights)
        model.set_submodule("classifier.6", nn.Linear(4096, num_classes))
        text = "vgg19 (ImageNet weights), all of it fine-tuned"
        explain = camkit.GradCAM(model, layer="features.34")
        return Network("VGG19-Grad-CAM", text, PAPER_SIZE, model, explain, _PAPER)

    return {
        "VGG16-CAM": cam("VGG16-CAM", vgg16, VGG16_Weights.DEFAULT),
        "AlexNet-CAM": cam("AlexNet-CAM", alexnet, AlexNet_Weights.DEFAULT),
        "VGG19-Grad-CAM": build_vgg19,
    }


PUBLISHED: dict[str, WeightsEnum] = {
    "VGG16-CAM": VGG16_Weights.DEFAULT,
    "AlexNet-CAM": AlexNet_Weights.DEFAULT,
    "VGG19-Grad-CAM": VGG19_Weights.DEFAULT,
}
"""The published weights behind each row."""


def _file_name(weights: WeightsEnum) -> str:
    return str(weights.url).rpartition("/")[2]


def _with_weights(
    make: Callable[..., nn.Module], state: StateDict, weights: WeightsEnum
) -> nn.Module:
    with torch.device("meta"):  # no time and memory for values that are replaced at once
        model = make()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"--weights: expected {_file_name(weights)} to fit {make.__name__}, got {error}"
        ) from error
    return model


# --- from scratch: smaller relatives ---


def scratch(image_size: int) -> dict[str, Builder]:
    """Narrow relatives of the paper's networks, trained without published weights in minutes.

    They have batch norm and fewer layers, and their trunks end earlier, for a finer map.

    Args:
        image_size: height and width of the pictures, in pixels.

    Returns:
        For each row's name its builder; the VGG19's needs the trained VGG16-CAM.
    """

    def cam(name: str, text: str, features: nn.Sequential, num_classes: int) -> Network:
        model = _with_connected_head(features, num_classes)
        net = camkit.attach_gap_head(
            model,
            num_classes,
            layer="features",
            input_shape=(3, image_size, image_size),
            freeze=True,
        )
        net.unfreeze()
        text += " + GAP + linear, all from scratch"
        return Network(name, text, image_size, net, camkit.CAM(net), _SCRATCH)

    def build_vgg16(num_classes: int, earlier: Mapping[str, Network]) -> Network:
        features = make_layers(list(_NARROW_VGG), batch_norm=True)
        return cam("VGG16-CAM", f"narrow VGG {_NARROW_TEXT}", features, num_classes)

    def build_alexnet(num_classes: int, earlier: Mapping[str, Network]) -> Network:
        text = "narrow AlexNet with batch norm (5 convolutions, 32 to 96 channels)"
        return cam("AlexNet-CAM", text, _narrow_alexnet(), num_classes)

    def build_vgg19(num_classes: int, earlier: Mapping[str, Network]) -> Network:
        features = make_layers(list(_NARROW_VGG), batch_norm=True)
        model = _with_connected_head(features, num_classes)
        # The paper fine-tunes a trained trunk. Here the first row's is one; a trunk trained under
        # this head alone may tell a class by what is absent, and its map then shows the rest.
        trained = earlier["VGG16-CAM"].model.get_submodule("trunk.features")
        features.load_state_dict(trained.state_dict())
        text = (
            f"narrow VGG {_NARROW_TEXT} + 3 fully connected layers, "
            "features from the VGG16-CAM above, all fine-tuned"
        )
        # At the end of the last block: between its convolution and its ReLU comes a batch norm,
        # whose shift the map of the bare convolution does not know of.
        explain = camkit.GradCAM(model, layer=f"features.{len(features) - 1}")
        return Network("VGG19-Grad-CAM", text, image_size, model, explain, _FINE_TUNING)

    return {
        "VGG16-CAM": build_vgg16,
        "AlexNet-CAM": build_alexnet,
        "VGG19-Grad-CAM": build_vgg19,
    }


_NARROW_VGG: tuple[int | str, ...] = (16, 16, "M", 32, 32, "M", 64, 64, 64, "M", 96)
_NARROW_TEXT = "with batch norm (8 convolutions, 16 to 96 channels)"


def _narrow_alexnet() -> nn.Sequential:
    """AlexNet's five convolutions, narrower, with a smaller stride and without the last pooling."""

    def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, size, stride=stride, padding=2 if size > 3 else 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *convolution(3, 32, 11, 2),
        nn.MaxPool2d(3, 2),
        *convolution(32, 64, 5, 1),
        nn.MaxPool2d(3, 2),
        *convolution(64, 128, 3, 1),
        *convolution(128, 96, 3, 1),
        *convolution(96, 96, 3, 1),
    )


def _with_connected_head(features: nn.Sequential, num_classes: int) -> nn.Sequential:
    """Features with a head like VGG's: pooled to a fixed size, flattened, three linear layers."""
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            channels = module.out_channels
    side = 2
    head = nn.Sequential(
        nn.Linear(channels * side * side, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(256, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(256, num_classes),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=head,
        )
    )
