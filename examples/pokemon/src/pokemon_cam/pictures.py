"""A set of labelled pictures, whether drawn or photographed, and its split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEST_SHARE = 269 / 1470
"""Share of the pictures that are for testing: the paper's 1,201 train and 269 test photos."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size with their classes.

    Attributes:
        images: uint8, shape ``(N, 3, H, W)``.
        labels: class indices, int64, shape ``(N,)``.
        classes: the K class names; a label is an index into them.
        masks: the true pixels of what is to be seen, bool, shape ``(N, H, W)``; None if unknown.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    masks: Tensor | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    def subset(self, indices: Tensor) -> PictureSet:
        """The pictures at ``indices``, in that order; the classes stay the same.

        Args:
            indices: int64, shape ``(M,)``.

        Returns:
            A set of M pictures.
        """
        masks = None if self.masks is None else self.masks[indices]
        return PictureSet(self.images[indices], self.labels[indices], self.classes, masks)

    def batches(self, size: int) -> Iterator[PictureSet]:
        """The pictures in order, some at a time.

        Args:
            size: pictures per batch, at least 1; the last batch may have fewer.

        Yields:
            One set per batch.
        """
        for start in range(0, len(self), size):
            yield self.subset(torch.arange(start, min(start + size, len(self))))


def split(pictures: PictureSet, *, seed: int) -> tuple[PictureSet, PictureSet]:
    """Split every class into train and test pictures, about 82 to 18.

    Args:
        pictures: at least two of each class.
        seed: seed of the choice, from 0.

    Returns:
        ``(train, test)``: no picture in both, none left out, every class in both.

    Raises:
        ValueError: when a class has fewer than two pictures.
    """
    rng = np.random.default_rng(seed)
    labels = pictures.labels.numpy()
    train, test = [], []
    for label, name in enumerate(pictures.classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise ValueError(
                f"pictures: expected at least 2 of each class, got {len(members)} of {name!r}"
            )
        count = max(1, round(len(members) * TEST_SHARE))
        test.append(members[:count])
        train.append(members[count:])
    return (
        pictures.subset(torch.from_numpy(np.sort(np.concatenate(train)))),
        pictures.subset(torch.from_numpy(np.sort(np.concatenate(test)))),
    )
