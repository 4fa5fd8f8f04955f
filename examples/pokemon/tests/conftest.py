import pytest
import torch


@pytest.fixture(autouse=True)
def use_one_thread() -> None:
    # The networks are tiny; several threads would cost more time than they save.
    torch.set_num_threads(1)
