"""Layers and layouts of segmenters, detectors and other models that are no classifiers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_features, find_for_gradient


class Made(nn.Module):
    """A few layers, and a forward pass that the test gives as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.maps = nn.Conv2d(6, 4, 1)
        self.low = nn.Conv2d(6, 4, 1)
        self.same = nn.Identity()
        self.fc = nn.Linear(6, 4)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def default(forward: Callable[[Any, Tensor], Any]) -> str:
    return find_for_gradient(DryRun.of(Made(forward), (2, 3, 32, 24))).name


def head(m: Any, f: Tensor) -> Tensor:
    return m.fc(f.mean((2, 3)))  # type: ignore[no-any-return]


def test_segmentation_looks_at_features_and_not_at_class_maps() -> None:
    def upsampled(m: Any, x: Tensor) -> Any:
        return {"out": F.interpolate(m.maps(F.relu(m.deep(m.stem(x)))), x.shape[2:], mode="bilinear")}

    def summed(m: Any, x: Tensor) -> Any:
        low = m.stem(x)
        deep = m.maps(m.deep(low))
        return F.interpolate(m.low(low) + F.interpolate(deep, low.shape[2:]), x.shape[2:])

    assert default(upsampled) == "deep"
    assert default(lambda m, x: m.maps(m.deep(m.stem(x)))) == "deep"
    assert default(summed) == "deep"
    assert default(lambda m, x: m.deep(m.stem(x))) == "deep"  # a trunk: its last convolution is no class map


def test_a_detector_looks_at_what_all_its_heads_are_made_of() -> None:
    def detector(m: Any, x: Tensor) -> Any:
        low = m.stem(x)
        deep = m.deep(low)
        fine = low + F.interpolate(deep, low.shape[2:])
        found = torch.cat([m.maps(deep).flatten(2), m.low(fine).flatten(2)], 2).mT
        kept = [scores[scores[:, 0] > 0] for scores in found]  # a choice by numbers, which shapes cannot make
        return [{"scores": one[:, 0]} for one in kept]

    model = Made(detector)
    del model.fc
    dry = DryRun.of(model, (2, 3, 32, 24))
    assert dry.device == "meta"
    assert dry.trace.producer(dry.trace.output).name == ""  # type: ignore[union-attr]
    assert find_for_gradient(dry).name == "deep"
    maps = camkit.GradCAM(model)(
        torch.rand(2, 3, 32, 24), lambda y: torch.stack([o["scores"].sum() for o in y])
    ).maps
    assert maps.shape == (2, 8, 6)


def test_a_choice_by_numbers_before_the_layer_takes_a_run_on_numbers() -> None:
    def forks(m: Any, x: Tensor) -> Tensor:
        f = m.stem(x)
        return head(m, m.deep(f) if (f > -1e9).all() else f)

    dry = DryRun.of(Made(forks), (2, 3, 32, 24))
    assert dry.device is None
    assert find_for_gradient(dry).name == "deep"


def test_a_detector_that_resizes_inside() -> None:
    """Its features have the same size for every input, as in SSD; their operations tell the layout."""

    def resizes(m: Any, x: Tensor) -> Tensor:
        return head(m, m.deep(m.stem(F.interpolate(x, (24, 24)))))

    model = Made(resizes)
    assert camkit.GradCAM(model)(torch.rand(1, 3, 40, 20)).maps.shape == (1, 6, 6)  # as many channels as rows
    assert camkit.GradCAM(model, "stem")(torch.rand(1, 3, 40, 20)).maps.shape == (1, 12, 12)


def test_where_no_module_gives_the_last_activation() -> None:
    def top_level(m: Any, x: Tensor) -> Tensor:
        f = m.stem(x)
        return head(m, F.relu(m.same(f) * f))

    assert default(top_level) == "stem"  # everything goes through it
    with pytest.raises(
        ValueError, match="^model: expected a last spatial activation that is some module's output"
    ):
        find_features(DryRun.of(Made(top_level), (2, 3, 32, 24)))


def test_one_position_shows_nothing() -> None:
    assert (
        default(lambda m, x: m.fc(m.same(F.adaptive_avg_pool2d(m.deep(m.stem(x)), 1)).flatten(1))) == "deep"
    )


def test_volumes_have_a_stride_of_their_own_in_time() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = (
                nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4)),
                nn.Parameter(torch.rand(1, 1, 6)),
            )
            self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            f = self.patches(x).flatten(2).transpose(1, 2)
            f = self.norm(torch.cat([self.token.expand(len(f), -1, -1), f], 1))
            return self.fc((f + self.attention(f, f, f)[0])[:, 0])  # type: ignore[no-any-return]

    explained = camkit.GradCAM(Clip())(torch.rand(2, 3, 8, 16, 20), 1)
    assert explained.layer == "norm"
    assert explained.maps.shape == (2, 4, 4, 5)
    assert explained.heatmaps().shape == (2, 8, 16, 20)
