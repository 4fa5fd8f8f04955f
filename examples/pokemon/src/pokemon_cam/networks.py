"""The three networks: either the paper's, with published weights, or small relatives of them.

Each network is created by a *builder*, a function that takes the number of classes and the networks
trained before it. A run calls the builders one after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import camkit
from torch import Tensor, nn
from torchvision.models import WeightsEnum, alexnet, vgg16, vgg19
from torchvision.models.vgg import make_layers

from pokemon_cam import recipes
from pokemon_cam.recipes import Recipe
from pokemon_cam.weights import PUBLISHED, StateDict, build_with_weights

PAPER_SIZE = 224
"""Height and width of the pictures for the paper's networks, in pixels."""

SMALL_SIZE = 112
"""Default height and width of the pictures for the small networks, in pixels."""


@dataclass(frozen=True)
class Network:
    """A network, its training recipe and its explainer; one row of the report's tables.

    Attributes:
        name: the paper's name of the network.
        description: the architecture and the weights it starts from.
        image_size: height and width of its pictures, in pixels.
        model: maps normalised pictures ``(N, 3, H, W)`` to logits ``(N, K)``.
        explain: explains the predicted class of each picture in a normalised batch.
        recipe: how the network is trained.
    """

    name: str
    description: str
    image_size: int
    model: nn.Module
    explain: Callable[[Tensor], camkit.Explanation]
    recipe: Recipe

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


Builder = Callable[[int, Mapping[str, Network]], Network]
"""Creates a network, given the number of classes and the networks trained so far, by name."""


# --- the paper's networks, with published weights ---


def paper_networks(load: Callable[[WeightsEnum], StateDict]) -> dict[str, Builder]:
    """Return builders of the paper's networks, which are trained by the paper's recipe.

    Args:
        load: returns the state dict of published weights, or raises ``ValueError``.

    Returns:
        The builder of each network, by the network's name.
    """

    def build_cam(
        name: str, make: Callable[..., nn.Module], num_classes: int, trained: Mapping[str, Network]
    ) -> Network:
        weights = PUBLISHED[name]
        model = build_with_weights(make, load(weights), weights)
        text = f"{make.__name__} features (ImageNet weights, frozen) + GAP + linear"
        return _cam_network(
            name, text, model, num_classes, PAPER_SIZE, recipes.PAPER, freeze_features=True
        )

    def build_vgg19(num_classes: int, trained: Mapping[str, Network]) -> Network:
        weights = PUBLISHED["VGG19-Grad-CAM"]
        model = build_with_weights(vgg19, load(weights), weights)
        # Only the last layer of the head is new; it has one output per class instead of 1,000.
        model.set_submodule("classifier.6", nn.Linear(4096, num_classes))
        text = "vgg19 (ImageNet weights), all of it fine-tuned"
        explain = camkit.GradCAM(model, layer="features.34")
        return Network("VGG19-Grad-CAM", text, PAPER_SIZE, model, explain, recipes.PAPER)

    return {
        "VGG16-CAM": partial(build_cam, "VGG16-CAM", vgg16),
        "AlexNet-CAM": partial(build_cam, "AlexNet-CAM", alexnet),
        "VGG19-Grad-CAM": build_vgg19,
    }


# --- small relatives, trained from scratch ---

# In torchvision's notation: the channels of a 3x3 convolution, or "M" for max pooling.
_SMALL_VGG: tuple[int | str, ...] = (16, 16, "M", 32, 32, "M", 64, 64, 64, "M", 96)
_SMALL_VGG_TEXT = "narrow VGG with batch norm (8 convolutions, 16 to 96 channels)"


def small_networks(image_size: int) -> dict[str, Builder]:
    """Return builders of small relatives, which train in minutes without published weights.

    The relatives have fewer channels than the paper's networks, and use batch norm. They halve the
    resolution only three times, which makes the maps finer.

    Args:
        image_size: height and width of the pictures, in pixels.

    Returns:
        The builder of each network, by the network's name. The builder of VGG19-Grad-CAM needs the
        trained VGG16-CAM.
    """

    def build_cam(
        name: str,
        text: str,
        make_features: Callable[[], nn.Sequential],
        num_classes: int,
        trained: Mapping[str, Network],
    ) -> Network:
        # The head after the features only completes the model; the GAP head replaces it.
        model = _add_vgg_head(make_features(), num_classes)
        text += " + GAP + linear, all from scratch"
        return _cam_network(
            name, text, model, num_classes, image_size, recipes.FROM_SCRATCH, freeze_features=False
        )

    def build_vgg19(num_classes: int, trained: Mapping[str, Network]) -> Network:
        features = _small_vgg_features()
        model = _add_vgg_head(features, num_classes)
        # The paper fine-tunes trained features, so this network starts from those of VGG16-CAM.
        # Features trained from scratch under this head may recognise a class by a part that is
        # absent, and the map then points elsewhere.
        source = trained["VGG16-CAM"].model.get_submodule("trunk.features")
        features.load_state_dict(source.state_dict())
        text = (
            f"{_SMALL_VGG_TEXT} + 3 fully connected layers, "
            "features from the VGG16-CAM above, all fine-tuned"
        )
        # Explain the ReLU at the end of the last block, not its convolution. The batch norm between
        # them shifts the values, and a map of the convolution's output would miss that shift.
        explain = camkit.GradCAM(model, layer=f"features.{len(features) - 1}")
        return Network("VGG19-Grad-CAM", text, image_size, model, explain, recipes.FINE_TUNING)

    alexnet_text = "narrow AlexNet with batch norm (5 convolutions, 32 to 128 channels)"
    return {
        "VGG16-CAM": partial(build_cam, "VGG16-CAM", _SMALL_VGG_TEXT, _small_vgg_features),
        "AlexNet-CAM": partial(build_cam, "AlexNet-CAM", alexnet_text, _small_alexnet_features),
        "VGG19-Grad-CAM": build_vgg19,
    }


def _small_vgg_features() -> nn.Sequential:
    features: nn.Sequential = make_layers(list(_SMALL_VGG), batch_norm=True)
    return features


def _small_alexnet_features() -> nn.Sequential:
    """AlexNet's five convolutions with fewer channels, smaller stride and no last pooling."""

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


def _add_vgg_head(features: nn.Sequential, num_classes: int) -> nn.Sequential:
    """Initialise the features and add a head like VGG's: pooling and three linear layers."""
    convolutions = [module for module in features if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    side = 2  # VGG pools to 7x7; a smaller grid keeps the first linear layer small.
    head = nn.Sequential(
        nn.Linear(convolutions[-1].out_channels * side * side, 256),
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


# --- both ---


def _cam_network(
    name: str,
    description: str,
    model: nn.Module,
    num_classes: int,
    image_size: int,
    recipe: Recipe,
    *,
    freeze_features: bool,
) -> Network:
    """Replace the head of a model by global average pooling (GAP) and one linear layer."""
    net = camkit.attach_gap_head(
        model,
        num_classes,
        layer="features",
        input_shape=(3, image_size, image_size),
        freeze=freeze_features,
    )
    return Network(name, description, image_size, net, camkit.CAM(net), recipe)
