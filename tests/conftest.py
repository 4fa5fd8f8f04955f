"""Settings and fixtures for all tests."""

import pytest
import torch

# Let pytest show the compared values when an assert in the helpers fails.
pytest.register_assert_rewrite("helpers")

# The networks are tiny, so that starting several threads takes longer than the computation itself.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
