"""torchvision's classification families, narrow members of them, and tiny networks with all kinds of head."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.googlenet import InceptionAux as GoogLeNetAux
from torchvision.models.inception import (
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.vgg import make_layers

Network = TypeVar("Network", bound=nn.Module)


class Family(NamedTuple):
    """One model of a family of torchvision.

    Attributes:
        name: its name in torchvision.
        layer: the layer where its features end.
        channels: the number of channels of that layer.
        size: the spatial size of that layer for an image of 224 x 224.
        exact: whether CAM explains the model without head surgery.
        in_the_way: the operation that CAM's error names, if it does not.
        fixed_size: whether the model takes only images of 224 x 224.
    """

    name: str
    layer: str
    channels: int
    size: tuple[int, int]
    exact: bool
    in_the_way: str = ""
    fixed_size: bool = False


FAMILIES = [
    Family("alexnet", "features", 256, (6, 6), False, "adaptive_avg_pool2d"),
    Family("vgg11", "features", 512, (7, 7), False, "adaptive_avg_pool2d"),
    Family("resnet18", "layer4", 512, (7, 7), True),
    Family("densenet121", "features", 1024, (7, 7), True),
    Family("googlenet", "inception5b", 1024, (7, 7), True),
    Family("inception_v3", "Mixed_7c", 2048, (5, 5), True),
    Family("mobilenet_v2", "features", 1280, (7, 7), True),
    Family("mobilenet_v3_small", "features", 576, (7, 7), False, "hardswish"),
    Family("mnasnet0_5", "layers", 1280, (7, 7), True),
    Family("shufflenet_v2_x0_5", "conv5", 1024, (7, 7), True),
    Family("squeezenet1_1", "features", 512, (13, 13), True),
    Family("efficientnet_b0", "features", 1280, (7, 7), True),
    Family("efficientnet_v2_s", "features", 1280, (7, 7), True),
    Family("regnet_y_400mf", "trunk_output", 440, (7, 7), True),
    Family("convnext_tiny", "features", 768, (7, 7), True),
    Family("vit_b_32", "encoder", 768, (7, 7), False, "getitem", fixed_size=True),
    Family("swin_t", "permute", 768, (7, 7), True),
    Family("swin_v2_t", "permute", 768, (7, 7), True),
    Family("maxvit_t", "blocks.3", 512, (7, 7), False, "tanh", fixed_size=True),
]


def build(name: str) -> nn.Module:
    """A torchvision classifier with random weights, none of which are zero, in evaluation mode."""
    own = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with without_initialisation():
        model: nn.Module = torchvision.models.get_model(name, weights=None, **own)
    return randomize(model)


def randomize(model: Network) -> Network:
    """Gives a model random weights, none of which are zero, and puts it in evaluation mode."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                bound = ((6 if parameter.ndim == 4 else 3) / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound)
            elif key.endswith("weight"):  # the weight of a normalisation layer
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.uniform_(-0.2, 0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Skips the initialisation, which takes minutes over all models and leaves the head of ViT at zero."""
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield


def images(family: Family, count: int = 2) -> Tensor:
    """A batch of noise, as small as the family accepts."""
    size = (224, 224) if family.fixed_size else (128, 112) if family.name == "inception_v3" else (96, 80)
    return torch.randn(count, 3, *size)


class Narrow(NamedTuple):
    """A small instance of a family's own class, with few channels and blocks.

    Attributes:
        make: makes the model.
        shape: the shape of one input.
        layer: an early layer with few channels, for the methods that need one pass per channel.
        relus: whether the model uses ReLUs.
        relevance: whether relevance propagation has a rule for every operation after the last spatial layer.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    layer: str
    relus: bool = True
    relevance: bool = True


_models: Any = torchvision.models
CLASSES = 5


class Sixteenth(BasicConv2d):  # type: ignore[misc]
    """The convolution of GoogLeNet and Inception, with a sixteenth of the channels."""

    def __init__(self, before: int, after: int, **kwargs: Any) -> None:
        super().__init__(before if before == 3 else before // 16, after // 16, **kwargs)


def _with_head(model: nn.Module, name: str, *layers: nn.Module) -> nn.Module:
    setattr(model, name, nn.Sequential(*layers) if len(layers) > 1 else layers[0])
    return model


def _classifier(features: int) -> list[nn.Module]:
    """A narrow version of the head of AlexNet and VGG."""
    layers = [nn.Linear(features, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, CLASSES)]
    return [nn.Dropout(), *layers]


def _alexnet() -> nn.Module:
    return _with_head(_models.AlexNet(), "classifier", *_classifier(256 * 6 * 6))


def _vgg() -> nn.Module:
    features = make_layers([4, "M", 6, "M", 8, "M"], batch_norm=True)
    return _with_head(_models.VGG(features, init_weights=False), "classifier", *_classifier(8 * 7 * 7))


def _googlenet() -> nn.Module:
    block = partial(Inception, conv_block=Sixteenth)
    model = _models.GoogLeNet(aux_logits=False, init_weights=False, blocks=[Sixteenth, block, GoogLeNetAux])
    return _with_head(model, "fc", nn.Linear(64, CLASSES))


def _inception() -> nn.Module:
    kinds = [InceptionA, InceptionB, InceptionC, InceptionD]
    blocks = [partial(kind, conv_block=Sixteenth) for kind in (*kinds, InceptionE)]
    model = _models.Inception3(
        aux_logits=False, init_weights=False, inception_blocks=[Sixteenth, *blocks, InceptionAux]
    )
    return _with_head(model, "fc", nn.Linear(128, CLASSES))


def _mobilenet_v3() -> Any:
    block = partial(InvertedResidualConfig, dilation=1, width_mult=0.5)
    blocks = [block(16, 3, 16, 16, True, "RE", 2), block(16, 3, 32, 24, True, "HS", 2)]
    return _models.MobileNetV3(blocks, 16, num_classes=CLASSES)


def _efficientnet() -> Any:
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 8, 2)]
    return _models.EfficientNet(blocks, dropout=0.2, num_classes=CLASSES)


