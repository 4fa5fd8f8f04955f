r"""DeepLIFT's rescale rule: multipliers in the place of gradients.

A batch runs whose first half is explained, and whose second half is what it is compared with. A function
of one number has the multiplier :math:`\Delta f / \Delta x` in the place of its derivative; max pooling gives
its difference to the position that made it. Everything else keeps its gradient: exact for what is linear.

References:
    Shrikumar et al., *Learning Important Features Through Propagating Activation Differences*, ICML 2017,
    section 3.5.1.
"""

import torch
from torch.nn import functional as F

from camkit.propagation import ELEMENTWISE, Call, Propagation, Rule, swap, vector_jacobian


def multipliers(start: torch.Tensor) -> Propagation:
    """A context in which gradients by ``start``, of the first half of a batch, are multipliers.

    Args:
        start: the activation of the first half of the rows; what follows it has twice as many.
    """
    rules: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, _rescale)
    rules |= {f"{kind}max_pool{d}d": _max_pool for kind in ("", "adaptive_") for d in (1, 2, 3)}
    return Propagation(start, rules)


def _rescale(call: Call) -> torch.Tensor:
    def backward(arriving: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        (now, then), (out_now, out_then) = x.chunk(2), call.run(x).chunk(2)
        # Where both are the same but for rounding, the multiplier's limit: the derivative.
        near = (now - then).abs() <= torch.finfo(x.dtype).eps ** 0.75 * torch.maximum(now.abs(), then.abs())
        derivative = vector_jacobian(call.run, x, torch.ones_like(x)).chunk(2)[0]
        multiplier = torch.where(near, derivative, (out_now - out_then) / (now - then))
        return (_first_half(arriving, multiplier * arriving.chunk(2)[0]),)

    return swap(call.run, backward, call.args[0])


def _max_pool(call: Call) -> torch.Tensor:
    dims = int(call.name[-2])
    with_indices = getattr(F, f"{call.name}_with_indices")

    def backward(arriving: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        settings = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
        out, where = with_indices(x, *call.args[1:], **settings)
        (now, then), (out_now, out_then), (at_now, at_then) = x.chunk(2), out.chunk(2), where.chunk(2)
        at = torch.where(out_now >= out_then, at_now, at_then).flatten(-dims)
        given = ((out_now - out_then) * arriving.chunk(2)[0]).flatten(-dims)
        difference = (now - then).flatten(-dims)
        contribution = torch.zeros_like(difference).scatter_add(-1, at, given)
        multiplier = torch.where(difference != 0, contribution / difference, 0).reshape(now.shape)
        return (_first_half(arriving, multiplier),)

    return swap(call.run, backward, call.args[0])


def _first_half(like: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Both halves, the second zero: what is explained depends on the first alone."""
    return torch.cat([half, torch.zeros_like(half)])
