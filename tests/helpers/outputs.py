"""Outputs of models, written by hand, and how a target scores them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from camkit.targets import bind

#: Logits of two images; FIRST predicts the classes 1 and 0, OTHER the classes 0 and 2.
LOGITS = FIRST = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])
OTHER = torch.tensor([[4.0, 0.0, 1.0], [0.0, 2.0, 9.0]])

#: A mask of pixels, and the output of a segmentation of two images with three categories.
MASK = torch.tensor([[True, False, False], [False, True, True]])
SEGMENTED = torch.arange(36.0).reshape(2, 3, 2, 3)

#: Three boxes: the second overlaps the first by a third of their union, the last overlaps neither.
A, HALF, FAR = [0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [5.0, 3.0, 15.0, 13.0]

#: Makes the output of a model from features and logits.
Wrap = Callable[[Tensor, Tensor], Any]


@dataclass
class Output:
    """The output of a model as a dataclass."""

    features: Any
    logits: Tensor


class Named(NamedTuple):
    """The output of a model as a named tuple."""

    features: Any
    logits: Tensor


class Wrapped(nn.Module):
    """A network that returns features beside its logits."""

    def __init__(self, inner: nn.Module, wrap: Wrap) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x.mean((2, 3)), self.inner(x))


def scores(target: Any, output: Any, count: int) -> tuple[torch.Tensor, Any]:
    """The scores of an output, and the target that is reported for it."""
    bound = bind(target, output, count)
    return bound.score(output), bound.target


def refused(make: Any, output: Any) -> Any:
    """Makes a target and scores an output of two images, either of which should raise."""
    return bind(make(), output, 2).score(output)


def detections(*found: tuple[list[float], int, float]) -> dict[str, Tensor]:
    """The output of a torchvision detector for one image, from boxes, labels and scores."""
    boxes, labels, certainties = zip(*found, strict=True) if found else ((), (), ())
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(certainties).requires_grad_(),
    }
