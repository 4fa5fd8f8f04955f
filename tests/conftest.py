"""Settings of all tests."""

import pytest
import torch

# Asserts in the helpers show the values that they compared.
pytest.register_assert_rewrite("helpers")

# The networks are tiny, so that sharing the work among threads takes longer than the work itself.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
