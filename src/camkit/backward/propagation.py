"""Other backward passes: functions that run as they are, with a rule in the place of their gradient.

A :class:`Propagation` is a context in which the model runs. It replaces nothing in the model: it meets each
torch function as it is called, whether a module calls it or the model's own code does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camkit._tools.nested import tensors_in
from camkit.functions import ELEMENTWISE, IN_PLACE, Call, out_of_place

Rule = Callable[[Call], Any]


class Propagation(TorchFunctionMode):
    """Runs functions of what comes from one tensor by rules.

    Args:
        start: the tensor where the rules begin.
        rules: for the name of a function, its rule.
        other: the rule of all other functions; they run as they are if not given.
    """

    def __init__(self, start: torch.Tensor, rules: Mapping[str, Rule], other: Rule | None = None) -> None:
        super().__init__()
        self._rules = rules
        self._other = other or _as_it_is
        self._reached = {id(start): start}  # kept alive, so that no id is used twice
        self.met: set[str] = set()

    def reached(self, value: object) -> bool:
        """Whether a value is a tensor that comes from the start."""
        return id(value) in self._reached

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # The graph holds the rules, and these would hold its tensors: a circle that nothing collects. Rules
        # that are this object's own methods make another.
        self._reached, self._rules, self._other = {}, {}, _as_it_is

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not any(map(self.reached, tensors_in((args, kwargs)))):
            return func(*args, **kwargs)
        called = getattr(func, "__name__", str(func))
        name = out_of_place(called)
        self.met.add(name)
        in_place = called in IN_PLACE or (called.endswith("_") and not called.endswith("__"))
        if in_place:
            func = getattr(torch, name, getattr(F, name, func))
        if name in ELEMENTWISE:
            in_place |= bool(kwargs.pop("inplace", False)) or any(a is True for a in args)
            args = tuple(a for a in args if not isinstance(a, bool))
        if in_place and name in self._rules:
            # On a copy, for the rule needs the old numbers, and then written back.
            copy = args[0].clone()
            if self.reached(args[0]):
                self._reached[id(copy)] = copy
            result = args[0].copy_(
                self._rules[name](Call(name, func, (copy, *args[1:]), kwargs, self.reached))
            )
        else:
            result = self._rules.get(name, self._other)(Call(name, func, args, kwargs, self.reached))
        changed = args[:1] if result is None else result  # x[i] = y
        self._reached.update((id(tensor), tensor) for tensor in tensors_in(changed))
        return result


def _as_it_is(call: Call) -> Any:
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
