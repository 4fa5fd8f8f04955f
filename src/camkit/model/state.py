"""Saving and restoring state, so that an explanation leaves the model and the process as it found them.

A forward pass of the user's model can change three things:

- **The mode.** An explanation runs the model in evaluation mode, whatever mode the user left it in.
- **The buffers.** Some forward passes write to a buffer, such as a counter, in evaluation mode too.
- **The process.** A forward pass may draw random numbers, and the caller may be in torch's inference mode.

Parameters are not on the list, because a forward pass only reads them. Nor are their gradients: camkit asks
``torch.autograd.grad`` for gradients, which adds nothing to ``.grad``. Hooks are removed by the code that
registers them.

:func:`restored_on_exit` saves all three on entry and restores them on exit, also if an exception or a
``KeyboardInterrupt`` leaves its ``with`` block.

Several threads may explain the same model at the same time. If each of them restored the model on its own,
the first to finish would switch the model back to training mode while the others were still running it, and a
thread that came late would save a state that is not the user's. Therefore the state is saved once, by the
first thread to enter, and restored once, by the last thread to leave. A counter identifies both::

    thread 1   enter: count 0 -> 1, save ............ leave: count 2 -> 1
    thread 2             enter: count 1 -> 2 ........................ leave: count 1 -> 0, restore

A nested call in one thread counts in the same way: a smoothed method enters once for each view.
"""

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


def _shared_by_threads(
    make_context: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """Makes all threads share one context: the first to enter sets it up, the last to leave undoes it.

    Args:
        make_context: makes a context manager that changes something global.

    Returns:
        A function to call in place of ``make_context``. Its context managers may overlap, in one thread or in
        several.
    """
    lock = threading.Lock()
    users = 0
    entered = ExitStack()  # holds the one context that is open while there are users

    @contextmanager
    def context() -> Iterator[None]:
        nonlocal users
        # The lock is held while the context is set up or undone, but not while the block runs.
        with lock:
            if users == 0:
                entered.enter_context(make_context())
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if users == 0:
                    entered.close()

    return context


@_shared_by_threads
@contextmanager
def process_state_restored() -> Iterator[None]:
    """Restores the global random state on exit, and runs compiled modules uncompiled until then.

    The random state is that of Python, of NumPy, and of torch on the CPU and on CUDA devices. It goes back to
    its value on entry, so a number that another part of the program draws meanwhile may be drawn again.
    Modules that were compiled with ``torch.compile`` run eagerly, because hooks do not reach inside compiled
    code. They stay compiled, and run so again afterwards.
    """
    # Importing torch._dynamo takes seconds. If nobody has imported it yet, nothing can have been compiled.
    may_be_compiled = "torch._dynamo" in sys.modules
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    cpu = torch.get_rng_state()
    # Asking for the state of CUDA would initialise it in a process that only uses the CPU.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with torch.compiler.set_stance("force_eager") if may_be_compiled else nullcontext():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@_shared_by_threads
@contextmanager
def math_attention() -> Iterator[None]:
    """Computes attention by its formula until exit, since torch's fused kernels have no second derivative."""
    # torch's own sdpa_kernel sets a context variable, which only the thread that set it can reset. Here the
    # thread that leaves last may be another one, so the flags are set one by one.
    cuda = torch.backends.cuda
    flags = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
    ]
    try:
        for set_flag, _ in flags:
            set_flag(set_flag is cuda.enable_math_sdp)
        yield
    finally:
        for set_flag, was_enabled in flags:
            set_flag(was_enabled)


class _SavedBuffer(NamedTuple):
    """A buffer of a module as it was before the first explanation.

    Attributes:
        name: its name in the module.
        tensor: the tensor itself, to put back if a forward pass assigns another one.
        version: torch's count of the in-place changes of the tensor; -1 if torch does not count them.
        numbers: a copy of the numbers, to write back if a forward pass changes the tensor in place.
    """

    name: str
    tensor: torch.Tensor
    version: int
    numbers: torch.Tensor


@dataclass(slots=True)
class _SavedModule:
    """A module as it was before the first of the explanations that are running it now.

    Attributes:
        count: number of explanations that are running it, over all threads.
        training: whether it was in training mode.
        buffers: its buffers.
    """

    count: int
    training: bool
    buffers: Sequence[_SavedBuffer]


# The modules that are being explained. Each module has an entry of its own, not each model: two models that
# are explained at the same time may share a module, and it must be restored after the last of both.
_saved_modules: dict[nn.Module, _SavedModule] = {}
# Held while entries are made, counted or removed, but not while a model runs.
_lock = threading.Lock()


@contextmanager
def restored_on_exit(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts modules in evaluation mode, and leaves them and the process as they were found.

    On exit, the modules have their own modes and buffers again, and the random state is restored as
    :func:`process_state_restored` says. If several threads overlap, the first saves the state and the last
    restores it. The block runs outside inference mode, because tensors made in that mode cannot be part of a
    graph.

    Args:
        modules: every module of a model, such as :func:`~camkit.model.modules.modules_of` returns.
    """
    entered: list[nn.Module] = []
    with process_state_restored(), torch.inference_mode(False):
        try:
            with _lock:
                for module in modules:
                    saved = _saved_modules.get(module)
                    if saved is None:
                        training, buffers = module.training, _save_buffers(module)
                        # The module is in evaluation mode already and has no buffer that a pass could write
                        # to, so there is nothing to restore.
                        if not training and not buffers:
                            continue
                        saved = _saved_modules[module] = _SavedModule(0, training, buffers)
                    entered.append(module)
                    saved.count += 1
                    # Set the flag instead of calling eval(): a model's own eval() and train() may do more
                    # than set it, such as freeze layers.
                    if module.training:
                        module.training = False
            yield
        finally:
            # Leave only the modules that were entered: an exception may have ended the loop above early.
            with _lock:
                for module in entered:
                    _leave(module)


def _leave(module: nn.Module) -> None:
    """Ends one explanation of a module, and restores the module if no other explanation is running it."""
    saved = _saved_modules[module]
    saved.count -= 1
    if saved.count == 0:
        del _saved_modules[module]
        if saved.training:
            module.training = True
        _restore_buffers(module, saved.buffers)


def _save_buffers(module: nn.Module) -> Sequence[_SavedBuffer]:
    # Most buffers of a network are running statistics of batch normalisation. In evaluation mode they are
    # only read, so copying them would be wasted time.
    if not module._buffers or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ()
    return [
        # torch does not count the changes of tensors that were made in inference mode.
        _SavedBuffer(name, tensor, -1 if tensor.is_inference() else tensor._version, tensor.detach().clone())
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def _restore_buffers(module: nn.Module, buffers: Sequence[_SavedBuffer]) -> None:
    for name, tensor, version, numbers in buffers:
        module._buffers[name] = tensor
        # Write only to a buffer that may have changed: writing would itself count as a change, which makes
        # autograd refuse a graph that the user built with this buffer before.
        if version == -1 or tensor._version != version:
            # torch allows changes of such a tensor in inference mode only.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(numbers)
