"""Methods that use only the activation: no gradient, and the same map for every target."""

from dataclasses import dataclass

import torch

from camkit._tools import checks, noise
from camkit.maps import full_precision, weighted_sum
from camkit.methods.explainer import Explainer
from camkit.methods.principal import first_component, positions_by_channels, principal_map, with_sign_of
from camkit.passes.evidence import Evidence


class EigenCAM(Explainer):
    r"""Eigen-CAM: projects the activation on its first principal direction.

    Here A is the activation as a matrix with one row per position and one column per channel. :math:`v_1`,
    the first column of V, is its first right singular vector. Its sign is chosen so that the map M agrees
    with the sum of the channels. The map is signed, and the same for every target.

    The layer must have at least two channels. For the shared arguments, see :class:`camkit.Explainer`.

    Raises:
        ValueError: at the call, if the layer has only one channel.

    Departs from the paper: the paper leaves the sign open.

    References:
        Muhammad and Yeasin, *Eigen-CAM: Class Activation Map using Principal Components*, IJCNN 2020.
    """

    formula = r"M = A\, v_1, \qquad A = U \Sigma V^\top"
    paper = "Muhammad and Yeasin, IJCNN 2020"
    passes = "1 forward"
    needs_gradient = False

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed and the same for each score."""
        # principal_map expects a dimension of K scores, as a gradient has it.
        activation = evidence.activation[:, None]
        return _repeat_for_scores(principal_map(activation, evidence.location.name), evidence)


@dataclass(eq=False, kw_only=True)
class KPCACAM(Explainer):
    r"""KPCA-CAM: the first component of a kernel principal component analysis of the positions.

    Here :math:`a_i` is the vector of the channels at position i, minus the mean of each channel over the
    positions. :math:`\lambda_1` and :math:`u_1` are the largest eigenvalue and its eigenvector of the centred
    kernel matrix, :math:`\bar K`. The sign of :math:`u_1` is chosen so that the map M agrees with the sum of
    the centred channels. The map is signed, and the same for every target.

    The layer must have at least two channels. For the shared arguments, see :class:`camkit.Explainer`.

    Args:
        gamma: the factor :math:`\gamma` of the kernel, at least 0. The default is one divided by the number
            of channels.

    Raises:
        ValueError: at the call, if the layer has only one channel.

    Departs from the paper: the paper leaves the sign open, and also describes other kernels.

    References:
        Karmani et al., *KPCA-CAM: Visual Explainability of Deep Computer Vision Models using Kernel PCA*,
        MMSP 2024.
    """

    formula = (
        r"M = \sqrt{\lambda_1}\, u_1, \qquad \bar K u_1 = \lambda_1 u_1, "
        r"\qquad K_{ij} = \tanh(\gamma\, a_i \cdot a_j + 1)"
    )
    paper = "Karmani et al., MMSP 2024"
    passes = "1 forward"
    needs_gradient = False

    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            checks.not_negative("gamma", self.gamma)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are signed and the same for each score."""
        activation = evidence.activation[:, None]
        matrix = positions_by_channels(activation, evidence.location.name)
        centred = matrix - matrix.mean(2, keepdim=True)
        gamma = 1 / matrix.shape[3] if self.gamma is None else self.gamma
        with full_precision(centred):
            kernel = (gamma * centred @ centred.mT + 1).tanh()
        # Centre the points in the feature space of the kernel, which is known only by its inner products.
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
    r"""FEM: marks the positions where each channel is unusually strong, weighted by the channel's mean.

    Here :math:`\mu_k` and :math:`\sigma_k` are the mean and the standard deviation of channel :math:`A^k`
    over the positions, s is the argument ``sigmas``, and the bracket is 1 where its condition holds, else 0.
    A channel that is the same everywhere is strong nowhere. The map M is the same for every target.

    Among Z positions, no value lies more than :math:`\sqrt{Z - 1}` standard deviations above the mean. The
    map of a grid of four positions is therefore empty with s = 2.

    For the shared arguments, see :class:`camkit.Explainer`.

    Args:
        sigmas: number s of standard deviations above the mean from which a value is strong, at least 0.

    Departs from the paper: nothing, before the map is normalised. The FEM of pytorch-grad-cam has another
    formula: it weights the activation by each channel's share of strong positions.

    References:
        Fuad et al., *Features Understanding in 3D CNNs for Actions Recognition in Video*, IPTA 2020.
    """

    formula = r"M = \sum_k \mu_k \big[ A^k \ge \mu_k + s\, \sigma_k \big]"
    paper = "Fuad et al., IPTA 2020"
    passes = "1 forward"
    needs_gradient = False

    sigmas: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.not_negative("sigmas", self.sigmas)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are the same for each score."""
        flat = evidence.activation.flatten(2)
        mean, deviation = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
        # Rounding can make the mean of equal numbers a little smaller than these. Without this test, a
        # constant channel would then be strong everywhere.
        varies = flat.amax(2, keepdim=True) > flat.amin(2, keepdim=True)
        strong = (flat >= mean + self.sigmas * deviation) & varies
        found = (mean * strong).sum(1)
        return _repeat_for_scores(found.reshape(len(flat), 1, *evidence.activation.shape[2:]), evidence)


@dataclass(eq=False, kw_only=True)
class RandomCAM(Explainer):
    r"""Weights the channels at random: the control that every comparison of methods needs.

    Here :math:`A^k` is channel k of the activation, and the weights are uniformly distributed between -1 and
    1. They are the same for every image. The map M is never negative, and the same for every target.

    For the shared arguments, see :class:`camkit.Explainer`.

    Args:
        seed: seed of the weights, at least 0. The global random state does not change.

    Departs from the paper: there is no paper.
    """

    formula = r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), \qquad w_k \sim U(-1, 1)"
    paper = "none"
    passes = "1 forward"
    needs_gradient = False

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.seed(self.seed)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative and the same for each score."""
        activation = evidence.activation
        weights = noise.uniform(activation.shape[1:2], activation, self.seed)
        found = weighted_sum(weights.expand(len(activation), 1, -1), activation).relu()
        return _repeat_for_scores(found, evidence)


def _repeat_for_scores(found: torch.Tensor, evidence: Evidence) -> torch.Tensor:
    """Repeats maps ``(N, 1, *spatial)`` for each of K scores."""
    return found.repeat_interleave(evidence.scores.shape[1], 1)
