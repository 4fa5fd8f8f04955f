"""Tests whether the maps point at the creature, next to what chance would score."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pokemon_cam.networks import Network
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar
from pokemon_cam.training import normalized

_BATCH = 32


@dataclass(frozen=True)
class Pointing:
    """Share of pictures in which a map's maximum is on the creature, in [0, 1].

    Attributes:
        maps: by the network's maps of its predicted class.
        random: by random maps of the same resolution, resized in the same way.
    """

    maps: float
    random: float


def pointing_hits(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether each heatmap has its maximum inside the mask.

    Args:
        heatmaps: shape ``(N, H, W)``. Where the maximum is reached several times, the first in
            reading order counts; a constant heatmap points nowhere, so it is no hit.
        masks: bool, shape ``(N, H, W)``.

    Returns:
        bool, shape ``(N,)``.

    Raises:
        ValueError: when the shapes differ.
    """
    if heatmaps.shape != masks.shape or heatmaps.ndim != 3:
        raise ValueError(
            f"masks: expected the heatmaps' shape (N, H, W) = {tuple(heatmaps.shape)}, "
            f"got {tuple(masks.shape)}"
        )
    flat = heatmaps.flatten(1)
    inside = masks.flatten(1).gather(1, flat.argmax(1, keepdim=True)).squeeze(1)
    return inside & (flat.amax(1) > flat.amin(1))


def point(network: Network, pictures: PictureSet, *, seed: int, device: torch.device) -> Pointing:
    """Play the pointing game with a network's maps and with random maps.

    Args:
        network: on ``device``, in evaluation mode.
        pictures: at least one, with masks.
        seed: seed of the random maps.
        device: where to compute.

    Returns:
        The scores of both.

    Raises:
        ValueError: when the pictures have no masks.
    """
    if pictures.masks is None:
        raise ValueError("pictures: expected pictures with masks, got masks=None")
    masks = pictures.masks
    generator = torch.Generator().manual_seed(seed)
    hits, random_hits = [], []
    with progress_bar(f"scoring {network.name}", len(pictures), "picture") as bar:
        for start in range(0, len(pictures), _BATCH):
            here = slice(start, start + _BATCH)
            explanation = network.explain(normalized(pictures.images[here], device))
            chance = torch.rand(explanation.maps.shape, generator=generator)
            by_chance = replace(explanation, maps=chance)
            hits.append(pointing_hits(explanation.heatmaps().cpu(), masks[here]))
            random_hits.append(pointing_hits(by_chance.heatmaps(), masks[here]))
            bar.update(len(explanation.maps))
    return Pointing(_share(hits), _share(random_hits))


def _share(hits: list[Tensor]) -> float:
    return torch.cat(hits).float().mean().item()
