"""Measures how often a map points at the creature, compared with random maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pokemon_cam.networks import Network
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar
from pokemon_cam.training import EVALUATION_BATCH, normalized


@dataclass(frozen=True)
class Pointing:
    """Share of pictures in which the maximum of the map lies on the creature, in [0, 1].

    Attributes:
        maps: share for the network's maps of its predicted class.
        random: share for random maps of the same resolution, upsampled in the same way.
    """

    maps: float
    random: float


def pointing_hits(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Test for each heatmap whether its maximum lies inside the mask.

    If several pixels reach the maximum, the first in reading order counts. A constant heatmap has
    no maximum to point with and is never a hit.

    Args:
        heatmaps: shape ``(N, H, W)``.
        masks: bool, shape ``(N, H, W)``.

    Returns:
        bool, shape ``(N,)``.

    Raises:
        ValueError: if the shapes differ.
    """
    if heatmaps.shape != masks.shape or heatmaps.ndim != 3:
        raise ValueError(
            f"masks: expected the heatmaps' shape (N, H, W) = {tuple(heatmaps.shape)}, "
            f"got {tuple(masks.shape)}"
        )
    flat = heatmaps.flatten(1)
    inside = masks.flatten(1).gather(1, flat.argmax(1, keepdim=True)).squeeze(1)
    return inside & (flat.amax(1) > flat.amin(1))


def score_pointing(
    network: Network, pictures: PictureSet, *, seed: int, device: torch.device
) -> Pointing:
    """Play the pointing game with a network's maps and with random maps.

    Args:
        network: the network, on ``device`` and in evaluation mode.
        pictures: at least one picture, with masks.
        seed: seed of the random maps.
        device: device to compute on.

    Returns:
        The shares of hits of both kinds of maps.

    Raises:
        ValueError: if the pictures have no masks.
    """
    if pictures.masks is None:
        raise ValueError("pictures: expected pictures with masks, got masks=None")
    generator = torch.Generator().manual_seed(seed)
    hits, random_hits = [], []
    with progress_bar(f"scoring {network.name}", len(pictures), "picture") as bar:
        for batch, masks in zip(
            pictures.batches(EVALUATION_BATCH), pictures.masks.split(EVALUATION_BATCH), strict=True
        ):
            explanation = network.explain(normalized(batch.images, device))
            # A smaller creature is harder to hit. Random maps at the resolution of the network's
            # maps show the score that chance alone reaches on the same pictures.
            random_maps = torch.rand(explanation.maps.shape, generator=generator)
            random_explanation = replace(explanation, maps=random_maps)
            hits.append(pointing_hits(explanation.heatmaps().cpu(), masks))
            random_hits.append(pointing_hits(random_explanation.heatmaps(), masks))
            bar.update(len(batch))
    return Pointing(_share(hits), _share(random_hits))


def _share(hits: list[Tensor]) -> float:
    return torch.cat(hits).float().mean().item()
