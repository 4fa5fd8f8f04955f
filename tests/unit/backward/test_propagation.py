"""A context in which rules replace the backward passes of functions."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.backward.propagation import Propagation, vector_jacobian, with_backward
from camkit.functions import Call
from helpers.families import Plain, tiny

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()


class Tenfold:
    """A rule that returns ten times the result of its call, and records the call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Tensor:
        self.calls.append(
            replace(call, args=tuple(a.clone() if isinstance(a, Tensor) else a for a in call.args))
        )
        return 10 * call.run()  # type: ignore[no-any-return]


#: Spellings of an in-place ReLU.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": torch.relu_,
    "method": lambda x: x.relu_(),
    "flag": lambda x: F.relu(x, inplace=True),
    "module": nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("spelling", IN_PLACE.values(), ids=IN_PLACE)
def test_a_rule_is_called_out_of_place_and_its_result_is_written_back(
    spelling: Callable[[Tensor], Tensor],
) -> None:
    start, rule = X.clone(), Tenfold()
    with Propagation(start, {"relu": rule}) as context:
        y = start + 1
        result = spelling(y)
    (call,) = rule.calls
    assert torch.equal(call.args[0], X + 1)  # the input as it was before the ReLU wrote to it
    assert torch.equal(call.run(), (X + 1).relu())
    assert torch.equal(call.args[0], X + 1)  # the call that the rule gets works out of place
    assert result is y
    assert torch.equal(y, 10 * (X + 1).relu())
    assert context.met == {"add", "relu"}


def test_operators_in_place_are_written_back_too() -> None:
    start, rule = X.clone(), Tenfold()
    with Propagation(start, {"add": rule}):
        y = start * 1
        same = y
        y += 2
    assert same is y
    assert torch.equal(y, 10 * (X + 2))
    assert len(rule.calls) == 1


@pytest.mark.parametrize("write", [torch.relu_, lambda y: y.add_(1)], ids=["relu_", "add_"])
def test_a_function_without_a_rule_writes_to_its_input_too(write: Callable[[Tensor], Tensor]) -> None:
    start, expected = X.clone(), X.clone()
    write(expected)
    with Propagation(start, {}):
        y = start * 1
        write(y)
    assert torch.equal(y, expected)


def test_rules_are_for_tensors_that_come_from_the_start_only() -> None:
    start, other, rule = X.clone(), X.clone(), Tenfold()
    with Propagation(start, {"relu": rule}) as context:
        assert torch.equal(F.relu(other), X.relu())
        assert context.met == set()
        whole = torch.cat([other, start * 2])
        apart = other * 3
        assert context.reached(start)
        assert context.reached(whole)
        assert not context.reached(apart)
        assert not context.reached(other)
        assert torch.equal(F.relu(whole), 10 * torch.cat([X, 2 * X]).relu())
    assert len(rule.calls) == 1


def test_a_tensor_that_takes_in_a_part_from_the_start_is_reached() -> None:
    start, rule = X.clone(), Tenfold()
    with Propagation(start, {"relu": rule}) as context:
        other = torch.zeros(2, 5, dtype=torch.float64)
        other[:, 0] = start[:, 0]
        assert context.reached(other)
        F.relu(other)
    assert len(rule.calls) == 1


def test_all_other_functions_have_the_other_rule() -> None:
    start, rule, other = X.clone(), Tenfold(), Tenfold()
    with Propagation(start, {"relu": rule}, other):
        F.relu(start).tanh()
    assert [call.name for call in rule.calls] == ["relu"]
    assert [call.name for call in other.calls] == ["tanh"]


