"""Guided backpropagation, and Grad-CAM at the resolution of the input by it."""

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
    r"""Guided Grad-CAM: Grad-CAM's map at the input's size, times guided backpropagation.

    .. math:: M = \operatorname{up}(\text{Grad-CAM}) \odot \sum_c G_c

    with G what :func:`camkit.guided_backprop` gives for each channel c of the input. It is signed, and as
    fine as the input.

    Args:
        model: a network whose activation functions are ReLUs.
        layer: the layer of Grad-CAM, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Raises:
        ValueError: at the call, if the model uses no ReLU.

    Departs from the paper: the paper's picture keeps the colours apart. That is
    ``camkit.guided_backprop(model, x, target) * grad_cam.heatmaps()[:, None]``.

    References:
        Selvaraju et al., ICCV 2017, section 3.2; Springenberg et al., *Striving for Simplicity: The All
        Convolutional Net*, ICLR Workshop 2015.
    """

    formula = r"\mathrm{up}(\text{Grad-CAM}) \odot \sum_c G_c,\; G \text{ guided backpropagation}"
    paper = "Selvaraju et al., ICCV 2017"
    passes = "2 forward, 2 backward"
    keeps_graph = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *size)``, signed."""
        guided, _ = _guided(evidence.model, evidence.inputs, evidence.bound)
        grad_cam = evidence.resize(super().map(evidence))
        return grad_cam * guided.sum(2).to(grad_cam)


def guided_backprop(model: nn.Module, x: Input, target: Target = None) -> torch.Tensor:
    """Guided backpropagation: the gradient by the input, where every ReLU passes what is positive only.

    Nothing inside the model is swapped, and it is left as it was found.

    Args:
        model: a network whose activation functions are ReLUs.
        x: images as the model expects them, ``(N, C, H, W)``; with other inputs a tuple or a dict.
        target: what to explain, as for any method.

    Returns:
        Shape ``(N, C, H, W)``, or ``(N, K, C, H, W)`` for K targets per image; signed.

    Raises:
        ValueError: if the model uses no ReLU, and for a wrong input or target.
        TypeError: for a model, an input or a target of another kind.

    References:
        Springenberg et al., *Striving for Simplicity: The All Convolutional Net*, ICLR Workshop 2015.
    """
    model = unwrap(model)
    require_floats(model)
    with prepared_call(model, x) as inputs:
        found, single = _guided(model, inputs, target)
    return found[:, 0] if single else found


def _guided(model: nn.Module, inputs: Inputs, target: Target | Bound) -> tuple[torch.Tensor, bool]:
    """Guided backpropagation ``(N, K, C, *size)``, and whether one score per image was asked for."""
    with torch.enable_grad():
        leaf = inputs.images.detach().clone().requires_grad_()
        rules = dict.fromkeys(RELUS, _positive_only)
        with explaining_errors(model, inputs), Propagation(leaf, rules) as functions:
            output = inputs.run(model, leaf)
        scores = Scores.of(target, output, len(leaf))
    if functions.met.isdisjoint(RELUS):
        got = f"{type(model).__name__}, which uses none"
        raise ValueError(checks.error_message("model", "a network with ReLUs to guide", got))
    return gradients(scores.rows, leaf), scores.single


def _positive_only(call: Call) -> torch.Tensor:
    def backward(arriving: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (vector_jacobian(call.run, x, arriving.relu()),)

    return with_backward(call.run, backward, call.args[0])
