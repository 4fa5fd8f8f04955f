"""Threads that explain one model: the maps of one thread, and the model as it was found."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import NARROW, Plain, draw, narrow
from helpers.fingerprint import fingerprint
from helpers.registry import FITTING, explainer

Result = TypeVar("Result")
THREADS = 8


@pytest.fixture
def _hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], Result], count: int = THREADS) -> list[Result]:
    """The results of several threads that start together; raises the error of a thread that fails."""
    together = threading.Barrier(count, timeout=60)

    def run(i: int) -> Result:
        torch.set_num_threads(1)
        together.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def wait(event: threading.Event) -> None:
    assert event.wait(60), "the other thread is not there"


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", camkit.METHODS)
def test_threads_give_the_maps_of_one_thread(name: str, training: bool) -> None:
    family = FITTING[name]
    model = narrow(family).train(training)
    shared = explainer(name, family, model)
    x = torch.randn(THREADS, 2, *NARROW[family].shape)
    expected = [shared(one, [0, 1]) for one in x]
    before = fingerprint(model)

    def explain(i: int) -> list[Any]:
        own = explainer(name, family, model)  # which makes a dry run of its own, amidst the others' passes
        return [own(x[i], [0, 1]), shared(x[i], [0, 1])]

    for explained, alone in zip(in_threads(explain), expected, strict=True):
        for one in explained:
            assert torch.equal(one.maps, alone.maps)
            assert torch.equal(one.output, alone.output)
    assert fingerprint(model) == before


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("name", camkit.METHODS)
def test_one_thread_that_raises_does_not_disturb_the_others(name: str) -> None:
    family = FITTING[name]
    model = narrow(family).train()
    method, x = explainer(name, family, model), torch.randn(2, *NARROW[family].shape)
    expected = method(x, 0).maps
    before = fingerprint(model)

    def explain(i: int) -> Tensor:
        if i % 2:
            with pytest.raises(ValueError, match="^target: expected a class index"):
                method(x, 99)
        return method(x, 0).maps  # type: ignore[no-any-return]

    for found in in_threads(explain, 4):
        assert torch.equal(found, expected)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", camkit.METHODS)
def test_the_first_to_enter_leaves_first(name: str) -> None:
    """One enters its last pass while another is in its own, and is left alone there."""
    family = FITTING[name]
    model = narrow(family).train()
    *_, head = model.modules()
    method, x = explainer(name, family, model), torch.randn(2, *NARROW[family].shape)
    first, second = "first", "second"
    roles: dict[int, str] = {}
    calls: dict[int, int] = {}
    last = 0
    inside, over = {first: threading.Event(), second: threading.Event()}, threading.Event()
    modes: list[bool] = []

    def meet(*args: object) -> None:
        me = threading.get_ident()
        calls[me] = calls.get(me, 0) + 1
        if me in roles and calls[me] == last:
            inside[roles[me]].set()
            if roles[me] == first:
                wait(inside[second])
            else:
                wait(over)
                modes.extend(module.training for module in model.modules())

    head.register_forward_hook(meet)
    expected = method(x, 0).maps
    last = calls[threading.get_ident()]
    before = fingerprint(model)

    def explain(i: int) -> Tensor:
        roles[threading.get_ident()] = (first, second)[i]
        if i:
            wait(inside[first])
        found: Tensor = method(x, 0).maps
        over.set()
        return found

    for found in in_threads(explain, 2):
        assert torch.equal(found, expected)
    assert modes
    assert not any(modes)
    assert fingerprint(model) == before


def test_threads_share_a_part_of_a_model_in_training_mode() -> None:
    """One explains the whole and is done first, while another is still inside a part of it."""
    part = Plain().train()
    whole = nn.Sequential(part)
    x = torch.randn(2, 3, 12, 10)
    before = fingerprint(whole)
    inside = threading.Event()
    modes: list[bool] = []

    def of_part(output: Tensor) -> Tensor:
        inside.set()
        first.join(20)
        modes.extend(module.training for module in part.modules())
        return output[:, 1]

    def of_whole(output: Tensor) -> Tensor:
        other.start()
        inside.wait(20)
        return output[:, 1]

    first = threading.Thread(target=lambda: camkit.GradCAM(whole, "0.features")(x, of_whole))
    other = threading.Thread(target=lambda: camkit.GradCAM(part)(x, of_part))
    first.start()
    first.join(30)
    other.join(30)
    assert modes
    assert not any(modes)
    assert fingerprint(whole) == before


def test_a_dry_run_amidst_a_pass_that_draws() -> None:
    """It begins after the pass drew random numbers, and ends after that pass is over."""
    drawn, begun, over = threading.Event(), threading.Event(), threading.Event()
    dry = set[int]()

    class Drawing(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if threading.get_ident() in dry:
                begun.set()
                wait(over)
            elif x.device.type == "cpu":
                draw(self, x)
                drawn.set()
                wait(begun)
            return super().forward(x)

    model, x = Drawing().train(), torch.rand(1, 3, 12, 10)
    before = fingerprint(model)

    def work(i: int) -> None:
        if i:
            wait(drawn)
            dry.add(threading.get_ident())
            camkit.list_layers(model, (3, 12, 10))
        else:
            camkit.GradCAM(model)(x, 0)
            over.set()

    in_threads(work, 2)
    assert fingerprint(model) == before