def _efficientnet_v2() -> Any:
    blocks = [FusedMBConvConfig(1, 3, 1, 4, 8, 1), MBConvConfig(2, 3, 2, 8, 8, 2)]
    return _models.EfficientNet(blocks, dropout=0.2, num_classes=CLASSES, last_channel=12)


def _regnet() -> Any:
    params = BlockParams([1, 1], [8, 12], [4, 4], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return _models.RegNet(params, num_classes=CLASSES, stem_width=8)


def _convnext() -> Any:
    blocks = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 2)]
    return _models.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=CLASSES)


def _vit() -> Any:
    return _models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        dropout=0.1, num_classes=CLASSES,
    )  # fmt: skip


def _swin(**kind: Any) -> Any:
    return _models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=[2, 2],
        stochastic_depth_prob=0.2, num_classes=CLASSES, **kind,
    )  # fmt: skip


def _maxvit() -> Any:
    return _models.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[12, 12], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0.2, num_classes=CLASSES,
    )  # fmt: skip


_SWIN_V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
_MOBILENET_V2 = [[1, 8, 1, 1], [2, 12, 2, 2]]
NARROW = {
    "alexnet": Narrow(_alexnet, (3, 96, 80), "features.0"),
    "vgg11": Narrow(_vgg, (3, 32, 24), "features.2"),
    "resnet18": Narrow(
        lambda: _models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), (3, 64, 48), "bn1"
    ),
    "densenet121": Narrow(
        lambda: _models.DenseNet(4, (2, 2, 2, 2), 8, drop_rate=0.1, num_classes=CLASSES),
        (3, 64, 48),
        "features.conv0",
    ),
    "googlenet": Narrow(_googlenet, (3, 64, 48), "conv1"),
    "inception_v3": Narrow(_inception, (3, 80, 96), "Conv2d_1a_3x3"),
    "mobilenet_v2": Narrow(
        lambda: _models.MobileNetV2(CLASSES, 0.5, _MOBILENET_V2, round_nearest=4), (3, 32, 24), "features.1"
    ),
    "mobilenet_v3_small": Narrow(_mobilenet_v3, (3, 32, 24), "features.1"),
    "mnasnet0_5": Narrow(lambda: _models.MNASNet(0.25, CLASSES), (3, 64, 48), "layers.7"),
    "shufflenet_v2_x0_5": Narrow(
        lambda: _models.ShuffleNetV2([1, 1, 1], [4, 8, 12, 16, 20], CLASSES), (3, 40, 32), "conv1"
    ),
    "squeezenet1_1": Narrow(lambda: _models.SqueezeNet("1_1", CLASSES), (3, 40, 32), "features.3.squeeze"),
    "efficientnet_b0": Narrow(_efficientnet, (3, 32, 24), "features.1", relus=False),
    "efficientnet_v2_s": Narrow(_efficientnet_v2, (3, 32, 24), "features.1", relus=False),
    "regnet_y_400mf": Narrow(_regnet, (3, 32, 24), "stem"),
    "convnext_tiny": Narrow(_convnext, (3, 32, 24), "features.0", relus=False, relevance=False),
    "vit_b_32": Narrow(_vit, (3, 32, 32), "encoder.layers.encoder_layer_0", relus=False, relevance=False),
    "swin_t": Narrow(_swin, (3, 32, 48), "features.1", relus=False),
    "swin_v2_t": Narrow(lambda: _swin(**_SWIN_V2), (3, 32, 48), "features.1", relus=False),
    "maxvit_t": Narrow(_maxvit, (3, 32, 32), "stem", relus=False, relevance=False),
}


