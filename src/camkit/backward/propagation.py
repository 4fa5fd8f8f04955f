"""Backward passes by other rules than the gradient, for LRP, DeepLIFT and guided backpropagation.

A :class:`Propagation` is a context in which the model runs forward as usual. A function with a *rule* runs
inside an autograd function whose backward pass is that rule. Afterwards ``torch.autograd.grad`` returns
relevances or multipliers instead of gradients. All other functions keep their gradient.

The context acts on torch functions as they are called, by modules and by the model's own code (the ``+`` of a
residual block) alike. It replaces nothing in the model, so there is nothing to restore afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from camkit._tools.nested import tensors_in
from camkit.functions import ACTIVATIONS, Call, FunctionMode, is_in_place, out_of_place, without_in_place_flag

#: Computes the result of a call, and decides on its backward pass.
Rule = Callable[[Call], Any]


class Propagation(FunctionMode):
    """A context in which functions get their backward pass from rules.

    Rules apply to functions of one tensor, and of the tensors that are computed from it. Functions of other
    tensors, such as those before the layer, run unchanged.

    Args:
        start: the tensor at which the backward pass will end: an activation or the images.
        rules: the rule of each function, by the name of the function. A rule gets the call out of place.
        other: the rule of all other functions of these tensors; they run unchanged if it is not given.

    Attributes:
        met: names of the functions that were called on tensors that come from ``start``.
    """

    def __init__(self, start: torch.Tensor, rules: Mapping[str, Rule], other: Rule | None = None) -> None:
        super().__init__()
        self._rules = rules
        self._other = other or _run_unchanged
        # Holding the tensors keeps their ids from being used again for other tensors.
        self._reached = {id(start): start}
        self.met: set[str] = set()

    def reached(self, value: object) -> bool:
        """Whether ``value`` is a tensor that was computed from the start, or the start itself."""
        return id(value) in self._reached

    def __exit__(self, *error: Any) -> None:
        leave: Callable[..., None] = super().__exit__
        leave(*error)
        # The graph refers to the rules, and a rule may be a method of this object. Drop the tensors, which
        # refer to the graph: keeping them would close a cycle that the garbage collector cannot free.
        self._reached, self._rules, self._other = {}, {}, _run_unchanged

    def meet(self, call: Call) -> Any:
        if not any(map(self.reached, tensors_in((call.args, call.kwargs)))):
            return call.run()
        self.met.add(call.name)
        rule = self._rules.get(call.name)
        # Without a rule a function runs exactly as it was called: in place, if the model calls it so.
        result = self._other(call) if rule is None else self._by_rule(rule, call)
        changed = call.args[:1] if result is None else result  # x[i] = y returns None and changes x
        self._reached.update((id(tensor), tensor) for tensor in tensors_in(changed))
        return result

    def _by_rule(self, rule: Rule, call: Call) -> Any:
        """The result of a rule, which always gets a call out of place."""
        in_place, function, args, kwargs = is_in_place(call.function), call.function, call.args, call.kwargs
        if in_place:
            function = out_of_place(function)
        if call.name in ACTIVATIONS:
            args, kwargs, flagged = without_in_place_flag(args, kwargs)
            in_place |= flagged
        call = Call(call.name, function, args, kwargs)
        if not in_place:
            return rule(call)
        # The rule needs the input as it was, also in the backward pass. It gets a copy, and its result is
        # written to the tensor that the model expects to change.
        copy = args[0].clone()
        if self.reached(args[0]):
            self._reached[id(copy)] = copy
        return args[0].copy_(rule(replace(call, args=(copy, *args[1:]))))


def _run_unchanged(call: Call) -> Any:
    return call.run()


def with_backward(
    forward: Callable[..., torch.Tensor],
    backward: Callable[..., tuple[torch.Tensor, ...]],
    *inputs: torch.Tensor,
    keep: bool = True,
) -> torch.Tensor:
    """Computes a function whose backward pass is replaced by another.

    Args:
        forward: the function, called with ``inputs``.
        backward: the backward pass, which returns one tensor for each input. It is called with the gradient
            (or relevance, or multiplier) that arrives at the output and, if ``keep``, with the inputs.
        inputs: the tensors that the function is differentiated by.
        keep: whether ``backward`` needs the inputs. They are saved until then, so the model must not change
            them in place.

    Returns:
        The result of ``forward``.
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
        # The first three arguments of forward are not tensors and have no gradient.
        return (None, None, None, *ctx.rule(*arriving, *ctx.saved_tensors))


def vector_jacobian(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, arriving: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of ``function`` at ``x``, times the gradient that arrives at its output.

    Args:
        function: a differentiable function of one tensor.
        x: the point, of any shape.
        arriving: the gradient at the output, in the shape of ``function(x)``.

    Returns:
        The gradient at the input, in the shape of ``x``.
    """
    # Rules call this function in the backward pass, where autograd is switched off.
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, arriving)
    return gradient
