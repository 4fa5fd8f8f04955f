"""Smoothing: one method's maps, averaged over views of the input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from camkit import maps
from camkit._tools import checks, noise
from camkit.methods.base import Explanation, Method, require_method
from camkit.model.inputs import Inputs
from camkit.targets.binding import Target


class View(NamedTuple):
    """One view of the input.

    Attributes:
        apply: from the input to the view.
        undo: from maps of the view ``(..., *spatial)`` to maps of the input.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    undo: Callable[[torch.Tensor], torch.Tensor]


class Smoothed(Method):
    """A method whose maps are means over views of the input: noisy copies, or flipped ones.

    What is explained is settled on the input itself: the predicted class of a view does not matter.

    Args:
        method: any method.
        views: :func:`noise_views`, :func:`flip_views`, or views of your own.

    Raises:
        TypeError: if ``method`` is none.
        ValueError: if there are no views.

    Example:
        >>> import camkit, torch, torchvision
        >>> model = torchvision.models.resnet18()
        >>> smoothed = camkit.Smoothed(camkit.GradCAM(model), camkit.flip_views())
        >>> smoothed(torch.rand(1, 3, 64, 64)).maps.shape
        torch.Size([1, 2, 2])

    References:
        Smilkov et al., *SmoothGrad: removing noise by adding noise*, 2017.
    """

    def __init__(self, method: Method, views: Sequence[View]) -> None:
        self.method = require_method(method)
        super().__init__(method.model)
        self.differentiable = method.differentiable
        several: Any = views  # also what is none: noise_views itself, or one view
        each = list(several) if isinstance(several, Sequence) else [several]
        if not all(isinstance(view, View) for view in each):
            expected = "several camkit.View, such as camkit.flip_views()"
            raise TypeError(checks.error_message("views", expected, type(views).__name__))
        if not each:
            raise ValueError(checks.error_message("views", "one view or more", "none"))
        self.views = tuple(views)

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains the inputs themselves and then each view; the output is that of the inputs themselves."""
        plain = self.method(inputs.given, target)
        size = plain.maps.shape[-len(plain.input_size) :]
        total = torch.zeros_like(plain.maps)
        for view in self.views:
            seen = self.method(inputs.with_images(view.apply(inputs.images)), plain.target)
            total += maps.resize(view.undo(seen.maps), size)
        return replace(plain, maps=total / len(self.views), parts=())


def noise_views(samples: int = 16, std: float = 0.1, seed: int = 0) -> list[View]:
    """Noisy copies of the input.

    Args:
        samples: how many.
        std: standard deviation of the noise, in units of the input.
        seed: seed of the noise, which is the same for every image. The global random state is left alone.
    """
    checks.positive("samples", samples)
    checks.not_negative("std", std)
    checks.seed(seed)
    # Partial functions and no closures: their settings show.
    return [View(partial(_noisy, std=std, seed=seed, sample=n), _as_it_is) for n in range(samples)]


def flip_views() -> list[View]:
    """The input and its mirror image, left to right."""
    return [View(_as_it_is, _as_it_is), View(_mirrored, _mirrored)]


def _noisy(x: torch.Tensor, *, std: float, seed: int, sample: int) -> torch.Tensor:
    return x + std * noise.normal(x.shape[1:], x, seed, sample)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mirrored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(-1)
