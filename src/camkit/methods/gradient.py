"""Methods that weigh the activation by its gradient."""

from dataclasses import dataclass

import torch

from camkit._tools import checks, noise
from camkit.backward.gradients import gradients
from camkit.maps import safe_divide, weighted_sum
from camkit.methods.explainer import Explainer
from camkit.methods.principal import principal_map
from camkit.model.state import math_attention
from camkit.passes.evidence import Evidence


class GradCAM(Explainer):
    r"""Grad-CAM: the activation weighed by its mean gradient.

    .. math::
        \alpha_k = \frac{1}{Z} \sum_{ij} \frac{\partial y}{\partial A^k_{ij}}, \qquad
        M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    The default layer is the last spatial one; for models that read a class token, what the last
    attention takes in, because nothing of the other tokens reaches the output after it.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

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

    formula = r"\mathrm{ReLU} \sum_k \mathrm{mean}(g^k) A^k"
    paper = "Selvaraju et al., ICCV 2017"
    passes = "1 forward, 1 backward"
    needs_gradient = True
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        weights = evidence.gradient.flatten(3).mean(3)
        return weighted_sum(weights, evidence.activation).relu()


class GradCAMPlusPlus(Explainer):
    r"""Grad-CAM++: the activation weighed by its positive gradients, each with a coefficient of its own.

    .. math::
        \alpha^k_{ij} = \frac{(g^k_{ij})^2}{2 (g^k_{ij})^2 + (g^k_{ij})^3 \sum_{ab} A^k_{ab}}, \qquad
        M = \operatorname{ReLU}\Big(\sum_k A^k \sum_{ij} \alpha^k_{ij} \operatorname{ReLU}(g^k_{ij})\Big)

    A coefficient whose denominator is zero is zero.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: its score is :math:`e^y`, whose gradient is :math:`e^y g`; without that factor,
    which is one positive number per image, nothing overflows and the normalised map is the same.

    References:
        Chattopadhay et al., *Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep
        Convolutional Networks*, WACV 2018, equations 7, 18 and 19.
    """

    formula = (
        r"\mathrm{ReLU} \sum_k A^k \sum_{ij} \alpha^k_{ij} \mathrm{ReLU}(g^k_{ij}),\;"
        r" \alpha = g^2 / (2 g^2 + g^3 \textstyle\sum A)"
    )
    paper = "Chattopadhay et al., WACV 2018"
    passes = "1 forward, 1 backward"
    needs_gradient = True
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        g = evidence.gradient
        return _plus_plus(evidence.activation, g, g**2, g**3)


def _plus_plus(
    activation: torch.Tensor, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor
) -> torch.Tensor:
    """Grad-CAM++'s map of the first three derivatives ``(N, K, C, *spatial)``."""
    total = activation.flatten(2).sum(2)[:, None, :, None]
    first, second, third = first.flatten(3), second.flatten(3), third.flatten(3)
    alpha = safe_divide(second, 2 * second + third * total)
    return weighted_sum((alpha * first.relu()).sum(3), activation).relu()


@dataclass(eq=False, kw_only=True)
class SmoothGradCAMPlusPlus(Explainer):
    r"""Smooth Grad-CAM++: Grad-CAM++ with derivatives that are means over noisy copies of the input.

    .. math::
        D_p = \frac{1}{n} \sum_{m=1}^n \big(g(x + \epsilon_m)\big)^p, \qquad
        \alpha^k_{ij} = \frac{D_2}{2 D_2 + D_3 \sum_{ab} A^k_{ab}}, \qquad
        M = \operatorname{ReLU}\Big(\sum_k A^k \sum_{ij} \alpha^k_{ij} \operatorname{ReLU}(D_1)\Big)

    with A the activation of the input itself.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        samples: number n of noisy copies.
        std: standard deviation of the noise, in units of the input.
        seed: seed of the noise, which is the same for every image. The global random state is left alone.

    Departs from the paper: its numerator of alpha is the first derivative, which contradicts the
    Grad-CAM++ that it smooths; here it is the second.

    References:
        Omeiza et al., *Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep
        Convolutional Neural Network Models*, 2019.
    """

    samples: int = 8
    std: float = 0.3
    seed: int = 0

    formula = r"\text{Grad-CAM++ with } g, g^2, g^3 \text{ averaged over } x + \epsilon"
    paper = "Omeiza et al., 2019"
    passes = "1 + n forward, n backward"
    needs_gradient = True
    gradient_in_first_pass = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)
        checks.not_negative("std", self.std)
        checks.seed(self.seed)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        x, activation = evidence.x, evidence.activation
        total = activation.new_zeros(3, len(x), evidence.scores.shape[1], *activation.shape[1:])
        for sample in range(self.samples):
            shift = self.std * noise.normal(x.shape[1:], x, self.seed, sample)
            g = evidence.at(x + shift).gradient
            total += torch.stack([g, g**2, g**3])
        return _plus_plus(activation, *(total / self.samples))


