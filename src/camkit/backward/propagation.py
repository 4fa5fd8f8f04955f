"""Other backward passes: functions that run as they are, with a rule in the place of their gradient.

A :class:`Propagation` is a context in which the model runs. It replaces nothing in the model: it meets each
torch function as it is called, whether a module calls it or the model's own code does.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from camkit._tools.nested import tensors_in
from camkit.functions import ACTIVATIONS, Call, FunctionMode, is_in_place, out_of_place, without_in_place_flag

Rule = Callable[[Call], Any]


class Propagation(FunctionMode):
    """A context that runs functions of tensors that come from one tensor by rules.

    Args:
        start: the tensor where the rules begin.
        rules: the rule of each function by its name. A rule gets the call out of place.
        other: the rule of all other functions; they run unchanged if it is not given.
    """

    def __init__(self, start: torch.Tensor, rules: Mapping[str, Rule], other: Rule | None = None) -> None:
        super().__init__()
        self._rules = rules
        self._other = other or _run_unchanged
        self._reached = {id(start): start}  # kept alive, so that no id is used twice
        self.met: set[str] = set()

    def reached(self, value: object) -> bool:
        """Whether a value is a tensor that comes from the start."""
        return id(value) in self._reached

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # The graph holds the rules, and these would hold its tensors: a circle that nothing collects. Rules
        # that are this object's own methods make another.
        self._reached, self._rules, self._other = {}, {}, _run_unchanged

    def meet(self, call: Call) -> Any:
        if not any(map(self.reached, tensors_in((call.args, call.kwargs)))):
            return call.run()
        self.met.add(call.name)
        in_place, function, args, kwargs = is_in_place(call.function), call.function, call.args, call.kwargs
        if in_place:
            function = out_of_place(function)
        if call.name in ACTIVATIONS:
            args, kwargs, flagged = without_in_place_flag(args, kwargs)
            in_place |= flagged
        call = Call(call.name, function, args, kwargs)
        if in_place and call.name in self._rules:
            # A rule needs the old numbers: it gets a copy, and its result is written back.
            copy = args[0].clone()
            if self.reached(args[0]):
                self._reached[id(copy)] = copy
            result = args[0].copy_(self._rules[call.name](replace(call, args=(copy, *args[1:]))))
        else:
            result = self._rules.get(call.name, self._other)(call)
        changed = args[:1] if result is None else result  # x[i] = y returns nothing and changes x
        self._reached.update((id(tensor), tensor) for tensor in tensors_in(changed))
        return result


def _run_unchanged(call: Call) -> Any:
    return call.run()


def with_backward(
    forward: Callable[..., torch.Tensor],
    backward: Callable[..., tuple[torch.Tensor, ...]],
    *inputs: torch.Tensor,
    keep: bool = True,
) -> torch.Tensor:
    """A function with another backward pass.

    Args:
        forward: the function, of ``inputs``.
        backward: from what arrives at its output, and from ``inputs``, to what leaves at each of them.
        inputs: its tensors.
        keep: whether ``backward`` gets ``inputs``. What is kept must not be overwritten later.
    """
    result: torch.Tensor = _WithBackward.apply(forward, backward, keep, *inputs)
    return result


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, keep: bool, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.rule = backward
        ctx.save_for_backward(*(inputs if keep else ()))
        result: torch.Tensor = forward(*inputs)
        return result

    @staticmethod
    def backward(ctx: Any, *arriving: torch.Tensor) -> Any:
        return (None, None, None, *ctx.rule(*arriving, *ctx.saved_tensors))


def vector_jacobian(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, arriving: torch.Tensor
) -> torch.Tensor:
    """The gradient of ``function`` at ``x``, for what arrives at its output."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, arriving)
    return gradient
