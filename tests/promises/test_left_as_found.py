"""Explaining leaves the model, its training and the process as they were, whatever happens."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import CLASSES, FAMILIES, NARROW, beginning, draw, narrow, write
from helpers.fingerprint import fingerprint
from helpers.registry import FITTING, explainer

EXACT = {family.name for family in FAMILIES if family.exact}
# Where DeepLIFT or relevance have no rule for everything, they say so.
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM", "ignore:LIFTCAM")


class BoomError(Exception):
    pass


class Bomb:
    """A hook, or a part of a target, that raises at one of its calls and at every later one."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0
        self.error: type[BaseException] = BoomError

    def __call__(self, *args: object) -> None:
        self.calls += 1
        if 0 < self.at <= self.calls:
            raise self.error

    def arm(self, at: int, error: type[BaseException] = BoomError) -> None:
        self.calls, self.at, self.error = 0, at, error


def refusal(name: str, family: str) -> str:
    """The start of the error for a family that the method cannot explain; empty if it can."""
    if name == "CAM" and family not in EXACT:
        return "model: expected only global pooling and one linear layer after the last activation"
    if name == "GuidedGradCAM" and not NARROW[family].relus:
        return "model: expected a network with ReLUs to guide"
    if name == "RelevanceCAM" and not NARROW[family].relevance:
        return "model: expected an architecture of convolutions"
    if name == "LeGrad" and family != "vit_b_32":
        return "(model: expected a transformer of blocks with|layer: expected a block with) one attention"
    return ""


def trained(family: str) -> nn.Module:
    """A narrow model after a real backward pass: one parameter has no gradient, and two are frozen."""
    model = narrow(family).train()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    model(torch.randn(2, *NARROW[family].shape)).square().sum().backward()
    second.requires_grad_(False)
    return model


def set_mode(model: nn.Module, training: bool) -> None:
    """All but one module in this mode."""
    *_, last = model.train(training).children()
    last.train(not training)


QUICK = {*FITTING.items(), *(("GradCAM", family) for family in NARROW)}


@lost
@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=() if (name, family) in QUICK else pytest.mark.slow)
        for name in camkit.METHODS
        for family in NARROW
    ],
)
def test_the_model_is_left_as_found(name: str, family: str) -> None:
    model, refused = trained(family), refusal(name, family)
    stem = next(module for module in model.modules() if not any(module.children()))
    *_, head = model.modules()
    in_stem, in_head, in_target = Bomb(), Bomb(), Bomb()
    stem.register_forward_pre_hook(in_stem)
    head.register_forward_hook(in_head)
    head.register_state_dict_post_hook(lambda *args: None)
    method, x = explainer(name, family, model), torch.randn(2, *NARROW[family].shape)

    def target(output: Tensor) -> Tensor:
        in_target()
        return output[:, 0]

    def ends(asked: Any, expected: type[BaseException] | None, message: str = "") -> None:
        before = fingerprint(model)
        raised: BaseException | None = None
        try:
            method(x, asked)
        except (BoomError, KeyboardInterrupt, ValueError, TypeError) as error:
            raised = error
        for bomb in (in_stem, in_head, in_target):
            bomb.at = 0
        assert fingerprint(model) == before
        if refused and (expected is None or type(raised) is ValueError):
            assert type(raised) is ValueError
            assert re.match(f"{refused}|{message or refused}", str(raised))
        else:
            assert type(raised) is (expected or type(None)), raised
            assert re.match(message, str(raised))

    for training in (True, False):
        set_mode(model, training)
        in_stem.arm(0)
        in_head.arm(0)
        ends(0, None)
        if not in_stem.calls:
            continue  # refused before a pass: nothing else can happen
        later = min(3, in_head.calls)
        ends(CLASSES, ValueError, "target: expected a class index")
        in_stem.arm(1, KeyboardInterrupt)
        ends(0, KeyboardInterrupt)
        for error in (BoomError, KeyboardInterrupt):
            in_head.arm(1, error)
            ends(0, error)
            if later > 1:
                in_head.arm(later, error)
                ends(0, error)
            in_target.arm(1, error)
            ends(target, error)
        in_target.arm(0)
        ends(target, *((TypeError, "target: expected classes") if name == "CAM" else (None,)))
        if in_target.calls > 1:
            in_target.arm(2)
            ends(target, BoomError)


@pytest.mark.parametrize("when", ["between forward and backward", "between backward and step"])
@pytest.mark.parametrize("name", camkit.METHODS)
def test_explaining_while_training_changes_nothing(name: str, when: str) -> None:
    """With momentum, normalisation by the batch, and dropout."""
    shape = NARROW[FITTING[name]].shape

    def train(explained: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = narrow(FITTING[name]).train()
        method = explainer(name, FITTING[name], model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(4, *shape)).square().sum()
            if explained == "between forward and backward":
                method(torch.ones(1, *shape), 0)
            loss.backward()
            if explained == "between backward and step":
                method(torch.ones(1, *shape), 0)
            optimizer.step()
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        return [*model.parameters(), *model.buffers(), *momenta, torch.get_rng_state()]

    for with_it, without in zip(train(when), train("never"), strict=True):
        assert torch.equal(with_it, without)


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "Smoothed": lambda model, x: camkit.Smoothed(camkit.GradCAM(model), camkit.flip_views())(x),
    "guided_backprop": lambda model, x: camkit.guided_backprop(model, x, 0),
    "list_layers": lambda model, x: camkit.list_layers(model, x.shape[1:]),
} | {
    name: partial(lambda name, model, x: explainer(name, FITTING[name], model)(x, 0), name)
    for name in camkit.METHODS
}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("begin", [write, draw])
@pytest.mark.parametrize("name", CALLS)
def test_what_a_forward_pass_changes_is_put_back(name: str, begin: Any, at: int) -> None:
    """The same holds if that pass or a later one raises."""
    family = FITTING.get(name, "mobilenet_v2")
    model, x, bomb = beginning(begin, family), torch.rand(2, *NARROW[family].shape), Bomb()
    *_, head = model.modules()
    head.register_forward_hook(bomb)
    bomb.arm(at)

    def found() -> dict[str, Any]:
        everything = fingerprint(model)
        version = everything.pop("version")  # of a tensor that is written back it is another
        return everything | {"version": {name: version[name] for name, _ in model.named_parameters()}}

    before = found()
    with pytest.raises(BoomError) if at else nullcontext():
        CALLS[name](model, x)
        if bomb.calls < at:
            raise BoomError  # for want of so many passes
    assert found() == before
