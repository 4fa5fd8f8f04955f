"""Methods that weight the activation by its gradient."""

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
    r"""Grad-CAM: weights each channel of the activation by its mean gradient.

    Here :math:`A^k` is channel k of the activation, :math:`g^k` the gradient of the score with respect to it,
    i one of the Z positions, and M the map.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: nothing. If the model applies an activation function to the layer's output outside
    any module, as DenseNet does with its last ReLU, that function belongs to the part after the layer.

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

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big), \qquad \alpha_k = \frac{1}{Z} \sum_i g^k_i"
    )
    paper = "Selvaraju et al., ICCV 2017"
    passes = "1 forward, 1 backward"
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        # The gradient is (N, K, C, *spatial). Flattening the positions serves signals and volumes as well.
        weights = evidence.gradient.flatten(3).mean(3)
        return weighted_sum(weights, evidence.activation).relu()


class GradCAMPlusPlus(Explainer):
    r"""Grad-CAM++: weights each channel by its positive gradients, each with a coefficient of its own.

    Here :math:`A^k` is channel k of the activation, :math:`g^k` the gradient of the score with respect to it,
    i and j are positions, and M is the map. A coefficient :math:`\alpha^k_i` whose denominator is zero is
    zero.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: its score is :math:`e^y`, whose gradient is :math:`e^y g`. camkit leaves out the
    factor :math:`e^y`, which could overflow. It is one positive number per score, so that the normalised map
    is the same.

    References:
        Chattopadhay et al., *Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep
        Convolutional Networks*, WACV 2018, equations 7, 18 and 19.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k A^k \sum_i \alpha^k_i \operatorname{ReLU}(g^k_i)\Big), "
        r"\qquad \alpha^k_i = \frac{(g^k_i)^2}{2 (g^k_i)^2 + (g^k_i)^3 \sum_j A^k_j}"
    )
    paper = "Chattopadhay et al., WACV 2018"
    passes = "1 forward, 1 backward"
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        g = evidence.gradient
        # For the score e^y of a head that is linear in the activation, the second and third derivatives are
        # powers of the gradient.
        return _grad_cam_plus_plus(evidence.activation, g, g**2, g**3)


def _grad_cam_plus_plus(
    activation: torch.Tensor, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor
) -> torch.Tensor:
    """Returns Grad-CAM++'s map from the first three derivatives, each ``(N, K, C, *spatial)``."""
    total = activation.flatten(2).sum(2)[:, None, :, None]
    first, second, third = first.flatten(3), second.flatten(3), third.flatten(3)
    alpha = safe_divide(second, 2 * second + third * total)
    return weighted_sum((alpha * first.relu()).sum(3), activation).relu()


@dataclass(eq=False, kw_only=True)
class SmoothGradCAMPlusPlus(Explainer):
    r"""Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy copies of the input.

    Here :math:`A^k` is channel k of the activation of the unchanged input x, :math:`g^k(x + \epsilon_m)` the
    gradient of the score with respect to the activation of a noisy copy, i and j are positions, and M is the
    map. A coefficient :math:`\alpha^k_i` whose denominator is zero is zero.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Args:
        samples: number n of noisy copies, at least 1.
        std: standard deviation of the noise, in units of the input.
        seed: seed of the noise, at least 0. All images get the same noise. The global random state does not
            change.

    Departs from the paper: its numerator of :math:`\alpha` is the first derivative, which contradicts the
    Grad-CAM++ that it smooths. Here the numerator is the second derivative.

    References:
        Omeiza et al., *Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep
        Convolutional Neural Network Models*, 2019.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k A^k \sum_i \alpha^k_i \operatorname{ReLU}(D^k_{1,i})\Big), "
        r"\qquad \alpha^k_i = \frac{D^k_{2,i}}{2 D^k_{2,i} + D^k_{3,i} \sum_j A^k_j}, "
        r"\qquad D^k_{p,i} = \frac{1}{n} \sum_{m=1}^n \big(g^k_i(x + \epsilon_m)\big)^p"
    )
    paper = "Omeiza et al., 2019"
    passes = "1 + n forward, n backward"
    gradient_in_first_pass = False

    samples: int = 8
    std: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)
        checks.not_negative("std", self.std)
        checks.seed(self.seed)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        x, activation = evidence.x, evidence.activation
        # Sum in place, because keeping the gradients of all samples would take n times the memory.
        total = activation.new_zeros(3, len(x), evidence.scores.shape[1], *activation.shape[1:])
        for sample in range(self.samples):
            shift = self.std * noise.normal(x.shape[1:], x, self.seed, sample)
            g = evidence.at(x + shift).gradient
            total += torch.stack([g, g**2, g**3])
        return _grad_cam_plus_plus(activation, *(total / self.samples))


class XGradCAM(Explainer):
    r"""XGrad-CAM: weights each channel by its gradient, averaged in proportion to the activation.

    Here :math:`A^k` is channel k of the activation, :math:`g^k` the gradient of the score with respect to it,
    i and j are positions, and M is the map. The weight of a channel whose activation sums to zero is zero.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: nothing.

    References:
        Fu et al., *Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs*, BMVC 2020.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big), "
        r"\qquad \alpha_k = \sum_i \frac{A^k_i}{\sum_j A^k_j} g^k_i"
    )
    paper = "Fu et al., BMVC 2020"
    passes = "1 forward, 1 backward"
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        activation = evidence.activation
        total = activation.flatten(2).sum(2)[:, None]
        product = (evidence.gradient * activation[:, None]).flatten(3).sum(3)
        return weighted_sum(safe_divide(product, total), activation).relu()


