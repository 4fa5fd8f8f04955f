"""The state that a forward pass may change, and how it is restored."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camkit.model.modules import modules_of
from camkit.model.state import math_attention, process_state_restored, restored_on_exit
from helpers.fingerprint import attention_kernels, process


class Changing(nn.Module):
    """Writes to its buffers and draws random numbers in every forward pass, in evaluation mode too."""

    passes: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(3))
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        self.passes += 1  # changes the buffer in place
        self.seen = x.sum(0)  # puts another tensor there
        random.random()
        np.random.rand()
        torch.rand(())
        return self.drop(self.norm(x))

    def train(self, mode: bool = True) -> "Changing":
        raise AssertionError("a model's own train() may do more than set a flag")


def found(model: nn.Module) -> tuple[Any, ...]:
    """The training flags of all modules, their buffers with their values, and the state of the process."""
    buffers = [(id(buffer), buffer.tolist()) for buffer in model.buffers()]
    return [module.training for module in model.modules()], buffers, process()


def restored(model: nn.Module) -> AbstractContextManager[None]:
    return restored_on_exit(modules_of(model))


def partly_in_training() -> Changing:
    model = Changing()
    model.norm.training = False
    return model


X = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_flags_buffers_and_random_states_are_put_back(error: type[BaseException] | None) -> None:
    model = partly_in_training()
    before = found(model)

    def run() -> None:
        with restored(model):
            assert not any(module.training for module in model.modules())
            model(X)
            assert model.passes == 1
            assert torch.equal(model.seen, X.sum(0))
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert found(model) == before


def test_of_nested_blocks_the_outermost_puts_everything_back() -> None:
    model = partly_in_training()
    before = found(model)
    with restored(model):
        model(X)
        with restored(model):
            model(X)
        # The inner block restores nothing, because the outer block has not ended yet.
        assert not any(module.training for module in model.modules())
        assert model.passes == 2
    assert found(model) == before


def test_a_part_is_put_back_when_the_whole_is() -> None:
    part = partly_in_training()
    whole = nn.Sequential(part)
    before = found(whole)
    with restored(part):
        with restored(whole):
            whole(X)
        assert whole.training
        assert not part.training
    assert found(whole) == before


def test_of_several_threads_the_last_to_leave_puts_everything_back() -> None:
    model = partly_in_training()
    before = found(model)
    entered, may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with restored(model):
            model(X)
            entered.set()
            assert may_leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert entered.wait(60)
        with restored(model):
            may_leave.set()
            running.result(60)
            # The first thread has left, and this one still finds the model in evaluation mode.
            assert not any(module.training for module in model.modules())
            assert model.passes == 1
    assert found(model) == before


def test_a_model_in_evaluation_mode_without_buffers_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with restored(model):
        # This model has nothing to restore, so a change by the user inside the block is kept.
        model.train()
    assert model.training


def test_the_caller_may_be_in_inference_mode() -> None:
    model = partly_in_training()
    with torch.inference_mode():
        model.seen = torch.ones(3)  # an inference tensor has no version counter
        before = found(model)
        with restored(model):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
        with restored(model), torch.inference_mode():
            model.seen.zero_()
        assert found(model) == before


@pytest.mark.parametrize("context", [process_state_restored, math_attention])
def test_the_process_is_put_back(context: Callable[[], AbstractContextManager[None]]) -> None:
    before = process()
    with context():
        with context():
            pass
        if context is process_state_restored:
            random.random()
            np.random.rand()
            torch.rand(())
    assert process() == before
    with pytest.raises(KeyboardInterrupt), context():
        raise KeyboardInterrupt
    assert process() == before


def test_attention_is_computed_by_its_formula() -> None:
    before = attention_kernels()
    with math_attention():
        assert attention_kernels() == [False, False, True, False]
        with math_attention():
            pass
        assert attention_kernels() == [False, False, True, False]
    assert attention_kernels() == before
