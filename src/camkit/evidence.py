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
        scores: what is explained, ``(N, K)``.
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
            ValueError: if the scores do not depend on the layer.
        """
        gradients = []
        count = self.scores.shape[1]
        for k in range(count):
            score = self.scores[:, k].sum()
            gradient = None
            if score.requires_grad:
                (gradient,) = torch.autograd.grad(
                    score, self.leaf, retain_graph=k + 1 < count, allow_unused=True
                )
            if gradient is None:
                expected = "a layer that the score depends on through a gradient"
                raise ValueError(_checks.complaint("layer", expected, repr(self.location.name)))
            gradients.append(self.location.layout.channels_first(gradient))
        return torch.stack(gradients, dim=1)
