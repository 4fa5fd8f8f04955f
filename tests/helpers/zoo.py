"""Checks of models of other libraries: the layer that camkit finds, and its Grad-CAM against a plain hook."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import camkit
from helpers.fingerprint import fingerprint

#: A target: all five classes for each of two images.
CLASSES = [list(range(5))] * 2


@dataclass(frozen=True)
class Found:
    """The layer that camkit should find.

    Attributes:
        layer: its name.
        channels: its number of channels.
        size: the spatial size of its map.
        reads: its layout: NCHW, NHWC, or for tokens their numbers before and after the grid.
    """

    layer: str
    channels: int
    size: tuple[int, int]
    reads: str | tuple[int, int] = "NCHW"

    def channels_first(self, activation: Tensor) -> Tensor:
        """The output of the layer, rearranged to ``(N, C, h, w)``."""
        count = len(activation)
        if isinstance(self.reads, tuple):
            (before, after), (height, width) = self.reads, self.size
            assert activation.shape == (count, before + height * width + after, self.channels)
            rows = [
                torch.stack([activation[:, before + i * width + j] for j in range(width)], -1)
                for i in range(height)
            ]
            return torch.stack(rows, -2)
        grid = activation.permute(0, 3, 1, 2) if self.reads == "NHWC" else activation
        assert grid.shape == (count, self.channels, *self.size)
        return grid


def grad_cam(model: nn.Module, inputs: Any, found: Found, score: Callable[[Any], Tensor]) -> Tensor:
    """Grad-CAM by one hook: the maps ``(N, K, h, w)`` of the scores ``(N, K)``."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # otherwise a later in-place operation would change the tensor we keep

    handle = model.get_submodule(found.layer).register_forward_hook(keep)
    scores = score(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    handle.remove()
    (layer,) = kept
    activation = found.channels_first(layer)
    maps = []
    for k in range(scores.shape[1]):
        (gradient,) = torch.autograd.grad(scores[:, k].sum(), layer, retain_graph=True)
        gradient = found.channels_first(gradient)
        assert gradient.abs().sum(1).all(), "some positions do not reach the score"
        maps.append((gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu())
    return torch.stack(maps, 1).detach()


def explained_right(
    model: nn.Module,
    inputs: Any,
    found: Found,
    target: Any = CLASSES,
    score: Callable[[Any], Tensor] = lambda output: output,
) -> camkit.Explanation:
    """Explains a model by Grad-CAM with the default layer, and asserts that the explanation is right.

    The layer must be the expected one, the maps those of the reference, and the model left unchanged.

    Args:
        model: a model in float64 and evaluation mode, with random weights.
        inputs: its input, or a dict of several inputs by name.
        found: the layer that camkit should find.
        target: the target to explain.
        score: the same target as a function from the output to scores ``(N, K)``.
    """
    with torch.no_grad():  # some models register hooks on themselves in their first pass
        expected = score(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    before = fingerprint(model)
    explain: Any = camkit.GradCAM(model)
    explanation: camkit.Explanation = explain(inputs, target)
    after = fingerprint(model)
    assert [key for key in before if before[key] != after[key]] == []

    assert explanation.layer == found.layer
    assert explanation.maps.shape[-2:] == found.size
    torch.testing.assert_close(score(explanation.output), expected, rtol=1e-9, atol=0)
    literal = grad_cam(model, inputs, found, score)
    assert literal.any()
    tolerance = 1e-6 * literal.max().item()
    torch.testing.assert_close(explanation.maps.reshape(literal.shape), literal, rtol=1e-6, atol=tolerance)
    return explanation
