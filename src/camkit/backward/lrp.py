r"""Layer-wise relevance propagation (LRP): each function distributes its share of the score to its inputs.

The rules are those of Relevance-CAM:

- Linear layers and convolutions use the :math:`\alpha = 1, \beta = 0` rule (:math:`z^+`): an output
  distributes its relevance to its positive contributions :math:`w_{jk} x_j`, in proportion to their size.
  Biases get none.
- Sums and average poolings distribute it to their inputs in proportion to their contributions.
- Max pooling passes all of it to the maximum.
- Activation functions that map zero to zero (ReLU, GELU), normalisation by fixed statistics and scaling by a
  constant pass it on unchanged.
- Functions that only move values keep their gradient, which moves relevance in the same way. Where branches
  start from one tensor, their relevances add up, as gradients do.

References:
    Lee et al., *Relevance-CAM: Your Model Already Knows Where to Look*, CVPR 2021; Bach et al., *On
    Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation*, PLOS
    ONE 2015.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from camkit._tools import checks
from camkit._tools.nested import tensors_in
from camkit.backward.propagation import Propagation, vector_jacobian, with_backward
from camkit.functions import AVERAGE_POOLINGS, KEEP_RELEVANCE, LINEAR, PASS_RELEVANCE, SCALINGS, SUMS, Call
from camkit.maps import safe_divide


class Relevance(Propagation):
    """A context in which gradients with respect to ``start`` are relevances.

    Args:
        start: the activation at which the propagation ends.
        kind: class name of the model, for error messages.

    Raises:
        ValueError: within the context, at a function of the activation that has no rule.
    """

    def __init__(self, start: torch.Tensor, kind: str) -> None:
        rules: dict[str, Callable[[Call], Any]] = dict.fromkeys(KEEP_RELEVANCE, lambda call: call.run())
        rules |= dict.fromkeys(PASS_RELEVANCE, self._pass_through)
        rules |= dict.fromkeys(AVERAGE_POOLINGS, self._in_proportion)
        rules |= dict.fromkeys(LINEAR, self._z_plus) | dict.fromkeys(SUMS, self._add)
        rules |= dict.fromkeys(SCALINGS, self._scale)
        super().__init__(start, rules, self._refuse)
        self._kind = kind
        # The relevance that each rule loses in a backward pass; None except while conservation() runs.
        self._losses: list[torch.Tensor] | None = None

    def conservation(
        self, outputs: Sequence[torch.Tensor], scores: torch.Tensor, start: torch.Tensor
    ) -> float:
        """Returns the share of the output's relevance that arrives at the activation; 1 if it is conserved.

        Relevance of both signs could cancel, so this backward pass starts from magnitudes: those of the
        gradient of the scores with respect to the outputs. Relevance that bypasses the layer, through a skip
        connection for example, counts as arrived, because only the losses of the rules are subtracted.

        Args:
            outputs: the tensors of the model's output, computed within this context.
            scores: the scores, computed from them.
            start: the activation at which the context begins.

        Returns:
            The share; it is above 1 if relevance was added on the way.
        """
        ones = torch.ones_like(scores)
        towards: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            scores, outputs, ones, retain_graph=True, allow_unused=True
        )
        begun = [(o, t.abs()) for o, t in zip(outputs, towards, strict=True) if t is not None]
        # The backward pass runs for its side effect: the rules note their losses.
        self._losses = []
        torch.autograd.grad([o for o, _ in begun], start, [t for _, t in begun], retain_graph=True)
        lost, self._losses = sum(float(loss) for loss in self._losses), None
        total = sum(float(t.sum()) for _, t in begun)
        return 1 - lost / total if total else 1.0

    def _noting_losses(self, backward: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., Any]:
        """Wraps a backward pass so that it notes the relevance it loses while :meth:`conservation` runs."""

        def rule(relevance: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = backward(relevance, *inputs)
            if self._losses is not None:
                self._losses.append(relevance.double().sum() - sum(part.double().sum() for part in parts))
            return parts

        return rule

    def _pass_through(self, call: Call) -> torch.Tensor:
        return with_backward(call.run, lambda relevance: (relevance,), call.args[0], keep=False)

    def _in_proportion(self, call: Call) -> torch.Tensor:
        def backward(relevance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
            share = safe_divide(relevance, call.run(x))
            return (x * vector_jacobian(call.run, x, share),)

        return with_backward(call.run, self._noting_losses(backward), call.args[0])

    def _z_plus(self, call: Call) -> torch.Tensor:
        given = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if self.reached(weight):  # the product of two activations has no rule
            self._refuse(call)

        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            result: torch.Tensor = call.function(x, weight, bias, *call.args[3:], **given)
            return result

        def backward(relevance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
            w = weight.detach()
            # A contribution is positive if input and weight are both positive or both negative.
            signs = [(x.clamp(min=0), w.clamp(min=0)), (x.clamp(max=0), w.clamp(max=0))]
            share = safe_divide(relevance, run(*signs[0]) + run(*signs[1]))
            first, second = (x * vector_jacobian(partial(run, weight=w), x, share) for x, w in signs)
            return (first + second,)

        return with_backward(lambda x: run(x, weight, bias), self._noting_losses(backward), x)

    def _add(self, call: Call) -> torch.Tensor:
        x, other = call.args[:2]
        if call.kwargs:  # alpha, which would scale the second summand
            self._refuse(call)
        if not self.reached(x):
            x, other = other, x
        if not self.reached(other) and _is_constant(other, x):  # it acts as a bias, which gets no relevance
            return with_backward(lambda x: x + other, lambda relevance: (relevance,), x, keep=False)

        def backward(
            relevance: torch.Tensor, x: torch.Tensor, other: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            share = safe_divide(relevance, x + other)
            # A summand that was broadcast gets the relevance of all its copies.
            return tuple((summand * share).sum_to_size(summand.shape) for summand in (x, other))

        # The other summand may be an activation that bypasses the start. It takes its part of the relevance.
        return with_backward(torch.add, self._noting_losses(backward), x, other)

    def _scale(self, call: Call) -> torch.Tensor:
        x, other = call.args[:2]
        if call.name == "mul" and not self.reached(x):
            x, other = other, x
        # A product of two activations has no rule, and neither has a constant divided by an activation.
        if call.kwargs or self.reached(other) or not self.reached(x) or not _is_constant(other, x):
            self._refuse(call)
        return with_backward(lambda x: call.function(x, other), lambda relevance: (relevance,), x, keep=False)

    def _refuse(self, call: Call) -> Any:
        """Raises a ``ValueError``, unless the result holds no floats and so carries no relevance."""
        result = call.run()
        if any(t.is_floating_point() for t in tensors_in(result)):
            expected = "an architecture of convolutions, linear layers, ReLUs, poolings and sums"
            got = f"{self._kind}, which uses {call.name!r} after the layer"
            hint = "there relevance has no rule; a method of gradients serves"
            raise ValueError(checks.error_message("model", expected, got, hint))
        return result


def _is_constant(value: object, like: torch.Tensor) -> bool:
    """Whether a value is the same for all images: a number, parameter, or tensor without a row per image."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return True
    return value.ndim < like.ndim or len(value) != len(like)
