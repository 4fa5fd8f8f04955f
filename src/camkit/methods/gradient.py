"""Methods that weigh the activation by its gradient."""

import torch

from camkit.evidence import Evidence
from camkit.explainer import Explainer


class GradCAM(Explainer):
    r"""Grad-CAM: the activation weighed by its mean gradient.

    .. math::
        \alpha_k = \frac{1}{Z} \sum_{ij} \frac{\partial y}{\partial A^k_{ij}}, \qquad
        M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    The default layer is the last spatial one; for models that read a class token, what the last
    attention takes in, because nothing of the other tokens reaches the output after it.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module.

    Raises:
        ValueError: if the model has no such layer.
        TypeError: for a model or a layer of another kind.

    Departs from the paper: nothing. An activation function that the model applies to the layer's output
    outside any module (DenseNet's last ReLU) counts to what comes after the layer.

    Example:
        >>> import camkit, torch, torchvision
        >>> model = torchvision.models.resnet18()
        >>> explanation = camkit.GradCAM(model)(torch.rand(2, 3, 64, 64), target=[281, 207])
        >>> explanation.layer, explanation.maps.shape, explanation.heatmaps().shape
        ('layer4', torch.Size([2, 2, 2]), torch.Size([2, 64, 64]))

    References:
        Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
        Localization*, ICCV 2017, equations 1 and 2.
    """

    needs_gradient = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        weights = evidence.gradient.flatten(3).mean(3)
        return torch.einsum("nkc,nc...->nk...", weights, evidence.activation).relu()
