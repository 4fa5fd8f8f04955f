"""Random numbers of one's own: the same on every device, and the global random state is left alone."""

from collections.abc import Sequence

import numpy as np
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


def normal(shape: Sequence[int], like: torch.Tensor, *seed: int) -> torch.Tensor:
    """Normal noise of that shape, of the type and on the device of ``like``."""
    return torch.randn(tuple(shape), generator=_generator(seed), dtype=torch.float64).to(like)


def uniform(shape: Sequence[int], like: torch.Tensor, *seed: int) -> torch.Tensor:
    """Uniform noise in [-1, 1] of that shape, of the type and on the device of ``like``."""
    numbers = torch.rand(tuple(shape), generator=_generator(seed), dtype=torch.float64)
    return (2 * numbers - 1).to(like)


def _generator(seed: Sequence[int]) -> torch.Generator:
    # Mixed, so that (0, 1) and (1, 0) are different streams.
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class State(NamedTuple):
    """The state of every global generator that a forward pass may draw from."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: list[torch.Tensor]


def state() -> State:
    """The random state of the process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return State(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)


def put_back(found: State) -> None:
    """Sets the random state of the process."""
    random.setstate(found.python)
    np.random.set_state(found.numpy)
    torch.set_rng_state(found.torch)
    if found.cuda:
        torch.cuda.set_rng_state_all(found.cuda)


@contextmanager
def untouched() -> Iterator[None]:
    """Puts the random state back."""
    found = state()
    try:
        yield
    finally:
        put_back(found)
