"""The modules of a model. torch's own walk makes their names too, and takes longer than a small network's layer."""

from collections.abc import Iterator

import torch
from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, in the order of ``model.modules()``."""
    found: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        found[module] = None
        for child in module._modules.values():
            if child is not None and child not in found:
                walk(child)

    walk(model)
    return list(found)


def state_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer of a model; one that several modules share comes several times."""
    for module in modules_of(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
