"""FullGrad, which looks at every layer with a bias and not at one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camkit import _checks, layers, maps
from camkit._modules import modules_of
from camkit._nested import detached
from camkit.dryrun import explaining_errors
from camkit.explainer import Explanation
from camkit.inputs import Input, Inputs
from camkit.tap import as_found
from camkit.targets import Target, bind

_WITH_BIAS = {"linear"} | {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}


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
        self.model = layers.unwrapped(model)

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
        inputs = Inputs.admitted(x, modules)
        images = inputs.images
        size = inputs.size
        layers.require_floats(self.model)
        with as_found(modules), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            with explaining_errors(self.model, inputs), _Biases() as biases:
                output = inputs.run(self.model, leaf)
            bound = bind(target, output, len(images))
            scores = bound.score(output)
            of_input, *of_biases = products(scores.reshape(len(images), -1), [(leaf, images), *biases.found])
        spatial = [of_input, *(p for p, is_map in zip(of_biases, biases.are_maps, strict=True) if is_map)]
        found = torch.stack([maps.resize(_rescaled(p), size).sum(2) for p in spatial]).sum(0)
        shown = found[:, 0] if scores.ndim == 1 else found
        return Explanation(shown, detached(output), bound.target, "", size, classes=bound.about)


def products(scores: torch.Tensor, places: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Of each place and its factor, the gradient of the scores ``(N, K)`` by it times that factor.

    Args:
        scores: what to derive.
        places: the input first, then what was added for each bias; each with its factor.

    Returns:
        For each, shape ``(N, K, ...)``, in single precision or better; zeros where no score depends on it.

    Raises:
        ValueError: if the scores do not depend on the input.
    """
    leaves = [leaf for leaf, _ in places]
    found: list[list[torch.Tensor]] = [[] for _ in places]
    for k in range(scores.shape[1]):
        start = torch.zeros_like(scores)
        start[:, k] = 1
        gradients: tuple[torch.Tensor | None, ...] = (None,)
        if scores.requires_grad:
            gradients = torch.autograd.grad(scores, leaves, start, retain_graph=True, allow_unused=True)
        if gradients[0] is None:
            expected = "a score that depends on the input through a gradient"
            raise ValueError(_checks.complaint("target", expected, "one that does not"))
        for made, gradient, (leaf, factor) in zip(found, gradients, places, strict=True):
            product = torch.zeros_like(leaf) if gradient is None else maps.wide(gradient) * factor
            made.append(maps.wide(product))
    return [torch.stack(made, 1).detach() for made in found]


def _rescaled(products: torch.Tensor) -> torch.Tensor:
    """The magnitudes ``(N, K, C, *spatial)``, scaled to [0, 1] over all channels and positions."""
    return maps.normalize(products.abs(), products.ndim - 2)


class _Biases(TorchFunctionMode):
    """Meets every layer with a bias, and adds zeros to what it gives, by which there is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_maps: list[bool] = []  # and not what a linear layer gives

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        bias = _bias(getattr(func, "__name__", ""), args, kwargs or {})
        if bias is None or not result.requires_grad:
            return result
        zeros = torch.zeros_like(result, requires_grad=True)
        is_linear = func is F.linear
        channels = [1] * result.ndim
        channels[-1 if is_linear else 1] = -1
        self.found.append((zeros, bias.detach().reshape(channels)))
        self.are_maps.append(not is_linear and result.ndim > 2)
        return result + zeros


def _bias(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a layer adds, if it is one that does."""
    names = ["input", "weight", "bias"]
    if name == "batch_norm":
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    elif name not in _WITH_BIAS:
        return None
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    bias: torch.Tensor | None = given.get("bias")
    mean, variance, weight = (given.get(n) for n in ("running_mean", "running_var", "weight"))
    if mean is None or variance is None:  # no normalisation, or one by the batch, which adds nothing fixed
        return bias
    shift: torch.Tensor = -mean / (variance + given.get("eps", 1e-5)).sqrt()
    return (shift if weight is None else shift * weight) + (0 if bias is None else bias)
