"""Checks a method against the formula of its paper, for one image and one class at a time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camkit._tools import noise
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_stages
from helpers import reference
from helpers.families import ChannelsLast, Digits, Tiny, Tokens, tiny

LAYOUTS = {Tokens: "tokens", ChannelsLast: "NHWC"}
TARGETS = torch.tensor([[0, 1, 2], [2, 1, 1], [1, 0, 0]])


@dataclass
class Case:
    """One image and one class ``c`` of a tiny network, with the quantities that formulas need."""

    kind: Tiny
    model: nn.Module
    image: Tensor
    c: int

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor of the layer, without the batch, as ``(C, h, w)``."""
        grid = (self.image.shape[1] // 4, self.image.shape[2] // 4)
        return reference.nchw(tensor, LAYOUTS.get(self.kind.model, "NCHW"), grid)

    def at(self, image: Tensor, layer: str = "") -> tuple[Tensor, Tensor]:
        """The activation of an image at a layer and its gradient, each ``(C, h, w)``."""
        pair = reference.activation_and_gradient(
            self.model, layer or self.kind.layer, image, lambda y: y[self.c]
        )
        return self.read(pair[0]), self.read(pair[1])

    @functools.cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.at(self.image)

    def noise(self, count: int, shape: torch.Size, *more: int) -> list[Tensor]:
        """The same ``count`` samples of noise that camkit draws for this image with seed 0."""
        return [noise.normal(shape, self.image, 0, *more, m) for m in range(count)]

    def hessian(self) -> Tensor:
        """The second derivative of the score by the activation, ``(C, h, w, C, h, w)``."""
        activation, layer = self.pair[0], self.kind.layer
        own = reference.activation_and_gradient(self.model, layer, self.image, lambda y: y[self.c])[0]

        def score(flat: Tensor) -> Tensor:
            handle = self.model.get_submodule(layer).register_forward_hook(
                lambda module, args, output: flat.reshape(own.shape)[None].clone()
            )
            output: Tensor = self.model(self.image[None])[0, self.c]
            handle.remove()
            return output

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            whole = torch.autograd.functional.hessian(score, own.flatten())
        return _both(self, whole, own.shape, activation.shape)

    def without(self, k: int) -> float:
        """The score of the class if channel k of the layer is zero."""
        layout = LAYOUTS.get(self.kind.model, "NCHW")
        edit = functools.partial(reference.without_channel, kind=layout, k=k)
        return float(reference.output_with(self.model, self.kind.layer, self.image, edit)[self.c])

    def stages(self) -> list[Tensor]:
        """The activations of the layers that camkit chooses for PolyCAM, the shallowest first."""
        stages = find_stages(DryRun.of(self.model, (2, *self.image.shape)))
        return [self.at(self.image, stage.name)[0] for stage in stages]


def _both(case: Case, whole: Tensor, own: torch.Size, shape: torch.Size) -> Tensor:
    """Rearranges a Hessian of the flat activation from the layer's own layout to ``(C, h, w, C, h, w)``."""
    once = torch.stack([case.read(row.reshape(own)).flatten() for row in whole])
    twice = torch.stack([case.read(column.reshape(own)).flatten() for column in once.T])
    return twice.reshape(*shape, *shape)


#: The formula of a paper, which gives the map ``(h, w)`` of one image and one class.
Literal = Callable[[Case], Tensor]


def check_formula(
    kind: Tiny, make: Callable[..., Any], literal: Literal, *, ignores_target: bool = False
) -> None:
    """Asserts that a method equals its formula, for up to three images with three classes each.

    Args:
        kind: the tiny network.
        make: makes the method for a model.
        literal: the formula, written in loops.
        ignores_target: whether the method gives the same map for every target.
    """
    model = tiny(kind.model)
    count = 1 if kind.model is Digits else 3
    x = torch.randn(count, *kind.shape).double()
    targets = TARGETS[:count]
    explained = make(model)(x, targets)
    assert explained.maps.abs().sum() > 0
    for n in range(count):
        for k, c in enumerate(targets[n].tolist()):
            if ignores_target and k > 0:
                assert torch.equal(explained.maps[n, k], explained.maps[n, 0])
                continue
            expected = literal(Case(kind, model, x[n], c))
            scale = float(expected.abs().max())
            torch.testing.assert_close(explained.maps[n, k], expected, rtol=1e-9, atol=1e-11 * scale)
    one = make(model)(x, targets[:, 0])
    torch.testing.assert_close(one.maps, explained.maps[:, 0], rtol=1e-9, atol=1e-12)
