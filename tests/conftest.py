"""What all tests share."""

import pytest
import torch

# Its asserts tell what they compared.
pytest.register_assert_rewrite("helpers")

# The networks are tiny: sharing one out among threads costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
