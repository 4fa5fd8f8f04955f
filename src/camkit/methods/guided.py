"""Guided backpropagation, and Guided Grad-CAM, which multiplies it with Grad-CAM."""

import torch
from torch import nn

from camkit._tools import checks
from camkit.backward.gradients import gradients
from camkit.backward.propagation import Propagation, vector_jacobian, with_backward
from camkit.functions import RELUS, Call
from camkit.layers.dryrun import explaining_errors
from camkit.methods.base import prepared_call
from camkit.methods.gradient import GradCAM
from camkit.model.inputs import Input, Inputs
from camkit.model.modules import require_floats, unwrap
from camkit.passes.evidence import Evidence
from camkit.targets.binding import Bound, Scores, Target


class GuidedGradCAM(GradCAM):
    r"""Guided Grad-CAM: Grad-CAM's map, resized to the input, times guided backpropagation.

    Here :math:`G_c` is channel c of the result of :func:`camkit.guided_backprop`, and
    :math:`M_\text{Grad-CAM}` is the map of :class:`camkit.GradCAM`. The map M has the size of the input and
    is signed.

    The whole model must be differentiable and use ReLUs. For the shared arguments, see
    :class:`camkit.Explainer`.

    Raises:
        ValueError: at the call, if the model uses no ReLU.

    Departs from the paper: the paper's picture has one value per colour channel, and here their sum is one
    map. ``camkit.guided_backprop(model, x, target) * grad_cam.heatmaps()[:, None]`` is the paper's picture.

    References:
        Selvaraju et al., ICCV 2017, section 3.2; Springenberg et al., *Striving for Simplicity: The All
        Convolutional Net*, ICLR Workshop 2015.
    """

    formula = r"M = \operatorname{up}\big(M_\text{Grad-CAM}\big) \odot \sum_c G_c"
    paper = "Selvaraju et al., ICCV 2017"
    passes = "2 forward, 2 backward"
    keeps_graph = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *size)`` at the size of the input, which are signed."""
        guided, _ = _guided_gradients(evidence.model, evidence.inputs, evidence.bound)
        grad_cam = evidence.resize(super().map(evidence))
        # Grad-CAM's map is in single precision or better, also if the model and its gradients are not.
        return grad_cam * guided.sum(2).to(grad_cam)


def guided_backprop(model: nn.Module, x: Input, target: Target = None) -> torch.Tensor:
    """Returns the gradient with respect to the input, where ReLUs pass back only positive gradients.

    ReLU6 and hardtanh count as ReLUs. No part of the model is replaced, and the model is left exactly as it
    was found.

    Args:
        model: a differentiable model whose activation functions are ReLUs.
        x: images as the model expects them, ``(N, C, H, W)``; for a model with several inputs a tuple or a
            dict, as for any method.
        target: the score to explain, as for any method.

    Returns:
        Shape ``(N, C, H, W)``, or ``(N, K, C, H, W)`` for K targets per image. The values are signed.

    Raises:
        ValueError: if the model uses no ReLU, or if the input or the target has an unsupported value.
        TypeError: if the model, the input or the target has an unsupported type.

    References:
        Springenberg et al., *Striving for Simplicity: The All Convolutional Net*, ICLR Workshop 2015.
    """
    model = unwrap(model)
    require_floats(model)
    with prepared_call(model, x) as inputs:
        found, single = _guided_gradients(model, inputs, target)
    return found[:, 0] if single else found


def _guided_gradients(model: nn.Module, inputs: Inputs, target: Target | Bound) -> tuple[torch.Tensor, bool]:
    """Returns guided gradients ``(N, K, C, *size)``, and whether each image has a single target."""
    with torch.enable_grad():
        # The gradient needs a leaf. It is a copy, so that the user's tensor is left unchanged.
        leaf = inputs.images.detach().clone().requires_grad_()
        rules = dict.fromkeys(RELUS, _pass_only_positive)
        with explaining_errors(model, inputs), Propagation(leaf, rules) as functions:
            output = inputs.run(model, leaf)
        scores = Scores.of(target, output, len(leaf))
    # Without a ReLU the result would be the plain gradient under a wrong name.
    if functions.met.isdisjoint(RELUS):
        got = f"{type(model).__name__}, which uses none"
        raise ValueError(checks.error_message("model", "a network with ReLUs to guide", got))
    return gradients(scores.rows, leaf), scores.single


def _pass_only_positive(call: Call) -> torch.Tensor:
    """Runs a ReLU whose backward pass first sets negative arriving gradients to zero."""

    def backward(arriving: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (vector_jacobian(call.run, x, arriving.relu()),)

    return with_backward(call.run, backward, call.args[0])
