"""Networks with a fixed trunk and a head that the test supplies as a function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_for_gradient


class Model(nn.Module):
    """A trunk ``f`` of two convolutions over 4 x 4 patches; the head is a function of model and images."""

    def __init__(self, head: Callable[[Any, Tensor], Any], channels: int = 8) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.ReLU(), nn.Conv2d(5, channels, 1), nn.ReLU())
        self.fc = nn.Linear(channels, 4)
        self.norm = nn.LayerNorm(channels)
        self.more = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = head
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.head(self, x)


class Vit(nn.Module):
    """A ViT with tokens before and after its patches, attention written by hand, and a given readout.

    Args:
        read: computes the features ``(N, 8)`` of the classifier from the normalised tokens ``(N, L, 8)``.
        before: the number of tokens before the patches.
        after: the number of tokens after the patches.
        size: the side of the images, for which there are positional embeddings; if ``None``, any size works.
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], before: int = 1, after: int = 0, size: int | None = None
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.before = nn.Parameter(torch.randn(1, before, 8))
        self.after = nn.Parameter(torch.randn(1, after, 8))
        length = before + after + (size // 16) ** 2 if size else 1
        self.position = nn.Parameter(torch.randn(1, length, 8))
        self.norm1 = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        self.read = read
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.before.expand(len(y), -1, -1), y, self.after.expand(len(y), -1, -1)], 1)
        y = y + self.position
        z = self.norm1(y)
        y = y + (self.q(z) @ self.k(z).mT).softmax(-1) @ self.v(z)
        return self.fc(self.read(self.norm(y)))  # type: ignore[no-any-return]


def find(model: nn.Module, *size: int) -> Any:
    """The layer that a gradient method chooses, for images of this size, or of 32 x 24 if none is given."""
    return find_for_gradient(DryRun.of(model, (2, 3, *(size or (32, 24)))))
