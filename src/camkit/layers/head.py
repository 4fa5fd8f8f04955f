"""Heads that are linear in the pooled activation, read off a dry run."""

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
    """A head that is linear in the pooled activation, by the names of its parameters."""

    pooling: str
    weight: str | None = None
    bias: str | None = None
    norm: Mapping[str, str] | None = None
    eps: float = 0.0

    def weights_and_bias(
        self, model: nn.Module, pooled: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What multiplies each channel, ``(N, K, C)``, and what is added, ``(N, K)``."""

        def parameter(name: str) -> torch.Tensor:
            found: torch.Tensor = attrgetter(name)(model)  # perhaps computed on reading: weight_norm's is
            return found.to(pooled)

        classes = target.reshape(len(pooled), -1)
        if self.weight is None:
            identity = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
            return identity[classes], pooled.new_zeros(classes.shape)
        weights = parameter(self.weight).flatten(1)[classes]
        bias = parameter(self.bias)[classes] if self.bias else pooled.new_zeros(classes.shape)
        if self.norm is None:
            return weights, bias
        if "bias" in self.norm:
            with maps.full_precision(weights):
                bias = bias + weights @ parameter(self.norm["bias"])
        if "weight" in self.norm:
            weights = weights * parameter(self.norm["weight"])
        sigma = (pooled.var(1, correction=0) + self.eps).sqrt()
        return (weights - weights.mean(2, keepdim=True)) / sigma[:, None, None], bias


@dataclass(frozen=True)
class LocationWithHead(Location):
    """The layer before the pooling, with the head that follows it."""

    head: Head


def read_head(location: Location) -> Head:
    """The head that follows a location.

    Raises:
        ValueError: if it is not linear in the pooled activation.
    """
    trace = location.dry.trace
    pooled = trace.input_shape[0] * location.channels
    grid = pooled * math.prod(location.size)
    poolings: set[str] = set()
    head = Head("")
    value = location.after[0].inputs[0] if location.after else trace.output
    for operation in location.after:
        name = operation.name
        before, made = (math.prod(trace.shapes[v]) for v in (value, operation.outputs[0]))
        is_vector = bool(poolings) and before == pooled
        if [v for v in operation.inputs if v in trace.from_input] != [value]:
            raise ValueError(_blocked_message(location, operation))
        if name in RESHAPES | {"getitem"} and made == before:
            pass
        elif name == "getitem" and made == grid and not poolings:
            pass  # only the tokens beside the grid are left out
        elif name in POOLINGS and not is_vector and (made < before or made == pooled):
            poolings.add("avg" if name in AVERAGE_POOLINGS else "max")  # perhaps one side after the other
        elif name == "layer_norm" and is_vector and head.weight is None and head.norm is None:
            eps = operation.kwargs.get("eps", operation.args[4] if len(operation.args) > 4 else 1e-5)
            head = replace(head, norm=_parameters(trace, operation, start=2), eps=eps)
        elif is_vector and head.weight is None and (name == "linear" or _is_pointwise(trace, operation)):
            parameters = _parameters(trace, operation, start=1)
            weight = parameters.get("weight", f"{operation.module}.weight")  # of a parametrized layer
            head = replace(head, weight=weight, bias=parameters.get("bias"))
        else:
            raise ValueError(_blocked_message(location, operation))
        value = operation.outputs[0]
    if len(poolings) != 1 or not (head.weight or location.channels == trace.shapes[value][-1]):
        got = f"{location.dry.kind}, which has not both after {location.name!r}"
        raise ValueError(checks.error_message("model", "one global pooling and a linear layer", got))
    return replace(head, pooling=poolings.pop())


def _parameters(trace: Trace, operation: Operation, start: int) -> dict[str, str]:
    """The names of an operation's weight and bias, which stand from position ``start`` on."""
    given = dict(zip(("weight", "bias"), operation.args[start:], strict=False)) | operation.kwargs
    values = {
        role: given[role].number for role in ("weight", "bias") if isinstance(given.get(role), ValueRef)
    }
    return {role: trace.parameters[value] for role, value in values.items() if value in trace.parameters}


def _is_pointwise(trace: Trace, operation: Operation) -> bool:
    """Whether it is a convolution that is one matrix: 1 x 1, in one group."""
    if operation.name not in CONVOLUTIONS:
        return False
    shapes = [trace.shapes[v] for v in operation.inputs]
    return len(shapes[1]) > 2 and math.prod(shapes[1][2:]) == 1 and shapes[1][1] == shapes[0][1]


def _blocked_message(location: Location, operation: Operation) -> str:
    where = f" in {operation.module!r}" if operation.module else ""
    return checks.error_message(
        "model",
        "only global pooling and one linear layer after the last activation",
        f"{location.dry.kind}, where {operation.name!r}{where} is in the way after {location.name!r}",
        "camkit.attach_gap_head(model, num_classes) makes a network that CAM explains, "
        "and camkit.GradCAM explains this one",
    )
