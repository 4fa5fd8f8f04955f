"""CAM: exact class activation maps of networks that pool and then are linear."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from camkit import _checks, layers
from camkit.dryrun import DryRun
from camkit.evidence import Evidence
from camkit.explainer import Explainer
from camkit.layers import Location
from camkit.trace import Operation

_POOLINGS = {
    "mean": "avg",
    "amax": "max",
    **{f"{a}{kind}_pool{d}d": kind for a in ("", "adaptive_") for kind in ("avg", "max") for d in (1, 2, 3)},
}
_RESHAPES = {"flatten", "view", "reshape", "squeeze", "permute", "transpose", "contiguous"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}


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

    needs_gradient = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def find(self, dry: DryRun) -> Location:
        """The layer before the pooling, if the head is one that CAM can explain."""
        location = layers.find_before_pooling(dry)
        _read_head(location)
        return location

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        if callable(evidence.target):
            raise TypeError(_checks.complaint("target", "classes, which are what CAM explains", "a function"))
        head = _read_head(evidence.location)
        activation = evidence.location.activation()(evidence.activation)
        flat = activation.flatten(2)
        pooled = flat.mean(2) if head.pooling == "avg" else flat.amax(2)
        weights, bias = head.weights_and_bias(self.model, pooled, evidence.target)
        summands = weights * pooled[:, None]
        _check_exact(evidence, summands, bias)
        return torch.einsum("nkc,nc...->nk...", weights, activation)


@dataclass(frozen=True)
class _Head:
    """A head that is linear in the pooled activation, by the names of its parameters."""

    pooling: str
    linear: tuple[str, ...] = ()
    norm: tuple[str, ...] | None = None
    eps: float = 0.0

    def weights_and_bias(
        self, model: nn.Module, pooled: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What multiplies each channel, ``(N, K, C)``, and what is added, ``(N, K)``."""
        classes = target.reshape(len(pooled), -1)
        if not self.linear:
            identity = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
            return identity[classes], pooled.new_zeros(classes.shape)
        weight, *bias = (model.get_parameter(name).detach().to(pooled) for name in self.linear)
        weights = weight.flatten(1)[classes]
        offset = bias[0][classes] if bias else pooled.new_zeros(classes.shape)
        if self.norm is None:
            return weights, offset
        gamma, beta = (model.get_parameter(name).detach().to(pooled) for name in self.norm)
        offset = offset + weights @ beta
        weights = weights * gamma
        sigma = (pooled.var(1, correction=0) + self.eps).sqrt()
        return (weights - weights.mean(2, keepdim=True)) / sigma[:, None, None], offset


def _read_head(location: Location) -> _Head:
    """The head that follows a location.

    Raises:
        ValueError: if it is not linear in the pooled activation.
    """
    trace = location.dry.trace
    pooling, norm, eps = None, None, 0.0
    linear: tuple[str, ...] = ()
    value = location.after[0].inputs[0] if location.after else trace.output
    vectors = trace.shapes[value][0] * location.channels
    for operation in location.after:
        parameters = tuple(trace.parameters[v] for v in operation.inputs if v in trace.parameters)
        data = [v for v in operation.inputs if v not in trace.parameters]
        made = math.prod(trace.shapes[operation.outputs[0]])
        if data != [value]:
            raise ValueError(_in_the_way(location, operation))
        if operation.name in _RESHAPES and made == math.prod(trace.shapes[value]):
            pass
        elif pooling is None and operation.name in _POOLINGS and made == vectors:
            pooling = _POOLINGS[operation.name]
        elif pooling and not linear and not norm and operation.name == "layer_norm" and len(parameters) == 2:
            norm = parameters
            eps = operation.kwargs.get("eps", operation.args[4] if len(operation.args) > 4 else 1e-5)
        elif pooling and not linear and operation.name in _LINEAR and parameters:
            linear = parameters
        else:
            raise ValueError(_in_the_way(location, operation))
        value = operation.outputs[0]
    if pooling is None or not (linear or location.channels == trace.shapes[value][-1]):
        got = f"{location.dry.kind}, which has none after {location.name!r}"
        raise ValueError(_checks.complaint("model", "global pooling and a linear layer", got))
    return _Head(pooling, linear, norm, eps)


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
    scale = summands.abs().sum(2) + bias.abs()
    eps = max(torch.finfo(t.dtype).eps for t in (evidence.scores, summands))
    error = (predicted - evidence.scores).abs()
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
