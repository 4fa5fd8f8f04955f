"""Methods that look at the activation alone: neither a gradient nor, but for one, a target matters."""

from dataclasses import dataclass

import torch

from camkit._tools import checks, noise
from camkit.maps import full_precision, weighted_sum
from camkit.methods.explainer import Explainer
from camkit.methods.principal import first_component, positions_by_channels, principal_map, with_sign_of
from camkit.passes.evidence import Evidence


class EigenCAM(Explainer):
    r"""Eigen-CAM: the activation projected on its first principal direction.

    .. math:: M = A\, v_1

    with A as a matrix of positions by channels, and :math:`v_1` its first right singular vector, with the
    sign with which the map agrees with the sum of the channels. The target does not matter.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several. It needs two channels or more.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.

    Departs from the paper: the paper leaves the sign open.

    References:
        Muhammad and Yeasin, *Eigen-CAM: Class Activation Map using Principal Components*, IJCNN 2020.
    """

    formula = r"A v_1,\; v_1 \text{ first right singular vector of } A"
    paper = "Muhammad and Yeasin, IJCNN 2020"
    passes = "1 forward"
    needs_gradient = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, the same for each k."""
        activation = evidence.activation[:, None]
        return _repeat_for_scores(principal_map(activation, evidence.location.name), evidence)


@dataclass(eq=False, kw_only=True)
class KPCACAM(Explainer):
    r"""KPCA-CAM: the first component of a kernel principal component analysis of the positions.

    .. math:: K_{ij} = \tanh(\gamma\, a_i \cdot a_j + 1), \qquad M = \sqrt{\lambda_1}\, u_1

    with :math:`a_i` the channels at position i less their means, and :math:`u_1` the first eigenvector of the
    centred K, with the sign with which the map agrees with the sum of the channels. The target does not
    matter.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several. It needs two channels or more.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        gamma: :math:`\gamma`; one by the number of channels if not given.

    Departs from the paper: the paper leaves the sign open. Its other kernels are not here.

    References:
        Karmani et al., *KPCA-CAM: Visual Explainability of Deep Computer Vision Models using Kernel PCA*,
        MMSP 2024.
    """

    gamma: float | None = None

    formula = r"\sqrt{\lambda_1} u_1 \text{ of the centred kernel } \tanh(\gamma\, a_i \cdot a_j + 1)"
    paper = "Karmani et al., MMSP 2024"
    passes = "1 forward"
    needs_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            checks.not_negative("gamma", self.gamma)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, the same for each k."""
        activation = evidence.activation[:, None]
        matrix = positions_by_channels(activation, evidence.location.name)
        centred = matrix - matrix.mean(2, keepdim=True)
        gamma = 1 / matrix.shape[3] if self.gamma is None else self.gamma
        with full_precision(centred):
            kernel = (gamma * centred @ centred.mT + 1).tanh()
        kernel = (
            kernel
            - kernel.mean(2, keepdim=True)
            - kernel.mean(3, keepdim=True)
            + kernel.mean((2, 3), keepdim=True)
        )
        component = with_sign_of(first_component(kernel), centred.sum(3))
        return _repeat_for_scores(component.reshape(len(matrix), 1, *activation.shape[3:]), evidence)


@dataclass(eq=False, kw_only=True)
class FEM(Explainer):
    r"""FEM: where each channel is unusually strong, weighed by the channel's mean.

    .. math:: M = \sum_k \mu_k \big[ A^k \ge \mu_k + s\, \sigma_k \big]

    with :math:`\mu_k` and :math:`\sigma_k` the mean and the standard deviation of channel k. A channel that
    is the same everywhere is strong nowhere. Of Z positions none lies more than :math:`\sqrt{Z - 1}` standard
    deviations above the mean, so that with s = 2 the map of a grid of four positions is empty. The target
    does not matter.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        sigmas: s, how many standard deviations above the mean are strong.

    Departs from the paper: nothing, before the map is normalised. (pytorch-grad-cam's FEM is another formula:
    it weighs the activation by each channel's share of strong positions.)

    References:
        Fuad et al., *Features Understanding in 3D CNNs for Actions Recognition in Video*, IPTA 2020.
    """

    sigmas: float = 2.0

    formula = r"\sum_k \mu_k [A^k \ge \mu_k + 2 \sigma_k]"
    paper = "Fuad et al., IPTA 2020"
    passes = "1 forward"
    needs_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.not_negative("sigmas", self.sigmas)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, the same for each k."""
        flat = evidence.activation.flatten(2)
        mean, deviation = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
        # Rounding makes the mean of equal numbers another number.
        varies = flat.amax(2, keepdim=True) > flat.amin(2, keepdim=True)
        strong = (flat >= mean + self.sigmas * deviation) & varies
        found = (mean * strong).sum(1)
        return _repeat_for_scores(found.reshape(len(flat), 1, *evidence.activation.shape[2:]), evidence)


@dataclass(eq=False, kw_only=True)
class RandomCAM(Explainer):
    r"""The activation with random weights: the control that every comparison of methods needs.

    .. math:: M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), \qquad w_k \sim U(-1, 1)

    The weights are the same for every image. The target does not matter.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        seed: seed of the weights. The global random state is left alone.

    Departs from the paper: there is none.
    """

    seed: int = 0

    formula = r"\mathrm{ReLU} \sum_k w_k A^k,\; w_k \sim U(-1, 1)"
    paper = "none"
    passes = "1 forward"
    needs_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.seed(self.seed)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, the same for each k; never negative."""
        activation = evidence.activation
        weights = noise.uniform(activation.shape[1:2], activation, self.seed)
        found = weighted_sum(weights.expand(len(activation), 1, -1), activation).relu()
        return _repeat_for_scores(found, evidence)


def _repeat_for_scores(found: torch.Tensor, evidence: Evidence) -> torch.Tensor:
    """Maps ``(N, 1, *spatial)`` repeated for each of K scores."""
    return found.repeat_interleave(evidence.scores.shape[1], 1)
