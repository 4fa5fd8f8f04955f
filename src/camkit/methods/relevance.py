"""Methods that attribute the score to the layer by rules that replace the gradient."""

import torch

from camkit._tools import checks
from camkit._tools.nested import tensors_in
from camkit.backward import deeplift, lrp
from camkit.backward.gradients import gradients
from camkit.maps import weighted_sum
from camkit.methods.explainer import Explainer
from camkit.passes.evidence import Evidence

# Warn if the attribution misses more than this share of the score's change (LIFT-CAM), or if more than this
# share of the relevance is lost or added on its way (Relevance-CAM).
_TOLERANCE = 0.05


class LIFTCAM(Explainer):
    r"""LIFT-CAM: weights each channel of the activation by its DeepLIFT contribution to the score.

    Here :math:`A^k` is channel k of the activation and :math:`m^k` its multipliers by DeepLIFT's rescale
    rule, from an activation of zeros to this one. i is a position, and M is the map. The weight
    :math:`w_k` approximates the Shapley value of channel k.

    The weights sum to the score minus the score of an activation of zeros. A call warns if the sum is off by
    more than 5 %. This happens after products of activations, normalisation over channels and attention, for
    which DeepLIFT has no rule. Tokens outside the grid are left unchanged.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: nothing.

    References:
        Jung and Oh, *Towards Better Explanations of Class Activation Mapping*, ICCV 2021.
    """

    formula = r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), \qquad w_k = \sum_i m^k_i A^k_i"
    paper = "Jung and Oh, ICCV 2021"
    passes = "1 forward, 1 backward; the head twice"
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        weights, differences = contributions(evidence)
        sums = weights.sum(2)
        missing = (sums - differences).abs()
        # Two large scores have large rounding errors, which also affect their small difference.
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
    """Returns DeepLIFT's contribution of each channel, and the change of the score that they should sum to.

    Returns:
        The contributions ``(N, K, C)``, and the score minus the score of an activation of zeros ``(N, K)``.
    """
    with torch.enable_grad():
        leaf = evidence.activation.clone().requires_grad_()
        zeros = torch.zeros_like(leaf)
        # Each function's multiplier compares its input in this pass with its input in the reference pass.
        with torch.no_grad(), deeplift.Recorded(zeros) as reference:
            (empty,) = evidence.outputs(zeros[None])
        with deeplift.multipliers(leaf, reference):
            (output,) = evidence.outputs(leaf[None])
        scores, without = evidence.score(output), evidence.score(empty)
    multipliers = gradients(scores, leaf, evidence.location.name)
    evidence.require_reach(multipliers)
    return (multipliers * evidence.activation[:, None]).flatten(3).sum(3), (scores - without).detach()


class RelevanceCAM(Explainer):
    r"""Relevance-CAM: weights each channel of the activation by its mean relevance, at any depth.

    Here :math:`A^k` is channel k of the activation, i one of the Z positions, and M the map. R is the
    relevance of the activation by layer-wise relevance propagation. With C classes, the propagation starts
    with 1 at the target class and :math:`-1 / C` at every other. For targets other than classes it starts
    with the gradient of the score with respect to the model's output. The map is signed.

    The part of the model after the layer must consist of convolutions, linear layers, poolings, sums, and
    activation functions that map zero to zero, such as ReLU. Batch normalisation, factors that are constant,
    and functions that only move or copy values are supported too. For the shared arguments, see
    :class:`camkit.Explainer`.

    A call warns if the relevance that reaches the layer differs by more than 5 % from the relevance at the
    start.

    Raises:
        ValueError: at the call, if the model uses a function without a rule after the layer.

    Departs from the paper: the text of the paper scales the start by the logit. Its authors' program does
    not, and neither does camkit.

    References:
        Lee et al., *Relevance-CAM: Your Model Already Knows Where to Look*, CVPR 2021, equations 5 to 8.
    """

    formula = r"M = \sum_k w_k A^k, \qquad w_k = \frac{1}{Z} \sum_i R^k_i"
    paper = "Lee et al., CVPR 2021"
    passes = "1 forward, 3 backward; the head again"
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed."""
        activation, place = evidence.activation, evidence.location
        start = evidence.bound.with_formula(_class_against_others)
        with torch.enable_grad():
            leaf = activation.clone().requires_grad_()
            with lrp.Relevance(leaf, place.dry.kind) as rules:
                # Run at least two rows. Among a single row, the rules could not tell an activation from a
                # constant that is the same for all images.
                output, *_ = evidence.outputs(torch.stack([leaf] * (2 if len(leaf) == 1 else 1)))
            scores = start(output).reshape(evidence.scores.shape)
        # Because of the rules, this gradient is the relevance. conservation() uses its graph again.
        relevance = gradients(scores, leaf, place.name, keep=True)
        ends = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        ratio = rules.conservation(ends, scores, leaf)
        if abs(ratio - 1) > _TOLERANCE:
            checks.warn(
                f"RelevanceCAM: {ratio:.3g} of the relevance at the output of {place.dry.kind} comes through "
                f"to {place.name!r}: the rules do not conserve relevance on this architecture"
            )
        return weighted_sum(relevance.flatten(3).mean(3), activation)


def _class_against_others(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Returns scores ``(N, K)`` whose gradient with respect to the logits starts Relevance-CAM.

    Each score is the logit of the class, minus the sum of the other logits divided by the number of classes.
    """
    chosen = logits.gather(1, classes)
    return chosen - (logits.sum(1, keepdim=True) - chosen) / logits.shape[1]