class XGradCAM(Explainer):
    r"""XGrad-CAM: the activation weighed by its gradient, averaged in proportion to the activation.

    .. math::
        \alpha_k = \sum_{ij} \frac{A^k_{ij}}{\sum_{ab} A^k_{ab}} \frac{\partial y}{\partial A^k_{ij}}, \qquad
        M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    The weight of a channel whose activation sums to zero is zero.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: nothing.

    References:
        Fu et al., *Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs*, BMVC 2020.
    """

    formula = r"\mathrm{ReLU} \sum_k \frac{\sum g^k A^k}{\sum A^k} A^k"
    paper = "Fu et al., BMVC 2020"
    passes = "1 forward, 1 backward"
    needs_gradient = True
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        activation = evidence.activation
        total = activation.flatten(2).sum(2)[:, None]
        product = (evidence.gradient * activation[:, None]).flatten(3).sum(3)
        return weighted_sum(safe_divide(product, total), activation).relu()


class HiResCAM(Explainer):
    r"""HiResCAM: the sum over channels of gradient times activation, position by position.

    .. math:: M = \sum_k \frac{\partial y}{\partial A^k} \odot A^k

    It is signed. Where what follows the layer is one linear layer without a bias, its sum is the score.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: nothing.

    References:
        Draelos and Carin, *Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional
        neural networks*, 2020.
    """

    formula = r"\sum_k g^k \odot A^k"
    paper = "Draelos and Carin, 2020"
    passes = "1 forward, 1 backward"
    needs_gradient = True
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        return (evidence.gradient * evidence.activation[:, None]).sum(2)


class LayerCAM(Explainer):
    r"""LayerCAM: the activation weighed by its positive gradient, position by position.

    .. math:: M = \operatorname{ReLU}\Big(\sum_k \operatorname{ReLU}(g^k) \odot A^k\Big)

    It is made for shallow layers too. Maps of several layers fuse as in the paper with
    ``fuse="hierarchical"``.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: nothing.

    References:
        Jiang et al., *LayerCAM: Exploring Hierarchical Class Activation Maps for Localization*, IEEE TIP
        2021.
    """

    formula = r"\mathrm{ReLU} \sum_k \mathrm{ReLU}(g^k) \odot A^k"
    paper = "Jiang et al., TIP 2021"
    passes = "1 forward, 1 backward"
    needs_gradient = True
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        return (evidence.gradient.relu() * evidence.activation[:, None]).sum(2).relu()


class EigenGradCAM(Explainer):
    r"""Eigen-Grad-CAM: gradient times activation, projected on its first principal direction.

    .. math:: M = (g \odot A)\, v_1

    with :math:`g \odot A` as a matrix of positions by channels, and :math:`v_1` its first right singular
    vector, with the sign with which the map agrees with HiResCAM's.

    Args:
        model: any module that is differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: there is none; the method comes from pytorch-grad-cam, which also subtracts each
    channel's mean, as Eigen-CAM's paper does not.

    References:
        Gildenblat, *pytorch-grad-cam*, 2021; Muhammad and Yeasin, IJCNN 2020 (Eigen-CAM).
    """

    formula = r"(g \odot A)\, v_1,\; v_1 \text{ first right singular vector of } g \odot A"
    paper = "Gildenblat, 2021"
    passes = "1 forward, 1 backward"
    needs_gradient = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, signed."""
        return principal_map(evidence.gradient * evidence.activation[:, None], evidence.location.name)


class ShapleyCAM(Explainer):
    r"""ShapleyCAM: the activation weighed by its gradient, corrected for the curvature of the score.

    .. math::
        \alpha_k = \operatorname{mean}\big(g^k - \tfrac{1}{2} (H A)^k\big), \qquad
        M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    with H the Hessian of the score by the activation. Where what follows the layer is piecewise linear, H is
    zero and the map is Grad-CAM's.

    Args:
        model: any module that is twice differentiable after the layer.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: the paper pairs it with a target of its own (logit less cross-entropy), which any
    function as ``target=`` can be.

    References:
        Cai, *CAMs as Shapley Value-based Explainers*, 2025.
    """

    formula = r"\mathrm{ReLU} \sum_k \mathrm{mean}(g^k - \tfrac12 (H A)^k) A^k"
    paper = "Cai, 2025"
    passes = "1 forward, 2 backward; the head again"
    needs_gradient = True
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        activation, name = evidence.activation, evidence.location.name
        weights = []
        with torch.enable_grad(), math_attention():
            leaf = activation.clone().requires_grad_()
            scores = evidence.rescore(leaf[None])[0]
            for k in range(scores.shape[1]):
                g = gradients(scores[:, k : k + 1], leaf, name, keep=True, create_graph=True)[:, 0]
                curvature = _hessian_product(g, leaf, activation)
                weights.append((g - curvature / 2).detach().flatten(2).mean(2))
                evidence.require_reach(g)
        return weighted_sum(torch.stack(weights, 1), activation).relu()


def _hessian_product(gradient: torch.Tensor, leaf: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """H v, for the gradient by ``leaf``; zeros where that is constant."""
    product = None
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(vector) if product is None else product
