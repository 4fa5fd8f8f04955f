"""The files of a job: shards of raw maps, and pictures of heatmaps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import camkit
from helpers.families import Plain, tiny
from helpers.jobs import (
    BATCH,
    BATCHES,
    ITEMS,
    Items,
    check,
    contents,
    explain,
    images,
    loader,
    shards,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_of_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    x, method = images().to(dtype), camkit.GradCAM(tiny(Plain).to(dtype))
    check(explain(method, Items(x), tmp_path), [method(x[list(b)]) for b in BATCHES])


def test_a_method_of_ones_own_with_maps_in_half_precision(tmp_path: Path) -> None:
    class Half(camkit.Explainer):
        needs_gradient = False

        def map(self, evidence: Any) -> Tensor:
            mean: Tensor = evidence.activation.mean(1, keepdim=True).bfloat16()
            return mean

    x, method = images(), Half(tiny(Plain))
    first, _ = shards(explain(method, Items(x), tmp_path))
    assert first["maps"].dtype == np.float32
    assert np.array_equal(first["maps"][:3], method(x[:3]).maps.float().numpy())


def test_heatmaps_as_pictures(tmp_path: Path) -> None:
    x, method = images(), camkit.GradCAM(tiny(Plain))
    explain(method, Items(x), tmp_path / "gray", colormap="gray")
    explain(method, Items(x), tmp_path / "jet", colormap="jet")
    pictures = {f"heatmaps/{i:08d}.png" for i in range(ITEMS)}
    names = {"manifest.json", "shard-00000.npz", "shard-00001.npz", *pictures}
    assert set(contents(tmp_path / "gray")) == set(contents(tmp_path / "jet")) == names
    for numbers in BATCHES:
        heatmaps = method(x[list(numbers)]).heatmaps()
        for index, heatmap in zip(numbers, heatmaps, strict=True):
            gray = np.asarray(Image.open(tmp_path / f"gray/heatmaps/{index:08d}.png"))
            assert np.array_equal(gray, (heatmap * 255).round().numpy())
            jet = np.asarray(Image.open(tmp_path / f"jet/heatmaps/{index:08d}.png"))
            colours = camkit.colorize(heatmap, "jet").permute(1, 2, 0) * 255
            assert np.array_equal(jet, colours.round().numpy())


def test_a_picture_for_each_class(tmp_path: Path) -> None:
    x, method = images(), camkit.GradCAM(tiny(Plain))
    explain(method, Items(x), tmp_path, colormap="gray", read=lambda x: (x, [[1, 3]] * len(x)))
    assert len(list((tmp_path / "heatmaps").iterdir())) == 2 * ITEMS
    heatmaps = method(x[3:5], [[1, 3]] * 2).heatmaps()
    for k in range(2):
        gray = np.asarray(Image.open(tmp_path / f"heatmaps/00000004-{k}.png"))
        assert np.array_equal(gray, (heatmaps[1, k] * 255).round().numpy())


def test_no_part_is_left_where_writing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError("no space left")

    items, method = Items(images()), camkit.CAM(tiny(Plain))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        explain(method, items, tmp_path)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_images_of_several_sizes(tmp_path: Path) -> None:
    x, method = list(images()), camkit.CAM(tiny(Plain))
    x[5:] = [one[:, :8] for one in x[5:]]  # these images fill the second shard
    explain(method, Items(x), tmp_path / "apart")
    assert [s["maps"].shape for s in shards(tmp_path / "apart/manifest.json")] == [(5, 4, 3), (4, 2, 3)]
    message = (
        "loader: expected maps of 4 x 3 with classes, as before in its shard, got maps of 2 x 3 with classes "
        "for items 6 to 8; a transform such as torchvision's Resize makes them alike"
    )
    x[5] = x[0]
    with pytest.raises(ValueError, match=f"^{message}$"):
        camkit.explain_dataset(method, loader(Items(x[:3] + x[:3] + x[6:])), tmp_path / "mixed")


def test_targets_of_several_kinds(tmp_path: Path) -> None:
    def read(batch: Tensor) -> tuple[Tensor, Any]:
        return batch, 1 if len(batch) == BATCH else (lambda y: y[:, 0])

    message = (
        "loader: expected maps of 4 x 3 with classes, as before in its shard, got maps of 4 x 3 "
        "for items 3 to 4; a transform such as torchvision's Resize makes them alike"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        explain(camkit.GradCAM(tiny(Plain)), Items(images()), tmp_path, read=read)


def test_pictures_of_what_is_no_image(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    items = Items(torch.randn(4, 3, 12))
    with pytest.raises(
        ValueError, match=r"^colormap: expected None where inputs are no images, got heatmaps of 12$"
    ):
        explain(camkit.CAM(model), items, tmp_path / "painted", colormap="jet")
    (found,) = shards(explain(camkit.CAM(model), items, tmp_path / "raw"))
    assert found["maps"].shape == (4, 10)
