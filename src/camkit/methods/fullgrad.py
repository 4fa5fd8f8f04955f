"""FullGrad, which looks at every layer with a bias and not at one."""

from collections.abc import Sequence

import torch

from camkit import maps
from camkit._tools.nested import detach_all
from camkit.backward.gradients import gradients_by_each
from camkit.layers.dryrun import explaining_errors
from camkit.methods.base import Explanation, Method
from camkit.model.inputs import Inputs
from camkit.model.modules import require_floats
from camkit.passes.biases import BiasRecorder
from camkit.targets.binding import Scores, Target


class FullGrad(Method):
    r"""FullGrad: the gradient by the input and by the bias of every layer, at the input's size.

    .. math::
        M = \sum_c \psi(g_x \odot x)_c + \sum_l \sum_c \operatorname{up}\big(\psi(g_l \odot b_l)\big)_c,
        \qquad \psi(v) = \operatorname{minmax}(|v|)

    over the convolutions and batch normalisations l with their biases :math:`b_l`, and the gradients
    :math:`g_l` by what they give; of a normalisation the bias is what it adds in all,
    :math:`\beta - \gamma \mu / \sigma`. In a network that is linear but for ReLUs and max pooling,
    :math:`\sum g_x x + \sum_l \sum g_l b_l`, the biases of linear layers included, is the score.

    It has no layer to choose. It is never negative.

    Args:
        model: any module that is differentiable.

    Raises:
        TypeError: if ``model`` is no module.

    Departs from the paper: nothing; linear layers have no place in the map, there as here.

    References:
        Srinivas and Fleuret, *Full-Gradient Representation for Neural Network Visualization*, NeurIPS 2019,
        equations 2 and 4.
    """

    formula = r"\sum_c \psi(g_x \odot x)_c + \sum_l \sum_c \mathrm{up}(\psi(g_l \odot b_l))_c"
    paper = "Srinivas and Fleuret, NeurIPS 2019"
    passes = "1 forward, 1 backward, through the whole model"
    needs_gradient = True

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains checked inputs, at their own size; the ``layer`` of the explanation is empty."""
        require_floats(self.model)
        images, size = inputs.images, inputs.size
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            with explaining_errors(self.model, inputs), BiasRecorder() as biases:
                output = inputs.run(self.model, leaf)
            scores = Scores.of(target, output, len(images))
            of_input, *of_biases = gradient_times_factor(scores.rows, [(leaf, images), *biases.found])
        spatial = [of_input, *(p for p, is_map in zip(of_biases, biases.are_maps, strict=True) if is_map)]
        found = torch.stack([maps.resize(_rescaled(p), size).sum(2) for p in spatial]).sum(0)
        return Explanation.of(found, detach_all(output), scores, "", size)


def gradient_times_factor(
    scores: torch.Tensor, places: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """The gradient of the scores ``(N, K)`` by each place, times the factor of that place.

    Args:
        scores: the scores.
        places: the input first, then the zeros that were added for each bias; each with its factor.

    Returns:
        For each place shape ``(N, K, ...)``, in single precision or better.

    Raises:
        ValueError: if the scores do not depend on the input.
    """
    found = gradients_by_each(scores, [leaf for leaf, _ in places])
    return [
        maps.at_least_float32(maps.at_least_float32(gradient) * factor[:, None])
        for gradient, (_, factor) in zip(found, places, strict=True)
    ]


def _rescaled(products: torch.Tensor) -> torch.Tensor:
    """The magnitudes ``(N, K, C, *spatial)``, scaled to [0, 1] over all channels and positions."""
    return maps.normalize(products.abs(), products.ndim - 2)
