"""The state that a forward pass may change, in the model and in the process, and how it is put back."""

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


def _shared(make: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A context that the first of several threads enters, and that the last leaves."""
    lock, inside, stack = threading.Lock(), [0], ExitStack()

    @contextmanager
    def context() -> Iterator[None]:
        with lock:
            if inside[0] == 0:
                stack.enter_context(make())
            inside[0] += 1
        try:
            yield
        finally:
            with lock:
                inside[0] -= 1
                if inside[0] == 0:
                    stack.close()

    return context


@_shared
@contextmanager
def process_state_restored() -> Iterator[None]:
    """Puts every global generator's state back, and runs what torch.compile made as it was before.

    A forward pass may draw from any of them, and hooks do not reach inside what is compiled.
    """
    # Importing it takes seconds, and where it is not, nothing is compiled.
    compiles = "torch._dynamo" in sys.modules
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@_shared
@contextmanager
def math_attention() -> Iterator[None]:
    """Computes attention by its formula: torch's fused kernels have no second derivative."""
    # Not by sdpa_kernel, which only the thread that enters it can leave.
    cuda = torch.backends.cuda
    found = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
    ]
    try:
        for enable, _ in found:
            enable(enable is cuda.enable_math_sdp)
        yield
    finally:
        for enable, was in found:
            enable(was)


@dataclass(slots=True)
class _SavedModule:
    """How many explanations one module is in the middle of, in all threads, and how it was before."""

    count: int
    training: bool
    buffers: Sequence["_Buffer"]


class _Buffer(NamedTuple):
    """A buffer as it was found: some forward passes write to it in evaluation mode too."""

    name: str
    tensor: torch.Tensor
    version: int
    numbers: torch.Tensor


# By the module: one model may be a part of another.
_saved_modules: dict[nn.Module, _SavedModule] = {}
_lock = threading.Lock()


@contextmanager
def restored_on_exit(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts all modules in evaluation mode, and at the end flags, buffers and the random state back.

    The first of several threads saves them, and the last puts them back. What torch.compile made runs as it
    was before.
    """
    entered: list[nn.Module] = []
    with process_state_restored(), torch.inference_mode(False):
        try:
            with _lock:
                for module in modules:
                    visit = _saved_modules.get(module)
                    if visit is None:
                        training, buffers = module.training, _buffers(module)
                        if not training and not buffers:
                            continue  # there is nothing to put back
                        visit = _saved_modules[module] = _SavedModule(0, training, buffers)
                    entered.append(module)
                    visit.count += 1
                    # Set and not called: a model's own eval() and train() may do more than set a flag.
                    if module.training:
                        module.training = False
            yield
        finally:
            with _lock:
                for module in entered:
                    _leave(module)


def _leave(module: nn.Module) -> None:
    visit = _saved_modules[module]
    visit.count -= 1
    if visit.count == 0:
        del _saved_modules[module]
        if visit.training:
            module.training = True
        _put_back(module, visit.buffers)


def _buffers(module: nn.Module) -> Sequence[_Buffer]:
    # Most buffers there are belong to these, and evaluation only reads them.
    if not module._buffers or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ()
    return [
        # Tensors of inference mode have no version.
        _Buffer(name, tensor, -1 if tensor.is_inference() else tensor._version, tensor.detach().clone())
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def _put_back(module: nn.Module, buffers: Sequence[_Buffer]) -> None:
    for name, tensor, version, numbers in buffers:
        module._buffers[name] = tensor
        if version == -1 or tensor._version != version:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(numbers)
