"""What one forward pass gives a method."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from camkit import _checks
from camkit.layers import Location


@dataclass
class Evidence:
    """What one forward pass gives a method.

    Attributes:
        location: the layer that was tapped.
        leaf: the layer's output in its own layout, the leaf of the graph that leads to ``scores``.
        output: the model's output.
        scores: what is explained, ``(N,)`` or ``(N, K)``.
        target: the explained classes, ``(N,)`` or ``(N, K)``, or the function that gave ``scores``.
    """

    location: Location
    leaf: torch.Tensor
    output: Any
    scores: torch.Tensor
    target: Any

    @cached_property
    def activation(self) -> torch.Tensor:
        """A, ``(N, C, *spatial)``, outside any graph."""
        return self.location.layout.channels_first(self.leaf.detach())

    @cached_property
    def gradient(self) -> torch.Tensor:
        """dy/dA for each score y, ``(N, K, C, *spatial)``: one backward pass a score, down to the layer.

        Raises:
            ValueError: if the scores do not depend on the layer, or on its tokens beside the grid only.
        """
        scores = self.scores.reshape(len(self.scores), -1).sum(0)
        gradients = [self._gradient_of(score, keep=k + 1 < len(scores)) for k, score in enumerate(scores)]
        return torch.stack(gradients, dim=1)

    def _gradient_of(self, score: torch.Tensor, *, keep: bool) -> torch.Tensor:
        name, layout = self.location.name, self.location.layout
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score, self.leaf, retain_graph=keep, allow_unused=True)
        if gradient is None:
            expected = f"a score that depends on layer {name!r} through a gradient"
            raise ValueError(_checks.complaint("target", expected, "one that does not"))
        result = layout.channels_first(gradient)
        if layout.prefix + layout.suffix and not result.any() and gradient.any():
            expected = "a layer whose positions reach the score"
            got = f"{name!r}, of which only the tokens beside the grid do"
            raise ValueError(_checks.complaint("layer", expected, got, "an earlier one serves"))
        return result
