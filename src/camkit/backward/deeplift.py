r"""DeepLIFT's rescale rule: multipliers in the place of gradients.

What follows the layer runs twice: first on the reference, where the input of each function of one number is
kept, and then on the activation. There such a function has the multiplier :math:`\Delta f / \Delta x` in the
place of its derivative, and max pooling gives its difference to the position that made it. Everything else
keeps its gradient: exact for what is linear.

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
    """A context that keeps the inputs of functions that have a rule, in the order of their calls.

    Args:
        start: the reference, which is what the layer gives.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self.inputs: list[torch.Tensor] = []
        super().__init__(start, dict.fromkeys(ACTIVATIONS | MAX_WINDOWS, self._keep))

    def _keep(self, call: Call) -> torch.Tensor:
        self.inputs.append(call.args[0].clone())
        result: torch.Tensor = call.run()
        return result


def multipliers(start: torch.Tensor, reference: Recorded) -> Propagation:
    """A context in which gradients by ``start`` are multipliers.

    Args:
        start: the activation, which is what the layer gives.
        reference: the run to compare with.
    """
    inputs = iter(reference.inputs)

    def rule(call: Call) -> torch.Tensor:
        back = _max_pool if call.name in MAX_WINDOWS else _rescale
        then = next(inputs, None)
        if then is None or then.shape != call.args[0].shape:
            expected = "one that does the same with an activation of zeros, which DeepLIFT compares with"
            got = f"one that chooses by numbers before {call.name!r}"
            raise ValueError(checks.error_message("model", expected, got))
        return with_backward(call.run, lambda arriving, x: (back(call, arriving, x, then),), call.args[0])

    return Propagation(start, dict.fromkeys(ACTIVATIONS | MAX_WINDOWS, rule))


def _rescale(call: Call, arriving: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    # Where both are the same but for rounding, the multiplier's limit: the derivative.
    near = (now - then).abs() <= torch.finfo(now.dtype).eps ** 0.75 * torch.maximum(now.abs(), then.abs())
    derivative = vector_jacobian(call.run, now, torch.ones_like(now))
    return arriving * torch.where(near, derivative, (call.run(now) - call.run(then)) / (now - then))


def _max_pool(call: Call, arriving: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    dims, with_indices = int(call.name[-2]), getattr(F, f"{call.name}_with_indices")
    settings = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
    (out, at), (out_then, at_then) = (with_indices(x, *call.args[1:], **settings) for x in (now, then))
    place = torch.where(out >= out_then, at, at_then).flatten(-dims)
    given = ((out - out_then) * arriving).flatten(-dims)
    difference = (now - then).flatten(-dims)
    contribution = torch.zeros_like(difference).scatter_add(-1, place, given)
    return safe_divide(contribution, difference).reshape(now.shape)
