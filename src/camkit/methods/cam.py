"""CAM: exact class activation maps of networks that pool and then are linear."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import cast

import torch
from torch import nn

from camkit import _checks, layers, maps
from camkit.dryrun import DryRun
from camkit.evidence import Evidence
from camkit.explainer import Explainer
from camkit.layers import Location
from camkit.trace import Operation, Trace, Value


class CAM(Explainer):
    r"""Class activation map: the last activation weighed by the class's weights in the linear layer.

    .. math::
        M_c = \sum_k w^c_k A^k, \qquad y_c = \operatorname{mean}(M_c) + b_c

    It is exact, and needs neither a gradient nor surgery, for every network that ends in global pooling and
    one linear layer; every call checks the second equation. A network whose last convolution makes
    one channel a class and pools it (SqueezeNet) gives these channels. A layer normalisation between the
    pooling and the linear layer (ConvNeXt) is linear for each image, with :math:`w^c_k` replaced by
    :math:`(w^c_k \gamma_k - \operatorname{mean}_j w^c_j \gamma_j) / \sigma`.

    Targets are classes: there is no map of another function of the output.

    Args:
        model: a network that ends so; any other becomes one with :func:`camkit.attach_gap_head`.
        differentiable: whether maps and output keep their graph, as for :class:`GradCAM`.

    Raises:
        TypeError: if ``model`` is no module.

    A call also raises a ``ValueError`` for a network with another head; it names the operation in the way.

    Departs from the paper: nothing. With global max pooling (Oquab et al., CVPR 2015) the map is the same
    sum, and its mean is not the logit.

    Example:
        >>> import camkit, torch, torchvision
        >>> model = torchvision.models.resnet18().eval()
        >>> explanation = camkit.CAM(model)(torch.rand(1, 3, 64, 64), target=7)
        >>> logit = explanation.maps.mean() + model.fc.bias[7]
        >>> torch.allclose(logit, explanation.output[0, 7], atol=1e-4)
        True

    References:
        Zhou et al., *Learning Deep Features for Discriminative Localization*, CVPR 2016, equations 1 and 2.
    """

    formula = r"\sum_k w^c_k A^k"
    paper = "Zhou et al., CVPR 2016"
    passes = "1 forward"
    needs_gradient = False
    keeps_graph = True

    def __init__(self, model: nn.Module, *, differentiable: bool = False) -> None:
        super().__init__(model, differentiable=differentiable)

    def find(self, dry: DryRun) -> list[Location]:
        """The layer before the pooling, if the head is one that CAM can explain."""
        layers.require_floats(self.model)
        location = layers.find_before_pooling(dry)
        head = _read_head(location)
        module, _, name = (head.weight or "").rpartition(".")
        owner = self.model.get_submodule(module)
        # Looked up and not read: reading the weight of spectral_norm changes it in training mode.
        if name and not (name in {**vars(owner), **owner._parameters} or hasattr(type(owner), name)):
            got = f"{location.dry.kind}, where {module!r} computes it"
            raise ValueError(_checks.complaint("model", "a linear layer that has its weight", got))
        found = {field.name: getattr(location, field.name) for field in fields(location)}
        return [_BeforePooling(**found, head=head)]

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        classes = evidence.bound.classes
        if classes is None:
            raise TypeError(_checks.complaint("target", "classes, which are what CAM explains", "a function"))
        location = cast(_BeforePooling, evidence.location)  # as find() gives it
        head, activation = location.head, location.activation(evidence.activation)
        flat = activation.flatten(2)
        pooled = flat.mean(2) if head.pooling == "avg" else flat.amax(2)
        weights, bias = head.weights_and_bias(self.model, pooled, classes)
        summands = weights * pooled[:, None]
        _check_exact(evidence, summands, bias)
        return maps.weighted_sum(weights, activation)


@dataclass(frozen=True)
class _Head:
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
class _BeforePooling(Location):
    """The layer before the pooling, with the head that follows it."""

    head: _Head


def _read_head(location: Location) -> _Head:
    """The head that follows a location.

    Raises:
        ValueError: if it is not linear in the pooled activation.
    """
    trace = location.dry.trace
    pooled = trace.input_shape[0] * location.channels
    grid = pooled * math.prod(location.size)
    poolings: set[str] = set()
    head = _Head("")
    value = location.after[0].inputs[0] if location.after else trace.output
    for operation in location.after:
        name = operation.name
        before, made = (math.prod(trace.shapes[v]) for v in (value, operation.outputs[0]))
        is_vector = bool(poolings) and before == pooled
        if [v for v in operation.inputs if v in trace.from_input] != [value]:
            raise ValueError(_in_the_way(location, operation))
        if name in layers.RESHAPES | {"__getitem__"} and made == before:
            pass
        elif name == "__getitem__" and made == grid and not poolings:
            pass  # only the tokens beside the grid are left out
        elif name in layers.POOLINGS and not is_vector and (made < before or made == pooled):
            poolings.add(layers.POOLINGS[name])  # perhaps one side after the other
        elif name == "layer_norm" and is_vector and head.weight is None and head.norm is None:
            eps = operation.kwargs.get("eps", operation.args[4] if len(operation.args) > 4 else 1e-5)
            head = replace(head, norm=_parameters(trace, operation, start=2), eps=eps)
        elif is_vector and head.weight is None and (name == "linear" or _is_pointwise(trace, operation)):
            parameters = _parameters(trace, operation, start=1)
            weight = parameters.get("weight", f"{operation.module}.weight")  # of a parametrized layer
            head = replace(head, weight=weight, bias=parameters.get("bias"))
        else:
            raise ValueError(_in_the_way(location, operation))
        value = operation.outputs[0]
    if len(poolings) != 1 or not (head.weight or location.channels == trace.shapes[value][-1]):
        got = f"{location.dry.kind}, which has not both after {location.name!r}"
        raise ValueError(_checks.complaint("model", "one global pooling and a linear layer", got))
    return replace(head, pooling=poolings.pop())


def _parameters(trace: Trace, operation: Operation, start: int) -> dict[str, str]:
    """The names of an operation's weight and bias, which stand from position ``start`` on."""
    given = dict(zip(("weight", "bias"), operation.args[start:], strict=False)) | operation.kwargs
    values = {role: given[role].number for role in ("weight", "bias") if isinstance(given.get(role), Value)}
    return {role: trace.parameters[value] for role, value in values.items() if value in trace.parameters}


