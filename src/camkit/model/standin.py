"""A stand-in for a model: a copy of its modules that can be run and changed without touching the model."""

import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from camkit.model.modules import is_compiled


def skeleton(model: nn.Module, device: str | None = "meta", *, hooks: bool = False) -> nn.Module:
    """Copies the modules of a model, in evaluation mode and without compiled code.

    Only modules, tensors, and the dicts, lists and tuples that hold them are copied. Every other attribute is
    shared with the model, so models that ``copy.deepcopy`` cannot copy work too.

    Args:
        model: any module.
        device: ``"meta"`` to give the copy tensors of the same shapes without numbers; ``None`` to share the
            model's parameters and copy its buffers and other tensors.
        hooks: whether the forward hooks and pre-hooks of the user are copied, and thus called when the copy
            runs. Those of torch, camkit and transformers always are.

    Returns:
        The copy.
    """
    copy: nn.Module = _copied(model, device, hooks, {})
    return copy


def _copied(value: Any, device: str | None, hooks: bool, copies: dict[int, Any]) -> Any:
    """Copies the modules and tensors in a value.

    Args:
        value: a module, or any attribute of one.
        device: as for :func:`skeleton`.
        hooks: as for :func:`skeleton`.
        copies: the copies made so far, by the id of the original. With it, a module or tensor that the model
            uses twice is copied once, and modules that refer to each other cause no endless recursion.
    """

    def copied(value: Any) -> Any:
        return _copied(value, device, hooks, copies)

    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, nn.Module):
        kind = _Uncompiled if is_compiled(value) else type(value)
        # Skip __init__, whose arguments are unknown, and register the copy before its attributes are copied,
        # since one of them may refer back to it.
        copies[id(value)] = module = object.__new__(kind)
        for key, attribute in vars(value).items():
            # Skip these two attributes: they hold compiled code, which would run the original modules.
            if key == "_compiled_call_impl" or (kind is _Uncompiled and key == "forward"):
                continue
            if key in ("_forward_hooks", "_forward_pre_hooks"):
                kept = (
                    (number, hook) for number, hook in attribute.items() if hooks or _is_library_hook(hook)
                )
                vars(module)[key] = OrderedDict(kept)
            else:
                vars(module)[key] = copied(attribute)
        vars(module)["training"] = False
        return module
    if isinstance(value, torch.Tensor):
        if device is None:
            # A forward pass may write to a buffer, but not to a parameter.
            tensor = value if isinstance(value, nn.Parameter) else value.detach().clone()
        else:
            tensor = torch.empty_like(value.detach(), device=device)
            if isinstance(value, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=value.requires_grad)
        copies[id(value)] = tensor
        return tensor
    # A method of a module, kept as an attribute, must run on the copy of that module.
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, copied(value.__self__))
    if isinstance(value, dict):
        copies[id(value)] = new = value.copy()
        new.update((key, copied(item)) for key, item in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value


class _Uncompiled(nn.Module):
    """Replaces the wrapper that ``torch.compile`` puts around a module, and runs the copy of that module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule("_orig_mod")(*args, **kwargs)


def _is_library_hook(hook: object) -> bool:
    # A model may not work without the hooks of its library: transformers collects hidden states by hooks that
    # it registers only once.
    return (getattr(hook, "__module__", None) or "").split(".")[0] in ("torch", "camkit", "transformers")
