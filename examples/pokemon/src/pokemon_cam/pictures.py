"""A set of labelled pictures, drawn or photographed, and its split into train and test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEST_SHARE = 269 / 1470
"""Share of test pictures, as in the paper: 269 of its 1,470 photos (1,201 for training)."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size with their classes.

    Attributes:
        images: uint8, shape ``(N, 3, H, W)``.
        labels: indices into ``classes``, int64, shape ``(N,)``.
        classes: names of the K classes.
        masks: the true pixels of each object, bool, shape ``(N, H, W)``; None if unknown.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    masks: Tensor | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    def subset(self, indices: Tensor) -> PictureSet:
        """Select pictures by index; the classes stay the same.

        Args:
            indices: int64, shape ``(M,)``.

        Returns:
            A set of M pictures, in the order of ``indices``.
        """
        masks = None if self.masks is None else self.masks[indices]
        return PictureSet(self.images[indices], self.labels[indices], self.classes, masks)

    def batches(self, size: int) -> Iterator[PictureSet]:
        """Iterate over the pictures in batches, in order.

        Args:
            size: pictures per batch, at least 1; the last batch may have fewer.

        Yields:
            One set per batch.
        """
        for start in range(0, len(self), size):
            yield self.subset(torch.arange(start, min(start + size, len(self))))


def split(pictures: PictureSet, *, seed: int) -> tuple[PictureSet, PictureSet]:
    """Split every class at random into about 82% train and 18% test pictures.

    Args:
        pictures: at least two pictures of each class.
        seed: seed of the split, at least 0.

    Returns:
        ``(train, test)``. Each picture is in one of them, and each class is in both.

    Raises:
        ValueError: if a class has fewer than two pictures.
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
        # A class with two pictures would round to no test picture.
        count = max(1, round(len(members) * TEST_SHARE))
        test.append(members[:count])
        train.append(members[count:])
    # The indices are grouped by class here; sorting restores the order of the data set.
    return (
        pictures.subset(torch.from_numpy(np.sort(np.concatenate(train)))),
        pictures.subset(torch.from_numpy(np.sort(np.concatenate(test)))),
    )
