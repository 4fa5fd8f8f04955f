"""FullGrad, which looks at every layer with a bias and not at one."""

import torch
from torch import nn

from camkit import maps
from camkit._tools.nested import detach_all
from camkit.backward.gradients import gradient_times_factor
from camkit.layers.dryrun import explaining_errors
from camkit.methods.base import Explanation
from camkit.model.inputs import Input, Inputs
from camkit.model.modules import modules_of, require_floats, unwrap
from camkit.model.state import restored_on_exit
from camkit.passes.biases import BiasRecorder
from camkit.targets.binding import Target, bind


class FullGrad:
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

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)

    def __call__(self, x: Input, target: Target = None) -> Explanation:
        """Explains a batch.

        Args:
            x: images as the model expects them, ``(N, C, H, W)``; with other inputs a tuple or a dict.
            target: what to explain, as for any method.

        Returns:
            The :class:`Explanation`, at the input's size; its ``layer`` is empty.

        Raises:
            ValueError: for an input without a batch dimension, a class out of range, a wrong number of
                targets.
            TypeError: for an input, an output or a target of another kind.
        """
        modules = modules_of(self.model)
        inputs = Inputs.checked(x, modules)
        images = inputs.images
        size = inputs.size
        require_floats(self.model)
        with restored_on_exit(modules), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            with explaining_errors(self.model, inputs), BiasRecorder() as biases:
                output = inputs.run(self.model, leaf)
            bound = bind(target, output, len(images))
            scores = bound.score(output)
            of_input, *of_biases = gradient_times_factor(
                scores.reshape(len(images), -1), [(leaf, images), *biases.found]
            )
        spatial = [of_input, *(p for p, is_map in zip(of_biases, biases.are_maps, strict=True) if is_map)]
        found = torch.stack([maps.resize(_rescaled(p), size).sum(2) for p in spatial]).sum(0)
        shown = found[:, 0] if scores.ndim == 1 else found
        return Explanation(shown, detach_all(output), bound.target, "", size, classes=bound.classes)


def _rescaled(products: torch.Tensor) -> torch.Tensor:
    """The magnitudes ``(N, K, C, *spatial)``, scaled to [0, 1] over all channels and positions."""
    return maps.normalize(products.abs(), products.ndim - 2)
