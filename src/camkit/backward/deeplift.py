r"""DeepLIFT's rescale rule: a backward pass that returns multipliers instead of gradients.

A multiplier is the change of the score divided by the change of the activation, both measured from a
*reference* activation. The part of the model after the layer therefore runs twice. In the first run, on the
reference, :class:`Recorded` keeps the input of each function that has a rule. The second run, on the
activation, is within :func:`multipliers`. In its backward pass

- an element-wise activation function f has the multiplier :math:`\Delta f / \Delta x` instead of its
  derivative;
- max pooling assigns the change of each maximum to the position of the larger of the two maxima;
- all other functions keep their gradient, which is exact where they are linear.

References:
    Shrikumar et al., *Learning Important Features Through Propagating Activation Differences*, ICML 2017,
    section 3.5.1.
"""

import torch
from torch.nn import functional as F

from camkit._tools import checks
from camkit.backward.propagation import Propagation, vector_jacobian, with_backward
from camkit.functions import ACTIVATIONS, MAX_WINDOWS, Call
from camkit.maps import safe_divide


class Recorded(Propagation):
    """A context that keeps the inputs of the functions with a rule, in the order of their calls.

    Args:
        start: the reference activation, which the layer outputs in this run.

    Attributes:
        inputs: the inputs that were kept.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self.inputs: list[torch.Tensor] = []
        super().__init__(start, dict.fromkeys(ACTIVATIONS | MAX_WINDOWS, self._keep))

    def _keep(self, call: Call) -> torch.Tensor:
        # A copy, because a later function may change the tensor in place.
        self.inputs.append(call.args[0].clone())
        result: torch.Tensor = call.run()
        return result


def multipliers(start: torch.Tensor, reference: Recorded) -> Propagation:
    """A context in which gradients with respect to ``start`` are DeepLIFT's multipliers.

    Args:
        start: the activation, which the layer outputs in this run.
        reference: the finished run on the reference activation.

    Raises:
        ValueError: within the context, if the model calls other functions than it did on the reference.
    """
    inputs = iter(reference.inputs)

    def rule(call: Call) -> torch.Tensor:
        back = _max_pool if call.name in MAX_WINDOWS else _rescale
        # Both runs call the same functions in the same order, so the next kept input belongs to this call.
        then = next(inputs, None)
        if then is None or then.shape != call.args[0].shape:
            expected = "one that does the same with an activation of zeros, which DeepLIFT compares with"
            got = f"one that chooses by numbers before {call.name!r}"
            raise ValueError(checks.error_message("model", expected, got))
        return with_backward(call.run, lambda arriving, x: (back(call, arriving, x, then),), call.args[0])

    return Propagation(start, dict.fromkeys(ACTIVATIONS | MAX_WINDOWS, rule))


def _rescale(call: Call, arriving: torch.Tensor, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Multiplies the arriving multiplier by that of an element-wise function."""
    # Where both inputs are equal up to rounding, the quotient is 0 / 0 or noise. Its limit is the derivative.
    size = torch.maximum(x.abs(), reference.abs())
    near = (x - reference).abs() <= torch.finfo(x.dtype).eps ** 0.75 * size
    derivative = vector_jacobian(call.run, x, torch.ones_like(x))
    quotient = (call.run(x) - call.run(reference)) / (x - reference)
    return arriving * torch.where(near, derivative, quotient)


def _max_pool(call: Call, arriving: torch.Tensor, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Turns the multipliers at the output of max pooling into multipliers at its input."""
    dims, with_indices = int(call.name[-2]), getattr(F, f"{call.name}_with_indices")
    settings = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
    (out, at), (out_reference, at_reference) = (
        with_indices(tensor, *call.args[1:], **settings) for tensor in (x, reference)
    )
    # The position of the larger maximum, as an index into the flattened spatial dimensions.
    place = torch.where(out >= out_reference, at, at_reference).flatten(-dims)
    given = ((out - out_reference) * arriving).flatten(-dims)
    difference = (x - reference).flatten(-dims)
    # Windows may overlap, so a position can receive the changes of several maxima.
    contribution = torch.zeros_like(difference).scatter_add(-1, place, given)
    return safe_divide(contribution, difference).reshape(x.shape)
