"""FullGrad, which explains the input and every layer with a bias instead of one layer."""

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
    r"""FullGrad: adds up input times gradient and bias times gradient of every layer, at the input's size.

    Here x is the input and :math:`g_x` the gradient of the score with respect to it. The sum over l runs over
    all convolutions and batch normalisations; :math:`b_l` is the bias of layer l, and :math:`g_l` the
    gradient of the score with respect to the layer's output. The bias of a batch normalisation is the total
    constant that it adds, :math:`\beta - \gamma \mu / \sigma`. The index c runs over the channels,
    :math:`\operatorname{minmax}` scales to [0, 1] over all channels and positions, and up resizes to the size
    of the input.

    The map is never negative. In a network that is linear except for ReLUs and max pooling,
    :math:`\sum g_x \odot x + \sum_l \sum g_l \odot b_l` is the score, if l runs over the linear layers too.

    The whole model must be differentiable. For the shared arguments, see :class:`camkit.Explainer`. FullGrad
    takes only ``model``.

    Raises:
        TypeError: if ``model`` is not a module.

    Departs from the paper: nothing. As in the paper, the biases of linear layers are not part of the map.

    References:
        Srinivas and Fleuret, *Full-Gradient Representation for Neural Network Visualization*, NeurIPS 2019,
        equations 2 and 4.
    """

    formula = (
        r"M = \sum_c \psi(g_x \odot x)_c + \sum_l \sum_c \operatorname{up}\big(\psi(g_l \odot b_l)\big)_c, "
        r"\qquad \psi(v) = \operatorname{minmax}(|v|)"
    )
    paper = "Srinivas and Fleuret, NeurIPS 2019"
    passes = "1 forward, 1 backward, through the whole model"

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains checked inputs, at their own size. The ``layer`` of the explanation is empty."""
        require_floats(self.model)
        images, size = inputs.images, inputs.size
        with torch.enable_grad():
            # The gradient needs a leaf. It is a copy, so that the user's tensor is left unchanged.
            leaf = images.detach().clone().requires_grad_()
            with explaining_errors(self.model, inputs), BiasRecorder() as biases:
                output = inputs.run(self.model, leaf)
            scores = Scores.of(target, output, len(images))
            of_input, *of_biases = gradient_times_factor(
                scores.rows, [(leaf, images.detach()), *biases.found]
            )
        # Leave out the biases of linear layers: they have no spatial size, so they have no place in the map.
        spatial = [of_input, *(p for p, is_map in zip(of_biases, biases.are_maps, strict=True) if is_map)]
        found = torch.stack([maps.resize(_scaled_magnitudes(p), size).sum(2) for p in spatial]).sum(0)
        return Explanation.of(found, detach_all(output), scores, "", size)


def gradient_times_factor(
    scores: torch.Tensor, places: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """Returns the gradient of each score with respect to each place, times the factor of that place.

    Args:
        scores: the scores, ``(N, K)``.
        places: pairs of a tensor in the graph of the scores and its factor: first the input, whose factor is
            the input itself; then the zeros that were added to the output of each layer, with its bias.

    Returns:
        One tensor ``(N, K, ...)`` for each place, in single precision or better.

    Raises:
        ValueError: if the scores do not depend on the input.
    """
    found = gradients_by_each(scores, [leaf for leaf, _ in places])
    return [
        # In half precision the product of two small numbers would vanish.
        maps.at_least_float32(gradient) * factor[:, None]
        for gradient, (_, factor) in zip(found, places, strict=True)
    ]


def _scaled_magnitudes(products: torch.Tensor) -> torch.Tensor:
    """Returns the magnitudes ``(N, K, C, *spatial)``, scaled to [0, 1] over all channels and positions."""
    return maps.normalize(products.abs(), products.ndim - 2)
