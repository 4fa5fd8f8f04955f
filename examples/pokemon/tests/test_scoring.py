from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pokemon_cam.networks import Network, small_networks
from pokemon_cam.pictures import PictureSet
from pokemon_cam.scoring import pointing_hits, score_pointing

CPU = torch.device("cpu")


def test_hits_on_hand_made_maps() -> None:
    heatmaps = torch.zeros(5, 3, 4)
    masks = torch.zeros(5, 3, 4, dtype=torch.bool)
    masks[:, 1, 2] = True
    heatmaps[0, 1, 2] = 1  # on the only true pixel
    heatmaps[1, 2, 1] = 1  # beside it
    heatmaps[2, 1, 2], heatmaps[2, 0, 0] = 0.5, 0.9  # a lower peak does not count
    masks[3] = False  # an empty mask cannot be hit
    heatmaps[3, 1, 2] = 1
    masks[4] = True  # a constant map points nowhere
    assert pointing_hits(heatmaps, masks).tolist() == [True, False, False, False, False]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"masks: expected .* \(1, 3, 4\), got \(1, 4, 3\)"):
        pointing_hits(torch.zeros(1, 3, 4), torch.zeros(1, 4, 3, dtype=torch.bool))


def network_that_points_at(x: int, y: int) -> Network:
    """Uses a real explanation, so that the maps take the way that all maps take."""
    network = small_networks(64)["AlexNet-CAM"](2, {})
    original = network.explain

    def explain(pictures: torch.Tensor) -> Any:
        explanation = original(pictures)
        explanation.maps.zero_()
        explanation.maps[:, y, x] = 1
        return explanation

    return cast(Network, SimpleNamespace(name="hand-made", explain=explain))


def left_half_set(count: int) -> PictureSet:
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    masks[:, :, :32] = True
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    return PictureSet(images, torch.zeros(count, dtype=torch.int64), ("a", "b"), masks)


def test_maps_score_by_where_they_point_and_random_maps_by_area() -> None:
    pictures = left_half_set(300)
    left = score_pointing(network_that_points_at(1, 2), pictures, seed=0, device=CPU)
    right = score_pointing(network_that_points_at(4, 2), pictures, seed=0, device=CPU)
    assert (left.maps, right.maps) == (1, 0)
    assert left.random == right.random  # seeded
    assert 0.4 < left.random < 0.6  # the mask is one half
    other = score_pointing(network_that_points_at(1, 2), pictures, seed=1, device=CPU)
    assert other.random != left.random


def test_pictures_without_masks_are_refused() -> None:
    pictures = left_half_set(2)
    bare = PictureSet(pictures.images, pictures.labels, pictures.classes)
    with pytest.raises(ValueError, match="pictures: expected pictures with masks"):
        score_pointing(network_that_points_at(0, 0), bare, seed=0, device=CPU)
