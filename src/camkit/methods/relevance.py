"""Methods that attribute the score to the layer by propagating it back by rules."""

import torch

from camkit._tools import checks
from camkit._tools.nested import tensors_in
from camkit.backward import deeplift, lrp
from camkit.backward.gradients import gradients
from camkit.maps import weighted_sum
from camkit.methods.explainer import Explainer
from camkit.passes.evidence import Evidence

# How much of a score may go astray before somebody is told.
_TOLERANCE = 0.05


class LIFTCAM(Explainer):
    r"""LIFT-CAM: the activation weighed by DeepLIFT's contribution of each channel.

    .. math::
        w_k = \sum_{ij} m^k_{ij} A^k_{ij} \approx \text{Shapley value of channel } k, \qquad
        M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big)

    with m the multipliers of what follows the layer, by the rescale rule, against an activation of zeros. Of
    tokens, the ones beside the grid stay as they are. The weights sum to the score less the score of zeros;
    a warning tells where they do not: after products of activations, normalisation over channels and
    attention, for which DeepLIFT has no rule.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: nothing.

    References:
        Jung and Oh, *Towards Better Explanations of Class Activation Mapping*, ICCV 2021.
    """

    formula = r"\mathrm{ReLU} \sum_k w_k A^k,\; w_k = \textstyle\sum m^k A^k \text{ by DeepLIFT}"
    paper = "Jung and Oh, ICCV 2021"
    passes = "1 forward, 1 backward; the head twice"
    needs_gradient = True
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        weights, differences = contributions(evidence)
        sums = weights.sum(2)
        missing = (sums - differences).abs()
        rounding = torch.finfo(sums.dtype).eps ** 0.5 * evidence.scores.abs()
        if (missing > rounding + _TOLERANCE * torch.maximum(sums.abs(), differences.abs())).any():
            worst, place = missing.argmax(), evidence.location
            checks.warn(
                f"LIFTCAM: {place.dry.kind} after {place.name!r}, or the target, has functions for which "
                f"DeepLIFT has no rule: contributions sum to {sums.flatten()[worst]:.4g} where the score "
                f"changes by {differences.flatten()[worst]:.4g}"
            )
        return weighted_sum(weights, evidence.activation).relu()


def contributions(evidence: Evidence) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepLIFT's contribution of each channel ``(N, K, C)``, and the score less that of zeros ``(N, K)``."""
    with torch.enable_grad():
        leaf = evidence.activation.clone().requires_grad_()
        zeros = torch.zeros_like(leaf)
        with torch.no_grad(), deeplift.Recorded(zeros) as reference:
            (empty,) = evidence.outputs(zeros[None])
        with deeplift.multipliers(leaf, reference):
            (output,) = evidence.outputs(leaf[None])
        scores, without = evidence.score(output), evidence.score(empty)
    multipliers = gradients(scores, leaf, evidence.location.name)
    evidence.require_reach(multipliers)
    return (multipliers * evidence.activation[:, None]).flatten(3).sum(3), (scores - without).detach()


class RelevanceCAM(Explainer):
    r"""Relevance-CAM: the activation weighed by the mean relevance of each channel, at any depth.

    .. math:: w_k = \operatorname{mean}(R^k), \qquad M = \sum_k w_k A^k

    with R the layer-wise relevance propagation of a start of 1 for the class and -1/C for each other of C
    classes. A target that is no class starts with its gradient by the model's output. It is signed.

    Args:
        model: a network of convolutions, linear layers, ReLUs, poolings and sums after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Raises:
        ValueError: at the call, if the model uses a function for which there is no rule.

    A call warns, with the ratio, if less or more relevance comes through than started.

    Departs from the paper: its text scales the start by the logit, its authors' program does not, and neither
    does this.

    References:
        Lee et al., *Relevance-CAM: Your Model Already Knows Where to Look*, CVPR 2021, equations 5 to 8.
    """

    formula = r"\sum_k \mathrm{mean}(R^k) A^k,\; R \text{ by LRP}"
    paper = "Lee et al., CVPR 2021"
    passes = "1 forward, 3 backward; the head again"
    needs_gradient = True
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        activation, place = evidence.activation, evidence.location
        start = evidence.bound.with_formula(_against_the_others)
        with torch.enable_grad():
            leaf = activation.clone().requires_grad_()
            with lrp.Relevance(leaf, place.dry.kind) as rules:
                # Two rows at least, so that what has one row for all images is known for a constant.
                output, *_ = evidence.outputs(torch.stack([leaf] * (2 if len(leaf) == 1 else 1)))
            scores = start(output).reshape(evidence.scores.shape)
        relevance = gradients(scores, leaf, place.name, keep=True)
        ends = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        ratio = rules.conservation(ends, scores, leaf)
        if abs(ratio - 1) > _TOLERANCE:
            checks.warn(
                f"RelevanceCAM: {ratio:.3g} of the relevance at the output of {place.dry.kind} comes through "
                f"to {place.name!r}: the rules do not conserve relevance on this architecture"
            )
        return weighted_sum(relevance.flatten(3).mean(3), activation)


def _against_the_others(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Each class's logit, less the others' by their number with it: its gradient is Relevance-CAM's start."""
    chosen = logits.gather(1, classes)
    return chosen - (logits.sum(1, keepdim=True) - chosen) / logits.shape[1]
