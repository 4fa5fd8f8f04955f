"""Models of other libraries: the layer that is found, and a comparison with Grad-CAM by a plain hook."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import camkit
from helpers.fingerprint import fingerprint

#: All five classes of each of two images.
CLASSES = [list(range(5))] * 2


@dataclass(frozen=True)
class Found:
    """The layer to find: its name, its channels, the size of its map, and how its output reads.

    Tokens read as how many of them come before the grid and how many after it.
    """

    layer: str
    channels: int
    size: tuple[int, int]
    reads: str | tuple[int, int] = "NCHW"

    def channels_first(self, activation: Tensor) -> Tensor:
        """The layer's output as ``(N, C, h, w)``."""
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
    """Grad-CAM by one hook, for each of K scores ``(N, K)``: maps ``(N, K, h, w)``."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return (
            output.clone()
        )  # otherwise an in-place operation after the layer would change the tensor we keep

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
    """Explains with nothing configured, and asserts all that should hold.

    Args:
        model: in float64 and evaluation mode, with random weights.
        inputs: its input, or several by name.
        found: the layer that should be found.
        target: what to explain.
        score: the same, as a function from the output to scores ``(N, K)``.
    """
    with torch.no_grad():  # some models hook themselves in their first pass
        expected = score(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    before = fingerprint(model)
    explain: Any = camkit.GradCAM(model)
    explanation: camkit.Explanation = explain(inputs, target)
    after = fingerprint(model)
    assert [what for what in before if before[what] != after[what]] == []

    assert explanation.layer == found.layer
    assert explanation.maps.shape[-2:] == found.size
    torch.testing.assert_close(score(explanation.output), expected, rtol=1e-9, atol=0)
    literal = grad_cam(model, inputs, found, score)
    assert literal.any()
    tolerance = 1e-6 * literal.max().item()
    torch.testing.assert_close(explanation.maps.reshape(literal.shape), literal, rtol=1e-6, atol=tolerance)
    return explanation
