"""What belongs to the whole process, and is put back as it was found: by the last of several threads."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch


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
def undisturbed() -> Iterator[None]:
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
def open_attention() -> Iterator[None]:
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
