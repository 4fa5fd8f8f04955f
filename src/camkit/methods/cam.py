"""CAM: exact class activation maps of networks that pool and then are linear."""

from dataclasses import fields
from typing import cast

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks
from camkit.layers.dryrun import DryRun
from camkit.layers.head import LocationWithHead, read_head
from camkit.layers.location import Location
from camkit.layers.search import find_before_pooling
from camkit.methods.explainer import Explainer
from camkit.model.modules import require_floats
from camkit.passes.evidence import Evidence


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
        require_floats(self.model)
        location = find_before_pooling(dry)
        head = read_head(location)
        module, _, name = (head.weight or "").rpartition(".")
        owner = self.model.get_submodule(module)
        # Looked up and not read: reading the weight of spectral_norm changes it in training mode.
        if name and not (name in {**vars(owner), **owner._parameters} or hasattr(type(owner), name)):
            got = f"{location.dry.kind}, where {module!r} computes it"
            raise ValueError(checks.error_message("model", "a linear layer that has its weight", got))
        found = {field.name: getattr(location, field.name) for field in fields(location)}
        return [LocationWithHead(**found, head=head)]

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        classes = evidence.bound.plain_classes
        if classes is None:
            raise TypeError(
                checks.error_message("target", "classes, which are what CAM explains", "a function")
            )
        location = cast(LocationWithHead, evidence.location)  # as find() gives it
        head, activation = location.head, location.activation(evidence.activation)
        flat = activation.flatten(2)
        pooled = flat.mean(2) if head.pooling == "avg" else flat.amax(2)
        weights, bias = head.weights_and_bias(self.model, pooled, classes)
        summands = weights * pooled[:, None]
        _check_exact(evidence, summands, bias)
        return maps.weighted_sum(weights, activation)


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
            checks.error_message(
                "model",
                "logits that are the linear layer of the pooled activation",
                f"{evidence.location.dry.kind}, whose logits differ from that by up to "
                f"{error.max().item():.3g}",
                "camkit.GradCAM explains any head",
            )
        )
