"""A stand-in for a model: its modules anew, so that a run of it changes nothing in the model."""

import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from camkit.model.modules import is_compiled


def skeleton(model: nn.Module, device: str | None = "meta", *, hooks: bool = False) -> nn.Module:
    """A stand-in for a model: its modules anew, in evaluation mode.

    What is neither a module nor a tensor is shared with the model, so that this works where
    ``copy.deepcopy`` does not.

    Args:
        model: any module.
        device: where its tensors are: ``"meta"``, or ``None`` to share its parameters and copy its buffers.
        hooks: whether a user's hooks come along, which then fire for its passes; torch's and camkit's do.
    """
    copy: nn.Module = _rebuilt(model, device, hooks, {})
    return copy


def _rebuilt(value: Any, device: str | None, hooks: bool, made: dict[int, Any]) -> Any:
    """A value with the modules and tensors in it anew, each once."""

    def again(value: Any) -> Any:
        return _rebuilt(value, device, hooks, made)

    if id(value) in made:
        return made[id(value)]
    if isinstance(value, nn.Module):
        kind = _Uncompiled if is_compiled(value) else type(value)
        made[id(value)] = module = object.__new__(kind)
        for key, attribute in vars(value).items():
            if key == "_compiled_call_impl" or (kind is _Uncompiled and key == "forward"):
                continue
            if key in ("_forward_hooks", "_forward_pre_hooks"):
                own = ((number, hook) for number, hook in attribute.items() if hooks or _is_own(hook))
                vars(module)[key] = OrderedDict(own)
            else:
                vars(module)[key] = again(attribute)
        vars(module)["training"] = False
        return module
    if isinstance(value, torch.Tensor):
        if device is None:
            tensor = value if isinstance(value, nn.Parameter) else value.detach().clone()
        else:
            tensor = torch.empty_like(value.detach(), device=device)
            if isinstance(value, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=value.requires_grad)
        made[id(value)] = tensor
        return tensor
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, again(value.__self__))
    if isinstance(value, dict):
        made[id(value)] = new = value.copy()
        new.update((key, again(item)) for key, item in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(again(item) for item in value)
    return value


class _Uncompiled(nn.Module):
    """Stands for what ``torch.compile`` made of a module, and runs a stand-in for that."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule("_orig_mod")(*args, **kwargs)


def _is_own(hook: object) -> bool:
    # transformers takes hidden states by hooks that it registers once.
    return (getattr(hook, "__module__", None) or "").split(".")[0] in ("torch", "camkit", "transformers")
