"""The modules of a model: walking over them, their names, and models that are refused."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from camkit._tools import checks


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


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, or itself.

    Raises:
        TypeError: if it is no module, or one of which a part does not run in Python.
        ValueError: if a part has no weights before it has run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(checks.error_message("model", "a torch.nn.Module", type(model).__name__))
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or is_compiled(model):
        model = next(model.children())
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            hint = "explain the module that it was made of"
            got = f"a {type(module).__name__} of torch.jit" + (f" in {name!r}" if name else "")
            raise TypeError(checks.error_message("model", "a module that runs in Python", got, hint))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            got = f"{name!r} of a lazy module that never ran"
            raise ValueError(checks.error_message("model", "weights", got, "a pass, model(x), makes them"))
    return model


def require_floats(model: nn.Module) -> None:
    """Raise a ``TypeError`` if a model has quantized layers, without gradients and open weights."""
    quantized = next((m for m in modules_of(model) if ".quantized" in type(m).__module__), None)
    for name, module in model.named_modules() if quantized is not None else ():
        if module is quantized:
            hint = "camkit.EigenCAM, ScoreCAM and others that look at activations and outputs only explain it"
            got = f"{type(module).__name__} {name!r} of a quantized model"
            raise TypeError(checks.error_message("model", "layers of floats", got, hint))


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """The dotted name of a layer that is given by name or as the module itself.

    Raises:
        ValueError: if the model has no such layer.
        TypeError: if ``layer`` is neither a name nor a module.
    """
    kind = type(model).__name__
    modules: dict[str, nn.Module] = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name
        got = f"a {type(layer).__name__} that is not in it"
        raise ValueError(checks.error_message("layer", f"a module of {kind}", got))
    if not isinstance(layer, str):
        raise TypeError(checks.error_message("layer", "a name or a module", type(layer).__name__))
    for wrapper in ("module.", "_orig_mod."):  # as the wrapped model calls it
        if layer not in modules:
            layer = layer.removeprefix(wrapper)
    if layer not in modules:
        hint = checks.close_matches(layer, list(modules)) or "camkit.list_layers lists them"
        expected = f"the name of a layer of {kind}"
        raise ValueError(checks.error_message("layer", expected, repr(layer), hint))
    return layer


def require_one_run(name: str, calls: int) -> None:
    """Raise a ``ValueError`` unless a layer ran once."""
    if calls == 0:
        raise ValueError(
            checks.error_message(
                "layer",
                "a layer that runs in the forward pass",
                f"{name!r}, which never ran",
                "camkit.list_layers lists those that do",
            )
        )
    if calls > 1:
        got = f"{name!r}, which ran {calls} times"
        raise ValueError(checks.error_message("layer", "a layer that runs once a pass", got))


def prototype(model: nn.Module) -> torch.Tensor:
    """A tensor of the type and on the device that a model works in: its first parameter of floats."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` makes of a module."""
    return type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in module._modules


def require_numbers(modules: Sequence[nn.Module]) -> None:
    """Raise a ``ValueError`` if a tensor of a model's modules, the model first, is on the meta device."""
    if has_meta(modules):
        tensors = itertools.chain(modules[0].named_parameters(), modules[0].named_buffers())
        empty = next(name for name, tensor in tensors if tensor.is_meta)
        hint = "load_state_dict(..., assign=True) gives them"
        raise ValueError(checks.error_message("model", "weights", f"{empty!r} on the meta device", hint))
