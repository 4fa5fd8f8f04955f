"""The state of a model and of the process, which an explanation must not change."""

import hashlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack

_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]
_GLOBAL_HOOKS = [name for name in vars(torch.nn.modules.module) if name.startswith("_global_")]
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_PLAIN = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that explaining must not change, in a comparable form."""
    tensors = dict(_tensors(model))
    modules = list(model.modules())
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "forward": [getattr(module.forward, "__func__", None) for module in modules],
        "attributes": [
            {key: value if isinstance(value, _PLAIN) else id(value) for key, value in vars(module).items()}
            for module in modules
        ],
        "training": [module.training for module in modules],
        "hooks": [[_items(getattr(module, hooks)) for hooks in _HOOKS] for module in modules],
        "tensor hooks": {
            name: [_items(getattr(t, hooks, None)) for hooks in _TENSOR_HOOKS] for name, t in tensors.items()
        },
        "identity": {name: (id(t), 0 if is_lazy(t) else t.data_ptr()) for name, t in tensors.items()},
        "version": {name: t._version for name, t in tensors.items() if not is_lazy(t)},
        "requires_grad": {name: (t.requires_grad, t.is_leaf) for name, t in tensors.items()},
        "bits": {name: bits(t) for name, t in tensors.items()},
        "grad": {
            name: None if t.grad is None else (id(t.grad), bits(t.grad))
            for name, t in tensors.items()
            if t.is_leaf
        },
        **process(),
    }


def process() -> dict[str, Any]:
    """Everything about the process alone."""
    state = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly mode": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "function modes": _get_current_function_mode_stack(),
        "autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": torch.get_float32_matmul_precision(),
        "attention kernels": attention_kernels(),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "global hooks": [_items(getattr(torch.nn.modules.module, name)) for name in _GLOBAL_HOOKS],
        "warning filters": list(warnings.filters),
        "torch random": [bits(state) for state in (torch.get_rng_state(), *cuda)],
        "numpy random": [part.tolist() if isinstance(part, np.ndarray) else part for part in state],
        "python random": random.getstate(),
    }


def attention_kernels() -> list[bool]:
    """Which kernels torch may use for attention."""
    backends = torch.backends.cuda
    return [
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    ]


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are, of every kind, on modules, on parameters, and on all modules at once."""
    on_modules = [getattr(module, hooks) for module in model.modules() for hooks in _HOOKS]
    on_tensors = [getattr(t, hooks, None) for _, t in _tensors(model) for hooks in _TENSOR_HOOKS]
    on_all = [getattr(torch.nn.modules.module, name) for name in _GLOBAL_HOOKS]
    return sum(len(hooks) for hooks in (*on_modules, *on_tensors, *on_all) if hasattr(hooks, "__len__"))


def bits(tensor: Tensor) -> str:
    """A digest of a tensor's shape, type and every bit."""
    if is_lazy(tensor) or tensor.is_meta:
        return "no numbers"
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha1(raw.data).hexdigest()}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        yield from ((f"{name}.{k}", v) for k, v in vars(module).items() if isinstance(v, Tensor))


def _items(hooks: Any) -> Any:
    return list(hooks.items()) if isinstance(hooks, dict) else hooks