def _is_pointwise(trace: Trace, operation: Operation) -> bool:
    """Whether it is a convolution that is one matrix: 1 x 1, in one group."""
    if operation.name not in layers.CONVOLUTIONS:
        return False
    shapes = [trace.shapes[v] for v in operation.inputs]
    return len(shapes[1]) > 2 and math.prod(shapes[1][2:]) == 1 and shapes[1][1] == shapes[0][1]


def _in_the_way(location: Location, operation: Operation) -> str:
    where = f" in {operation.module!r}" if operation.module else ""
    return _checks.complaint(
        "model",
        "only global pooling and one linear layer after the last activation",
        f"{location.dry.kind}, where {operation.name!r}{where} is in the way after {location.name!r}",
        "camkit.attach_gap_head(model, num_classes) makes a network that CAM explains, "
        "and camkit.GradCAM explains this one",
    )


def _check_exact(evidence: Evidence, summands: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise unless the summands and the bias add up to the logits, up to rounding."""
    predicted = summands.sum(2) + bias
    expected = evidence.scores.reshape(predicted.shape).to(predicted)
    eps = max(torch.finfo(t.dtype).eps for t in (evidence.scores, summands))
    if torch.allclose(predicted, expected, rtol=eps**0.5, atol=0):
        return  # by less than the summands allow, and at once
    scale = summands.abs().sum(2) + bias.abs()
    error = (predicted - expected).abs()
    # Not "error > ...": NaN must not pass for equal where the activation is finite.
    if not (error <= eps**0.5 * scale).all() and torch.isfinite(scale).all():
        raise ValueError(
            _checks.complaint(
                "model",
                "logits that are the linear layer of the pooled activation",
                f"{evidence.location.dry.kind}, whose logits differ from that by up to "
                f"{error.max().item():.3g}",
                "camkit.GradCAM explains any head",
            )
        )
