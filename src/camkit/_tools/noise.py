"""Random numbers that are the same on every device and leave the global random state alone."""

from collections.abc import Sequence

import numpy as np
import torch


def normal(shape: Sequence[int], like: torch.Tensor, *seed: int) -> torch.Tensor:
    """Draws from the standard normal distribution.

    Args:
        shape: shape of the result.
        like: a tensor with the dtype and device of the result.
        seed: one or more integers that are not negative. The same integers give the same numbers.
    """
    return torch.randn(tuple(shape), generator=_generator(seed), dtype=torch.float64).to(like)


def uniform(shape: Sequence[int], like: torch.Tensor, *seed: int) -> torch.Tensor:
    """Draws uniformly from [-1, 1], with the arguments of :func:`normal`."""
    numbers = torch.rand(tuple(shape), generator=_generator(seed), dtype=torch.float64)
    return (2 * numbers - 1).to(like)


def _generator(seed: Sequence[int]) -> torch.Generator:
    """Makes a generator on the CPU, since a GPU would draw other numbers from the same seed."""
    # NumPy mixes the integers into one, so that (0, 1) and (1, 0) give different numbers.
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    # The shift keeps the seed below 2 ** 63, in the range of a signed integer.
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
