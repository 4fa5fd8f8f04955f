"""CAM: exact class activation maps of networks that end in global pooling and one linear layer."""

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
    r"""Class activation map: weights each channel of the last activation by its weight in the linear layer.

    Here :math:`A^k` is channel k of the activation before the pooling, :math:`w^c_k` the weight from channel
    k to class c in the linear layer, :math:`b^c` its bias, and :math:`y^c` the logit of the class.

    The map is exact for every network that ends in global average pooling and one linear layer: its mean plus
    the bias is the logit, and every call checks that. It needs neither a gradient nor a change of the
    network. These heads are supported too:

    - A last convolution with one channel per class, followed by the pooling (SqueezeNet). The map is the
      channel of the class.
    - A layer normalisation with weight :math:`\gamma` between the pooling and the linear layer (ConvNeXt). It
      is linear for each image: :math:`w^c_k` becomes
      :math:`(w^c_k \gamma_k - \operatorname{mean}_j w^c_j \gamma_j) / \sigma`, with :math:`\sigma` the
      standard deviation of the pooled activation.
    - Global max pooling (Oquab et al., CVPR 2015). The map is the same sum, but its mean is not the logit;
      every call checks the sum of the weighted channel maxima instead.

    :func:`camkit.attach_gap_head` builds a network that CAM can explain from any other. Targets must be
    classes.

    For the shared arguments, see :class:`camkit.Explainer`. CAM takes only ``model`` and ``differentiable``,
    because it can explain no other layer than the one before the pooling.

    Raises:
        TypeError: if ``model`` is not a module. A call raises it for a target that is not classes.
        ValueError: at the call, if the network has another head. The message names the operation that does
            not fit.

    Departs from the paper: nothing.

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

    formula = r"M = \sum_k w^c_k A^k, \qquad y^c = \operatorname{mean}(M) + b^c"
    paper = "Zhou et al., CVPR 2016"
    passes = "1 forward"
    needs_gradient = False
    keeps_graph = True

    def __init__(self, model: nn.Module, *, differentiable: bool = False) -> None:
        super().__init__(model, differentiable=differentiable)

    def find(self, dry: DryRun) -> list[Location]:
        """Returns the layer before the pooling, with the head that follows it.

        Raises:
            ValueError: if CAM cannot explain the head.
        """
        require_floats(self.model)
        location = find_before_pooling(dry)
        head = read_head(location)
        module, _, name = (head.weight or "").rpartition(".")
        owner = self.model.get_submodule(module)
        # Look the weight up without reading it: with spectral_norm, reading it in training mode changes it.
        if name and not (name in {**vars(owner), **owner._parameters} or hasattr(type(owner), name)):
            got = f"{location.dry.kind}, where {module!r} computes it"
            raise ValueError(checks.error_message("model", "a linear layer that has its weight", got))
        found = {field.name: getattr(location, field.name) for field in fields(location)}
        return [LocationWithHead(**found, head=head)]

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed."""
        classes = evidence.bound.plain_classes
        if classes is None:
            raise TypeError(checks.error_message("target", "classes, the only targets of CAM", "a function"))
        location = cast(LocationWithHead, evidence.location)  # the type that find() returns
        # Apply the functions between the layer and the pooling, such as DenseNet's last ReLU. The logits are
        # linear in their result, but not in the layer's own output.
        head, activation = location.head, location.activation(evidence.activation)
        flat = activation.flatten(2)
        pooled = flat.mean(2) if head.pooling == "avg" else flat.amax(2)
        weights, bias = head.weights_and_bias(self.model, pooled, classes)
        summands = weights * pooled[:, None]
        _require_sums_to_logits(evidence, summands, bias)
        return maps.weighted_sum(weights, activation)


def _require_sums_to_logits(evidence: Evidence, summands: torch.Tensor, bias: torch.Tensor) -> None:
    """Raises a ``ValueError`` unless the summands ``(N, K, C)`` and the bias add up to the logits.

    Rounding errors are allowed.
    """
    predicted = summands.sum(2) + bias
    expected = evidence.scores.reshape(predicted.shape).to(predicted)
    eps = max(torch.finfo(t.dtype).eps for t in (evidence.scores, summands))
    # Try a quick test first. It is stricter than needed, but nearly all calls pass it.
    if torch.allclose(predicted, expected, rtol=eps**0.5, atol=0):
        return
    # Large summands may cancel, so that their rounding errors are large compared with the sum.
    scale = summands.abs().sum(2) + bias.abs()
    error = (predicted - expected).abs()
    # Write "not <=" instead of ">", so that an error of NaN is reported if the activation is finite.
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
