"""Every method of the registry, made so that it runs quickly."""

from typing import Any

import torch
from torch import Tensor, nn

import camkit
from helpers.families import NARROW, Plain, Transformer

FEW: dict[str, dict[str, Any]] = {
    "SmoothGradCAMPlusPlus": {"samples": 2},
    "SSCAM": {"samples": 2},
    "ISCAM": {"samples": 2},
}
# These run the model, or the part after the layer, once for each channel.
A_PASS_A_CHANNEL = ("ScoreCAM", "SSCAM", "ISCAM", "AblationCAM", "PolyCAM")


def make(name: str, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method: Any = camkit.METHODS[name]
    return method(model, *args, **FEW.get(name, {}), **kwargs)


# For each method a family that it explains.
FITTING = {name: "vit_b_32" if name == "LeGrad" else "mobilenet_v2" for name in camkit.METHODS}


def explainer(name: str, family: str, model: nn.Module) -> Any:
    """A method for a narrow member of a family, with few passes, each of few images."""
    if name in A_PASS_A_CHANNEL:
        return make(name, model, NARROW[family].layer, chunk_size=8)
    return make(name, model)


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {Plain: (3, 12, 10), Transformer: (3, 16, 12)}


def network(name: str) -> type[nn.Module]:
    """A tiny network that a method explains."""
    return Transformer if name == "LeGrad" else Plain


def images(name: str, count: int, seed: int = 0) -> Tensor:
    """A batch for the tiny network of a method, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPES[network(name)], generator=generator).double()
