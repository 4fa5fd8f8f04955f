"""The modules of a model, for what looks at all of them at each call: torch's own walk makes names too."""

from collections.abc import Iterator

import torch
from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, in the order of ``model.modules()``."""
    found: dict[nn.Module, None] = {}
    _walk(model, found)
    return list(found)


def state_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer of a model; one that several modules share comes several times."""
    for module in modules_of(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _walk(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            _walk(child, found)
