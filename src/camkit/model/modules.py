"""The modules of a model: listing them, finding their names, and refusing models that cannot be explained."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from camkit._tools import checks


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Returns every module of a model once, in the order of ``model.modules()``."""
    # Every call of a method needs this list. model.modules() takes longer, since it also makes all names.
    found: dict[nn.Module, None] = {}  # a set that keeps its order
    _collect(model, found)
    return list(found)


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    """Adds a module and the modules below it to ``found``."""
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            _collect(child, found)


def has_meta(modules: Iterable[nn.Module]) -> bool:
    """Whether a parameter or buffer of these modules is on the meta device, where tensors have no numbers."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_meta:
                    return True
    return False


def unwrap(model: nn.Module) -> nn.Module:
    """Unwraps a model from ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``.

    Args:
        model: any module, wrapped or not.

    Returns:
        The module inside all wrappers; ``model`` itself if there is none.

    Raises:
        TypeError: if ``model`` is not a module, or a part of it is a ``torch.jit`` module, which does not run
            in Python.
        ValueError: if a parameter or buffer belongs to a lazy module that has not run yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(checks.error_message("model", "a torch.nn.Module", type(model).__name__))
    # Wrappers may be nested, such as a DataParallel of a compiled module.
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or is_compiled(model):
        model = next(model.children())
    # Code of torch.jit can be neither hooked nor intercepted.
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


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned this module as the wrapper of another."""
    return type(module).__module__.startswith("torch._dynamo") and "_orig_mod" in module._modules


def require_floats(model: nn.Module) -> None:
    """Raises a ``TypeError`` if a layer is quantized.

    Such a layer has no gradient, and its weights are not a parameter that camkit could read.
    """
    # Names take longer to find than modules, and only the error message needs one.
    quantized = next((m for m in modules_of(model) if ".quantized" in type(m).__module__), None)
    if quantized is None:
        return
    name = next(name for name, module in model.named_modules() if module is quantized)
    hint = "camkit.EigenCAM, ScoreCAM and other methods that only read activations and outputs explain it"
    got = f"{type(quantized).__name__} {name!r} of a quantized model"
    raise TypeError(checks.error_message("model", "layers of floats", got, hint))


def require_numbers(modules: Sequence[nn.Module]) -> None:
    """Raises a ``ValueError`` if a parameter or buffer is on the meta device.

    Args:
        modules: every module of a model, the model itself first.
    """
    if has_meta(modules):
        tensors = itertools.chain(modules[0].named_parameters(), modules[0].named_buffers())
        empty = next(name for name, tensor in tensors if tensor.is_meta)
        hint = "load_state_dict(..., assign=True) gives them"
        raise ValueError(checks.error_message("model", "weights", f"{empty!r} on the meta device", hint))


def require_one_run(name: str, calls: int) -> None:
    """Raises a ``ValueError`` unless a layer ran exactly once.

    Args:
        name: dotted name of the layer, for the message.
        calls: the number of its runs in one forward pass.
    """
    if calls == 0:
        expected = "a layer that runs in the forward pass"
        hint = "camkit.list_layers lists those that do"
        raise ValueError(checks.error_message("layer", expected, f"{name!r}, which never ran", hint))
    if calls > 1:
        got = f"{name!r}, which ran {calls} times"
        raise ValueError(checks.error_message("layer", "a layer that runs once a pass", got))


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """Returns the dotted name of a layer, such as ``"layer4.1.relu"``.

    Args:
        model: the model, unwrapped.
        layer: the layer as a module of the model, or by name. The name may begin with ``module.`` or
            ``_orig_mod.``, as it does in a model wrapped by ``DataParallel`` or ``torch.compile``.

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
    for wrapper in ("module.", "_orig_mod."):
        if layer not in modules:  # a model may also have a module of its own that is called "module"
            layer = layer.removeprefix(wrapper)
    if layer not in modules:
        hint = checks.close_matches(layer, list(modules)) or "camkit.list_layers lists them"
        expected = f"the name of a layer of {kind}"
        raise ValueError(checks.error_message("layer", expected, repr(layer), hint))
    return layer


def prototype(model: nn.Module) -> torch.Tensor:
    """Returns a tensor with the dtype and device of a model: its first floating-point parameter.

    A model without one gets an empty tensor of the default dtype on the default device.
    """
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
