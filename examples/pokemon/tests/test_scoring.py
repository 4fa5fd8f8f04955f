from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pokemon_cam.networks import Network, small_networks
from pokemon_cam.pictures import PictureSet
from pokemon_cam.scoring import pointing_hits, score_pointing

CPU = torch.device("cpu")


def test_hits_of_maps_written_by_hand() -> None:
    heatmaps = torch.zeros(5, 3, 4)
    masks = torch.zeros(5, 3, 4, dtype=torch.bool)
    masks[:, 1, 2] = True
    heatmaps[0, 1, 2] = 1  # On the only true pixel.
    heatmaps[1, 2, 1] = 1  # Beside the true pixel.
    heatmaps[2, 1, 2], heatmaps[2, 0, 0] = 0.5, 0.9  # Only the highest peak counts.
    masks[3] = False  # An empty mask cannot be hit.
    heatmaps[3, 1, 2] = 1
    masks[4] = True  # A constant map has no maximum to point with.
    assert pointing_hits(heatmaps, masks).tolist() == [True, False, False, False, False]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"masks: expected .* \(1, 3, 4\), got \(1, 4, 3\)"):
        pointing_hits(torch.zeros(1, 3, 4), torch.zeros(1, 4, 3, dtype=torch.bool))


def make_network_that_points_at(x: int, y: int) -> Network:
    """Return a stand-in for a network whose maps have their maximum at column x and row y."""
    # A real explanation is changed, so that the maps are upsampled like those of any network.
    network = small_networks(64)["AlexNet-CAM"](2, {})
    original = network.explain

    def explain(pictures: torch.Tensor) -> Any:
        explanation = original(pictures)
        explanation.maps.zero_()
        explanation.maps[:, y, x] = 1
        return explanation

    return cast(Network, SimpleNamespace(name="stand-in", explain=explain))


def make_left_half_set(count: int) -> PictureSet:
    """Return black pictures whose masks cover the left half."""
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    masks[:, :, :32] = True
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    return PictureSet(images, torch.zeros(count, dtype=torch.int64), ("a", "b"), masks)


def test_maps_score_by_where_they_point_and_random_maps_by_area() -> None:
    pictures = make_left_half_set(300)
    left = score_pointing(make_network_that_points_at(1, 2), pictures, seed=0, device=CPU)
    right = score_pointing(make_network_that_points_at(4, 2), pictures, seed=0, device=CPU)
    assert (left.maps, right.maps) == (1, 0)
    assert left.random == right.random  # The seed alone decides.
    assert 0.4 < left.random < 0.6  # The mask covers one half.
    other = score_pointing(make_network_that_points_at(1, 2), pictures, seed=1, device=CPU)
    assert other.random != left.random


def test_pictures_without_masks_are_rejected() -> None:
    pictures = make_left_half_set(2)
    without_masks = PictureSet(pictures.images, pictures.labels, pictures.classes)
    with pytest.raises(ValueError, match="pictures: expected pictures with masks"):
        score_pointing(make_network_that_points_at(0, 0), without_masks, seed=0, device=CPU)
