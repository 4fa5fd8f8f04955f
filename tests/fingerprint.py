"""All that must be as it was after explaining."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that explaining must not change, in a comparable form."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "forward": [getattr(module.forward, "__func__", None) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [[list(getattr(m, h).items()) for h in _HOOKS] for m in model.modules()],
        "identity": {name: id(t) for name, t in tensors.items()},
        "version": {name: t._version for name, t in tensors.items() if not is_lazy(t)},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "bytes": {name: _bytes(t) for name, t in tensors.items()},
        "grad": {
            name: None if t.grad is None else (id(t.grad), _bytes(t.grad)) for name, t in tensors.items()
        },
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "numpy random": str(np.random.get_state()),
        "python random": random.getstate(),
    }


def _bytes(tensor: torch.Tensor) -> bytes | None:
    """The numbers of a tensor of any type; nothing where it has none."""
    if is_lazy(tensor) or tensor.is_meta:
        return None
    return tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