def narrow(name: str) -> nn.Module:
    """A narrow member of a family, with the same random weights at every call, in evaluation mode."""
    with without_initialisation(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        return randomize(NARROW[name].make())


def write(model: Any, x: Tensor) -> None:
    """Changes two buffers: one in place, and one by assigning another tensor."""
    model.passes += 1
    model.seen = x.detach().amax((0, 2, 3))


def draw(model: Any, x: Tensor) -> None:
    """Draws a random number from Python, from NumPy and from torch."""
    random.random()
    np.random.rand()
    torch.rand(())


def beginning(begin: Callable[[Any, Tensor], None], family: str) -> nn.Module:
    """A narrow model whose forward pass first calls ``begin``, in training and in evaluation mode."""
    model = narrow(family)
    kind: Any = type(model)

    class Own(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            begin(self, x)
            return super().forward(x)

    model.__class__ = Own
    model.register_buffer("passes", torch.zeros(()))
    model.register_buffer("seen", torch.zeros(3), persistent=False)
    return model


class Plain(nn.Module):
    """Two convolutions with in-place ReLUs, BatchNorm, max pooling; global average pooling, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(5, 6, 3),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A residual sum written in place into a layer's output, then an in-place ReLU and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Identity()
        self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.body(x)
        y += x
        y = self.out(F.relu_(y))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Two concatenated branches, with a functional ReLU between the last spatial module and the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 3, 3, padding=1)
        self.right = nn.Conv2d(1, 2, 5, padding=2)
        self.mix = nn.Conv2d(5, 7, 1)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(torch.cat([self.left(x), self.right(x)], 1))
        y = F.relu(y, inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """Features in NHWC like those of Swin, with a LayerNorm, pooled over the two middle dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.patches(x).permute(0, 2, 3, 1))
        return self.head(y.mean((1, 2)))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A small ViT: one attention block, a LayerNorm, and a head that reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm1 = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class Digits(nn.Module):
    """A digit classifier: convolutions, pooling, flatten, two linear layers; it takes only one input size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc1 = nn.Linear(6 * 12 * 12, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))  # type: ignore[no-any-return]


class Skip(nn.Module):
    """A residual network of convolutions, BatchNorm, ReLUs and poolings, which all have a relevance rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Conv2d(4, 5, 3, padding=1, stride=2, bias=False)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.block(x)
        y += x
        y = self.relu(self.last(self.pool(self.relu(y))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block, with the norms before the attention and the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Two transformer blocks, with a class token before the patches and a register token after them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.register = nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x, self.register.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class Tiny(NamedTuple):
    """A tiny network, the shape of one input, and the layer that Grad-CAM explains."""

    model: type[nn.Module]
    shape: tuple[int, int, int]
    layer: str


TINY = [
    Tiny(Plain, (3, 12, 10), "features"),
    Tiny(Residual, (3, 11, 13), "out"),
    Tiny(Branching, (1, 6, 8), "mix"),
    Tiny(ChannelsLast, (3, 16, 12), "norm"),
    Tiny(Tokens, (3, 16, 12), "norm1"),
    Tiny(Digits, (1, 28, 28), "conv2"),
]


def tiny(kind: type[Network]) -> Network:
    """A tiny network in float64 and evaluation mode; its normalisation layers get random parameters."""
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1)
            nn.init.normal_(module.bias)
    return model
