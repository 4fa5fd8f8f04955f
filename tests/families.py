"""torchvision's classification families, and tiny networks of every kind of head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)


class Family(NamedTuple):
    """One model of a family: where its features end, their shape at 224, and whether CAM needs surgery."""

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
    Family("vit_b_32", "encoder", 768, (7, 7), False, "__getitem__", fixed_size=True),
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
            elif key.endswith("weight"):  # of a norm
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
    """torchvision's own initialisation takes minutes over all models, and leaves ViT's head at zero."""
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_"):
                patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield


def images(family: Family, count: int = 2) -> Tensor:
    """A batch of noise, as small as the family takes it."""
    size = (224, 224) if family.fixed_size else (96, 80)
    return torch.randn(count, 3, *size)


class Plain(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, pooling in the middle, GAP, linear."""

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
    """Ends in a sum that is made in place over a layer's output, then an in-place ReLU; two linear layers."""

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
    """Two branches concatenated; a functional ReLU between the last module and the pooling."""

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
    """Features in NHWC, as Swin's, with a LayerNorm, pooled over the middle dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.patches(x).permute(0, 2, 3, 1))
        return self.head(y.mean((1, 2)))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A small ViT with a class token: one attention block, a norm, a head that reads the class token."""

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
    """The classic: convolutions, functional pooling, flatten, two linear layers; only one input size."""

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
    """A residual block of convolutions, BatchNorms and ReLUs alone: what relevance has rules for."""

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
    """One block of a transformer."""

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
    """Two blocks, a class token before the patches and a register after them."""

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
    """A tiny network, one input's shape, and the layer that Grad-CAM looks at."""

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
    """A tiny network in float64 and evaluation mode, its normalisation layers not the identity."""
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1)
            nn.init.normal_(module.bias)
    return model