def test_after_the_block_nothing_has_a_rule_and_nothing_is_kept() -> None:
    start, rule = X.clone(), Tenfold()
    # Without the garbage collector a tensor is freed only if nothing refers to it in a cycle.
    gc.disable()
    try:
        with Propagation(start, {"relu": rule}) as context:
            made = start * 2
        assert torch.equal(F.relu(made), (2 * X).relu())
        assert rule.calls == []
        assert not context.reached(start)
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_rules_of_its_own_leave_no_circle() -> None:
    """The rules of LRP and DeepLIFT are methods of the context itself, which must not keep it alive."""

    class Own(Propagation):
        def __init__(self, start: Tensor) -> None:
            super().__init__(start, {"relu": self.rule}, self.rule)

        def rule(self, call: Call) -> Any:
            return call.run()

    gc.disable()
    try:
        with Own(X.clone()) as context:
            pass
        gone = weakref.ref(context)
        del context
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", [True, False])
def test_another_backward_pass_gets_the_inputs_that_it_needs(keep: bool) -> None:
    leaf, other = X.clone().requires_grad_(), (X + 1).requires_grad_()
    given: list[tuple[Tensor, ...]] = []

    def backward(arriving: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given.append(inputs)
        return arriving * 2, arriving * 3

    result = with_backward(torch.add, backward, leaf, other, keep=keep)
    assert torch.equal(result, 2 * X + 1)
    first, second = torch.autograd.grad(result, [leaf, other], X)
    assert torch.equal(first, 2 * X)
    assert torch.equal(second, 3 * X)
    assert len(given[0]) == (2 if keep else 0)
    if keep:
        assert torch.equal(given[0][0], X)


def test_the_gradient_for_what_arrives() -> None:
    with torch.no_grad():
        found = vector_jacobian(torch.tanh, X, 2 * X)
    torch.testing.assert_close(found, 2 * X * (1 - X.tanh() ** 2))
    assert not found.requires_grad
    assert not X.requires_grad


class Mean(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return f.mean((2, 3))


@pytest.mark.parametrize("method", [camkit.LIFTCAM, camkit.GuidedGradCAM])
def test_a_number_made_of_a_tensor_is_no_operation_in_place(method: Any) -> None:
    """``int(tensor)`` calls ``Tensor.__int__``, whose name looks like that of an in-place operator."""

    class Counts(Plain):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            steps = int(f.sum()) * 0 + 1
            return self.fc(F.relu(f.mean((2, 3)))) / steps  # type: ignore[no-any-return]

    model, x = tiny(Counts), torch.rand(2, 3, 12, 10).double()
    plain = nn.Sequential(
        OrderedDict(features=model.features, mean=Mean(), relu=nn.ReLU(), fc=model.fc)
    ).eval()
    torch.testing.assert_close(method(model, "features")(x, 1).maps, method(plain, "features")(x, 1).maps)


FIRST_LEFT_OUT = torch.ones(6, 1, 1, dtype=torch.float64)
FIRST_LEFT_OUT[0] = 0


def leave_out_first(f: Tensor) -> None:
    """Sets the first channel to zero by an assignment."""
    f[:, 0] = 0.0


# Functions without a rule that change their input as a statement, whose result nobody reads.
STATEMENTS: dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]]] = {
    "exp_": (torch.Tensor.exp_, torch.exp),
    "square_": (torch.Tensor.square_, torch.square),
    "mul_": (lambda f: f.mul_(0.5), lambda f: f * 0.5),
    "sub_": (lambda f: f.sub_(-0.5), lambda f: f + 0.5),
    "clamp_": (lambda f: f.clamp_(-0.2, 0.2), lambda f: f.clamp(-0.2, 0.2)),
    "relu_": (torch.relu_, torch.relu),
    "unsqueeze_": (lambda f: f.unsqueeze_(-1), lambda f: f.unsqueeze(-1)),
    "index": (leave_out_first, lambda f: f * FIRST_LEFT_OUT),
}


class Statement(Plain):
    """A model that changes its features by a statement, or by the same function out of place."""

    def __init__(self, name: str, *, in_place: bool) -> None:
        super().__init__()
        self.name, self.in_place = name, in_place

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x) * 1.0  # a tensor that the model may overwrite
        write, twin = STATEMENTS[self.name]
        if self.in_place:
            write(f)
        else:
            f = twin(f)
        return self.fc(F.relu(f.flatten(2).mean(2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("method", [camkit.LIFTCAM, camkit.GuidedGradCAM])
@pytest.mark.filterwarnings("ignore:LIFTCAM")  # some of these functions have no rule in DeepLIFT
def test_a_function_that_writes_to_its_input_is_followed(method: Any, name: str) -> None:
    writing, plain = Statement(name, in_place=True), Statement(name, in_place=False)
    plain.load_state_dict(writing.state_dict())
    x = torch.rand(2, 3, 12, 10).double()
    found, expected = (method(model.double().eval(), "features")(x, 1).maps for model in (writing, plain))
    assert expected.any()
    torch.testing.assert_close(found, expected)
