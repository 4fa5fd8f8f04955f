"""The modules of a model, for what looks at all of them at each call: torch's own walk makes names too."""

from collections.abc import Iterable

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, in the order of ``model.modules()``."""
    found: dict[nn.Module, None] = {}
    _walk(model, found)
    return list(found)


def has_meta(modules: Iterable[nn.Module]) -> bool:
    """Whether a parameter or buffer of these is on the meta device, without numbers."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_meta:
                    return True
    return False


def _walk(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            _walk(child, found)
