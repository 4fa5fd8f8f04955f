"""Random numbers of one's own: the same on every device, and the global random state is left alone."""

from collections.abc import Sequence

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
