"""Heads that are linear in the pooled activation, as the record of a dry run shows them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks
from camkit.functions import AVERAGE_POOLINGS, CONVOLUTIONS, POOLINGS, RESHAPES
from camkit.layers.location import Location
from camkit.layers.trace import Operation, Trace, ValueRef


@dataclass(frozen=True)
class Head:
    """A head of global pooling, then perhaps a layer normalisation, then perhaps one linear layer.

    It holds the names of the parameters and not their numbers, because these may change between calls.

    Attributes:
        pooling: ``"avg"`` or ``"max"``.
        weight: dotted name of the weight of the linear layer; ``None`` if the pooled channels are the logits.
        bias: dotted name of its bias, if it has one.
        norm: dotted names of the parameters of the layer normalisation, as ``"weight"`` and ``"bias"``;
            ``None`` without such a normalisation.
        eps: epsilon of the layer normalisation.
    """

    pooling: str
    weight: str | None = None
    bias: str | None = None
    norm: Mapping[str, str] | None = None
    eps: float = 0.0

    def weights_and_bias(
        self, model: nn.Module, pooled: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Returns the weights and biases that make the logits of some classes from the pooled activation.

        The logit of class c is :math:`\sum_k w_k p_k + b` for pooled channels p. A layer normalisation with
        :math:`\gamma, \beta` leaves it linear for each image: :math:`w_k` becomes
        :math:`(w_k \gamma_k - \operatorname{mean}_j w_j \gamma_j) / \sigma`, and b grows by
        :math:`\sum_k w_k \beta_k`.

        Args:
            model: the model that has the parameters.
            pooled: pooled activation, ``(N, C)``.
            target: classes, ``(N,)`` or ``(N, K)``.

        Returns:
            The weights ``(N, K, C)`` and the biases ``(N, K)``.
        """

        def parameter(name: str) -> torch.Tensor:
            # An attribute and not an entry of state_dict(): weight_norm, for example, computes it on access.
            found: torch.Tensor = attrgetter(name)(model)
            return found.to(pooled)

        classes = target.reshape(len(pooled), -1)
        if self.weight is None:
            identity = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
            return identity[classes], pooled.new_zeros(classes.shape)
        weights = parameter(self.weight).flatten(1)[classes]  # a 1 x 1 convolution has two dimensions more
        bias = parameter(self.bias)[classes] if self.bias else pooled.new_zeros(classes.shape)
        if self.norm is None:
            return weights, bias
        if "bias" in self.norm:
            with maps.full_precision(weights):
                bias = bias + weights @ parameter(self.norm["bias"])
        if "weight" in self.norm:
            weights = weights * parameter(self.norm["weight"])
        sigma = (pooled.var(1, correction=0) + self.eps).sqrt()
        # Subtracting the mean of the weights has the same effect as subtracting the mean of the activation.
        return (weights - weights.mean(2, keepdim=True)) / sigma[:, None, None], bias


@dataclass(frozen=True)
class LocationWithHead(Location):
    """The location of the layer before the global pooling, with the head that follows it.

    Attributes:
        head: the head.
    """

    head: Head


def read_head(location: Location) -> Head:
    """Returns the head that follows a location.

    The recorded operations after the location may be one global pooling, one layer normalisation and one
    linear layer, in this order, and reshapes anywhere.

    Args:
        location: the layer before the pooling.

    Raises:
        ValueError: if another operation follows, which the message names, or if the pooling or the linear
            layer is missing.
    """
    trace = location.dry.trace
    # A global pooling leaves one entry per channel, a local one more. So compare the numbers of entries.
    pooled = trace.input_shape[0] * location.channels
    grid = pooled * math.prod(location.size)
    poolings: set[str] = set()
    head = Head("")
    value = location.after[0].inputs[0] if location.after else trace.output
    for operation in location.after:
        name = operation.name
        before, made = (math.prod(trace.shapes[v]) for v in (value, operation.outputs[0]))
        is_vector = bool(poolings) and before == pooled
        # A second activation, or a weight that depends on the image, would make the head no longer linear.
        if [v for v in operation.inputs if v in trace.from_input] != [value]:
            raise ValueError(_blocked_message(location, operation))
        if name in RESHAPES | {"getitem"} and made == before:
            pass
        elif name == "getitem" and made == grid and not poolings:
            pass  # only the tokens outside the grid are dropped
        elif name in POOLINGS and not is_vector and (made < before or made == pooled):
            # A mean over one side and then over the other adds the same name twice.
            poolings.add("avg" if name in AVERAGE_POOLINGS else "max")
        elif name == "layer_norm" and is_vector and head.weight is None and head.norm is None:
            eps = operation.kwargs.get("eps", operation.args[4] if len(operation.args) > 4 else 1e-5)
            head = replace(head, norm=_parameters(trace, operation, start=2), eps=eps)
        elif is_vector and head.weight is None and (name == "linear" or _is_pointwise(trace, operation)):
            parameters = _parameters(trace, operation, start=1)
            # The weight of a parametrized layer is computed, so it is not among the trace's parameters.
            weight = parameters.get("weight", f"{operation.module}.weight")
            head = replace(head, weight=weight, bias=parameters.get("bias"))
        else:
            raise ValueError(_blocked_message(location, operation))
        value = operation.outputs[0]
    # Without a linear layer the pooled channels must be the output.
    if len(poolings) != 1 or not (head.weight or location.channels == trace.shapes[value][-1]):
        got = f"{location.dry.kind}, which does not have both after {location.name!r}"
        raise ValueError(checks.error_message("model", "one global pooling and a linear layer", got))
    return replace(head, pooling=poolings.pop())


def _parameters(trace: Trace, operation: Operation, start: int) -> dict[str, str]:
    """Returns the dotted names of an operation's ``"weight"`` and ``"bias"``, if they are parameters.

    ``start`` is the position of the weight among the arguments; the bias follows it.
    """
    given = dict(zip(("weight", "bias"), operation.args[start:], strict=False)) | operation.kwargs
    values = {
        role: given[role].number for role in ("weight", "bias") if isinstance(given.get(role), ValueRef)
    }
    return {role: trace.parameters[value] for role, value in values.items() if value in trace.parameters}


def _is_pointwise(trace: Trace, operation: Operation) -> bool:
    """Whether an operation is a 1 x 1 convolution in one group, a linear layer at each position."""
    if operation.name not in CONVOLUTIONS:
        return False
    shapes = [trace.shapes[v] for v in operation.inputs]
    return len(shapes[1]) > 2 and math.prod(shapes[1][2:]) == 1 and shapes[1][1] == shapes[0][1]


def _blocked_message(location: Location, operation: Operation) -> str:
    """Returns the message about an operation that makes a head not linear in the pooled activation."""
    where = f" in {operation.module!r}" if operation.module else ""
    return checks.error_message(
        "model",
        "only global pooling and one linear layer after the last activation",
        f"{location.dry.kind}, where {operation.name!r}{where} is in the way after {location.name!r}",
        "camkit.attach_gap_head(model, num_classes) makes a network that CAM explains, "
        "and camkit.GradCAM explains this one",
    )
