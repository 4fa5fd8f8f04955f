"""Random numbers that depend only on their seed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from camkit._tools import noise

both = pytest.mark.parametrize("draw", [noise.normal, noise.uniform], ids=["normal", "uniform"])
SHAPE, LIKE = (40, 50), torch.zeros((), dtype=torch.float64)


@both
def test_the_same_seed_gives_the_same_numbers(draw: Callable[..., Tensor]) -> None:
    first = draw(SHAPE, LIKE, 1, 2)
    assert first.shape == SHAPE
    assert torch.equal(draw(SHAPE, LIKE, 1, 2), first)
    for seed in ((2, 1), (1,), (1, 3), (12,)):
        assert not torch.isclose(draw(SHAPE, LIKE, *seed), first).any(), seed


@both
def test_the_global_random_state_is_neither_read_nor_changed(draw: Callable[..., Tensor]) -> None:
    first = draw(SHAPE, LIKE, 1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(draw(SHAPE, LIKE, 1), first)
    assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_gets_the_same_numbers_rounded(draw: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert torch.equal(draw(SHAPE, LIKE.to(dtype), 1), draw(SHAPE, LIKE, 1).to(dtype))


def test_the_numbers_have_their_distribution() -> None:
    normal, uniform = noise.normal(SHAPE, LIKE, 1), noise.uniform(SHAPE, LIKE, 1)
    assert normal.mean().item() == pytest.approx(0, abs=0.1)
    assert normal.std().item() == pytest.approx(1, abs=0.1)
    assert -1 <= uniform.min() < -0.99
    assert 0.99 < uniform.max() <= 1
    assert uniform.std().item() == pytest.approx(3**-0.5, abs=0.05)
