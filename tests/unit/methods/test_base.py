"""The call that all methods share, and the explanation that they return."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.methods.base import require_method
from helpers.families import Plain, tiny
from helpers.fingerprint import fingerprint
from helpers.registry import images


class Mean(camkit.Method):
    """A minimal method: its map is the mean over the channels of the image."""

    def explain(self, inputs: camkit.Inputs, target: Any) -> camkit.Explanation:
        assert not self.model.training
        maps: Tensor = inputs.images.mean(1)
        return camkit.Explanation(maps, self.model(inputs.images), target, "", inputs.size)


def test_a_method_writes_what_it_does_with_a_prepared_model_alone() -> None:
    model, x = tiny(Plain).train(), images("Mean", 2)
    before = fingerprint(model)
    explained = Mean(model)(x, 3)
    assert fingerprint(model) == before
    assert torch.equal(explained.maps, x.mean(1))
    for bad, message in (
        (x[0], "a batch"),
        (x * torch.nan, "finite values"),
        (x[:0], "a batch that is not empty"),
    ):
        with pytest.raises(ValueError, match=f"^x: expected {message}"):
            Mean(model)(bad)
    assert fingerprint(model) == before


def test_a_method_is_known_by_its_base() -> None:
    method = Mean(Plain())
    assert require_method(method) is method
    for other, got in ((Mean, "<class .*Mean'>"), (lambda x: x, "function"), (Plain(), "Plain")):
        with pytest.raises(TypeError, match=rf"^method: expected a method such as .*, got {got}$"):
            require_method(other)


def test_heatmaps_are_scaled_map_by_map_and_a_constant_map_is_empty() -> None:
    maps = torch.stack([torch.arange(6.0).reshape(2, 3), -torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)])
    explained = camkit.Explanation(maps, None, 0, "", (2, 3))
    rising, falling, constant = explained.heatmaps()
    torch.testing.assert_close(rising, maps[0] / 5)
    torch.testing.assert_close(falling, 1 - maps[0] / 5)
    assert not constant.any()
    assert explained.heatmaps((4, 4)).shape == (3, 4, 4)


def test_classes_are_told_whatever_was_made_of_them() -> None:
    model, x = tiny(Plain), images("GradCAM", 2)
    predicted = model(x).argmax(1)
    method = camkit.GradCAM(model)
    for target in (None, camkit.targets.probability(), camkit.targets.negative(), camkit.targets.finer()):
        classes = method(x, target).classes
        assert classes is not None
        assert torch.equal(classes, predicted)
    assert method(x, lambda y: y[:, 0]).classes is None
    assert not method(x, camkit.targets.contrast(2, 2)).maps.any()


@pytest.mark.parametrize("method", [camkit.CAM, camkit.GradCAM])
def test_a_training_model_is_explained_as_it_predicts(method: Any) -> None:
    model = tiny(Plain)
    x = torch.randn(2, 3, 12, 10).double()
    expected = method(model)(x, 1).maps
    assert torch.equal(method(model.train())(x, 1).maps, expected)


def test_output_target_and_heatmaps() -> None:
    model = tiny(Plain)
    x = torch.randn(3, 3, 12, 10).double()
    explained = camkit.GradCAM(model)(x)
    torch.testing.assert_close(explained.output, model(x).detach())
    assert torch.equal(explained.target, explained.output.argmax(1))
    heatmaps = explained.heatmaps()
    assert heatmaps.shape == (3, 12, 10)
    for raw, heatmap in zip(explained.maps, heatmaps, strict=True):
        if raw.max() > 0:
            assert (heatmap.min(), heatmap.max()) == (0, 1)
    assert explained.heatmaps((7, 5)).shape == (3, 7, 5)
    assert camkit.GradCAM(model)(x, [[0, 1]] * 3).heatmaps().shape == (3, 2, 12, 10)


def test_other_numbers_of_dimensions() -> None:
    signal = nn.Sequential(
        nn.Conv1d(2, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    explained = camkit.GradCAM(signal)(torch.randn(2, 2, 50))
    assert (explained.maps.shape, explained.heatmaps().shape) == ((2, 46), (2, 50))
    video = nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    explained = camkit.CAM(video)(torch.randn(2, 3, 6, 16, 12))
    assert (explained.maps.shape, explained.heatmaps().shape) == ((2, 4, 14, 10), (2, 6, 16, 12))