class HiResCAM(Explainer):
    r"""HiResCAM: multiplies gradient and activation position by position, and adds up the channels.

    Here :math:`A^k` is channel k of the activation, :math:`g^k` the gradient of the score with respect to it,
    and M the map.

    The map is signed: negative values are evidence against the target. If the part of the model after the
    layer is one linear layer without a bias, the map sums to the score.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: nothing.

    References:
        Draelos and Carin, *Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional
        neural networks*, 2020.
    """

    formula = r"M = \sum_k g^k \odot A^k"
    paper = "Draelos and Carin, 2020"
    passes = "1 forward, 1 backward"
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed."""
        return (evidence.gradient * evidence.activation[:, None]).sum(2)


class LayerCAM(Explainer):
    r"""LayerCAM: weights each position of each channel by its own positive gradient.

    Here :math:`A^k` is channel k of the activation, :math:`g^k` the gradient of the score with respect to it,
    and M the map.

    The method suits shallow layers too. With ``fuse="hierarchical"``, the maps of several layers are fused as
    in the paper.

    The model must be differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: nothing.

    References:
        Jiang et al., *LayerCAM: Exploring Hierarchical Class Activation Maps for Localization*, IEEE TIP
        2021.
    """

    formula = r"M = \operatorname{ReLU}\Big(\sum_k \operatorname{ReLU}(g^k) \odot A^k\Big)"
    paper = "Jiang et al., TIP 2021"
    passes = "1 forward, 1 backward"
    keeps_graph = True

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        return (evidence.gradient.relu() * evidence.activation[:, None]).sum(2).relu()


class EigenGradCAM(Explainer):
    r"""Eigen-Grad-CAM: projects gradient times activation on its first principal direction.

    Here :math:`g \odot A` is a matrix with one row per position and one column per channel, the product of
    the activation and the gradient of the score with respect to it. :math:`v_1`, the first column of V, is
    its first right singular vector. Its sign is chosen so that the map M agrees with HiResCAM's. The map is
    signed.

    The model must be differentiable after the layer, and the layer must have at least two channels. For the
    shared arguments, see :class:`camkit.Explainer`.

    Raises:
        ValueError: at the call, if the layer has only one channel.

    Departs from the paper: there is no paper. The method comes from pytorch-grad-cam, which also subtracts
    the mean of each channel; like the paper of Eigen-CAM, camkit does not.

    References:
        Gildenblat, *pytorch-grad-cam*, 2021; Muhammad and Yeasin, IJCNN 2020 (Eigen-CAM).
    """

    formula = r"M = (g \odot A)\, v_1, \qquad g \odot A = U \Sigma V^\top"
    paper = "Gildenblat, 2021"
    passes = "1 forward, 1 backward"

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed."""
        return principal_map(evidence.gradient * evidence.activation[:, None], evidence.location.name)


class ShapleyCAM(Explainer):
    r"""ShapleyCAM: weights each channel by its mean gradient, corrected for the curvature of the score.

    Here :math:`A^k` is channel k of the activation, g the gradient of the score with respect to the
    activation, H the Hessian, i one of the Z positions, and M the map. If the part of the model after the
    layer is piecewise linear, H is zero and the map is Grad-CAM's.

    The model must be twice differentiable after the layer. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: the paper combines the method with a target of its own, the logit minus the
    cross-entropy. Here the target is the argument ``target=``, which may be such a function.

    References:
        Cai, *CAMs as Shapley Value-based Explainers*, 2025.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k \alpha_k A^k\Big), "
        r"\qquad \alpha_k = \frac{1}{Z} \sum_i \big(g - \tfrac{1}{2} H A\big)^k_i"
    )
    paper = "Cai, 2025"
    passes = "1 forward, 2 backward; the head again"
    gradient_in_first_pass = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        activation, name = evidence.activation, evidence.location.name
        weights = []
        # The second derivative needs math_attention: torch's fused attention kernels have none.
        with torch.enable_grad(), math_attention():
            leaf = activation.clone().requires_grad_()
            scores = evidence.rescore(leaf[None])[0]
            for k in range(scores.shape[1]):
                # One score at a time, because the graph of each gradient holds memory until it is used.
                g = gradients(scores[:, k : k + 1], leaf, name, keep=True, create_graph=True)[:, 0]
                curvature = _hessian_product(g, leaf, activation)
                weights.append((g - curvature / 2).detach().flatten(2).mean(2))
                evidence.require_reach(g)
        return weighted_sum(torch.stack(weights, 1), activation).relu()


def _hessian_product(gradient: torch.Tensor, leaf: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Returns the Hessian with respect to ``leaf`` times ``vector``, from the gradient and its graph."""
    product = None
    # A head without curvature leaves no graph from the gradient to the leaf. Its Hessian is zero.
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(vector) if product is None else product
