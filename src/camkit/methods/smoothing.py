"""Smoothing: the maps of one method, averaged over views of the input."""

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
        apply: the function from images ``(N, C, *size)`` to their view.
        undo: the function from maps of the view, ``(..., *spatial)``, to maps of the input.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    undo: Callable[[torch.Tensor], torch.Tensor]


class Smoothed(Method):
    """Averages the maps of a method over views of the input, such as noisy or mirrored copies.

    The unchanged input determines the target: all views are explained for its predicted class. It is part of
    the average only if it is one of the views.

    Args:
        method: any method, such as ``camkit.GradCAM(model)``.
        views: :func:`noise_views`, :func:`flip_views`, or a list of your own views.

    Raises:
        TypeError: if ``method`` is not a method, or if ``views`` are not views.
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
        # Refuse two likely mistakes: a function such as noise_views that was not called, and a single View,
        # which is a tuple of two functions.
        given: Any = views
        each = list(given) if isinstance(given, Sequence) else [given]
        if not all(isinstance(view, View) for view in each):
            expected = "several camkit.View, such as camkit.flip_views()"
            raise TypeError(checks.error_message("views", expected, type(views).__name__))
        if not each:
            raise ValueError(checks.error_message("views", "one view or more", "none"))
        self.views = tuple(views)

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains the unchanged inputs and then each view; the output is that of the unchanged inputs."""
        plain = self.method(inputs.given, target)
        # Views may have another size than the input, and their maps another size than those of the input.
        size = plain.maps.shape[-len(plain.input_size) :]
        total = torch.zeros_like(plain.maps)
        for view in self.views:
            seen = self.method(inputs.with_images(view.apply(inputs.images)), plain.target)
            total += maps.resize(view.undo(seen.maps), size)
        return replace(plain, maps=total / len(self.views), parts=())


def noise_views(samples: int = 16, std: float = 0.1, seed: int = 0) -> list[View]:
    """Returns views that add normal noise to the input.

    Args:
        samples: number of views, at least 1.
        std: standard deviation of the noise, in units of the input.
        seed: seed of the noise, at least 0. All images get the same noise. The global random state does not
            change.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if an argument is not a number.
    """
    checks.positive("samples", samples)
    checks.not_negative("std", std)
    checks.seed(seed)
    # Partial functions show their settings in repr(), which closures do not. The manifest of a data set job
    # records them.
    return [View(partial(_noisy, std=std, seed=seed, sample=n), _as_it_is) for n in range(samples)]


def flip_views() -> list[View]:
    """Returns two views: the input as it is, and mirrored left to right (along its last dimension)."""
    return [View(_as_it_is, _as_it_is), View(_mirrored, _mirrored)]


def _noisy(x: torch.Tensor, *, std: float, seed: int, sample: int) -> torch.Tensor:
    return x + std * noise.normal(x.shape[1:], x, seed, sample)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mirrored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(-1)
