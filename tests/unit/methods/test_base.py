"""The call that all methods share, and the explanation that it returns."""

import pytest
import torch
from torch import nn

import camkit
from helpers.families import Plain, tiny
from helpers.registry import images


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


Method = type[camkit.CAM] | type[camkit.GradCAM]
METHODS = [camkit.CAM, camkit.GradCAM]


@pytest.mark.parametrize("method", METHODS)
def test_a_training_model_is_explained_as_it_predicts(method: Method) -> None:
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
