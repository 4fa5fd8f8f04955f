"""Smoothing: one method's maps, averaged over views of the input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks, noise
from camkit.methods.base import Explanation
from camkit.model.inputs import Input, Inputs
from camkit.targets.binding import Target


class View(NamedTuple):
    """One view of the input.

    Attributes:
        apply: from the input to the view.
        undo: from maps of the view ``(..., *spatial)`` to maps of the input.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    undo: Callable[[torch.Tensor], torch.Tensor]


class Smoothed:
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

    def __init__(self, method: Callable[[Any, Target], Explanation], views: Sequence[View]) -> None:
        if isinstance(method, type | nn.Module) or not callable(method):
            got = method if isinstance(method, type) else type(method).__name__
            raise TypeError(checks.error_message("method", "a method such as camkit.GradCAM(model)", got))
        several: Any = views  # also what is none: noise_views itself, or one view
        each = list(several) if isinstance(several, Sequence) else [several]
        if not all(isinstance(view, View) for view in each):
            expected = "several camkit.View, such as camkit.flip_views()"
            raise TypeError(checks.error_message("views", expected, type(views).__name__))
        if not each:
            raise ValueError(checks.error_message("views", "one view or more", "none"))
        self.method = method
        self.views = tuple(views)

    @property
    def model(self) -> nn.Module:
        """The model that the method explains."""
        model: nn.Module = self.method.model  # type: ignore[attr-defined]
        return model

    def __call__(self, x: Input, target: Target = None) -> Explanation:
        """Explains a batch, as the method does; with one more call of it on each view.

        Args:
            x: images as the model expects them, ``(N, C, H, W)``; with other inputs a tuple or a dict.
            target: what to explain, as for the method.

        Returns:
            The :class:`Explanation`, with the output for ``x`` itself.
        """
        plain, inputs = self.method(x, target), Inputs.of(x)
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
