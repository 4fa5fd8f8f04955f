"""The training recipes: the paper's own, and two for the small networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        description: the recipe in words, for the report.
        epochs: passes over the training pictures.
        batch_size: pictures per step.
        optimizer: creates the optimiser for the given parameters.
        lr_factor: returns the factor on the learning rate, given the epochs done so far (a
            fraction) and the number of epochs.
        label_smoothing: share of the target's probability that is spread over all classes.
        augment: transforms a batch ``(N, 3, H, W)`` of normalised training pictures.
    """

    description: str
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    lr_factor: Callable[[float, int], float]
    label_smoothing: float
    augment: Callable[[Tensor], Tensor]


# Every schedule has the signature of `Recipe.lr_factor`, even if it ignores the number of epochs.


def _decay_by_steps(epoch: float, epochs: int) -> float:
    """Return a factor that is 1 at first and multiplied by 0.1 after every 7 epochs."""
    return float(0.1 ** (int(epoch) // 7))


def _one_cycle(epoch: float, epochs: int) -> float:
    """Return a factor that rises linearly for 30% of the epochs and then falls to 0 as a cosine."""
    warm_up = 0.3 * epochs
    if epoch < warm_up:
        # Start at 0.04 instead of 0; otherwise the first step would change nothing.
        return 0.04 + 0.96 * epoch / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))


def _keep(x: Tensor) -> Tensor:
    return x


def _mirror_at_random(x: Tensor) -> Tensor:
    """Mirror each picture from left to right with probability 0.5."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(3), x)


def _one_cycle_recipe(learning_rate: float, epochs: int) -> Recipe:
    return Recipe(
        f"AdamW, learning rate {learning_rate} in one cycle, weight decay 0.01, "
        "label smoothing 0.1, mirrored at random",
        epochs=epochs,
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.01),
        lr_factor=_one_cycle,
        # Without label smoothing the networks become overconfident, and the maxima of their maps
        # move off the creature.
        label_smoothing=0.1,
        augment=_mirror_at_random,
    )


PAPER = Recipe(
    "SGD, learning rate 0.001 times 0.1 every 7 epochs, momentum 0.9",
    epochs=10,
    batch_size=1,
    optimizer=partial(torch.optim.SGD, lr=0.001, momentum=0.9),
    # The paper mentions a step scheduler without its values. A factor of 0.1 every 7 epochs is a
    # common choice together with the paper's learning rate and momentum.
    lr_factor=_decay_by_steps,
    label_smoothing=0.0,
    augment=_keep,
)
"""The recipe of the paper."""

FROM_SCRATCH = _one_cycle_recipe(0.003, epochs=6)
"""Trains a small network from random weights."""

FINE_TUNING = _one_cycle_recipe(0.001, epochs=3)
"""Fine-tunes a small network whose features are trained already."""
