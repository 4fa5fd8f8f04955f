"""A job over a data set: its files, how it is stopped, and how it continues."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    TensorDataset,
)

import camkit
from helpers.families import Plain, tiny
from helpers.fingerprint import fingerprint
from helpers.jobs import (
    BATCHES,
    ITEMS,
    PROGRAMS,
    Items,
    check,
    contents,
    explain,
    images,
    shards,
)


def of_images(batch: list[Tensor]) -> tuple[Tensor, Any]:
    return batch[0], None


def of_labels(batch: list[Tensor]) -> tuple[Tensor, Any]:
    return batch[0], batch[1]


def of_three_classes(batch: list[Tensor]) -> tuple[Tensor, Any]:
    return batch[0], [[0, 2, int(label)] for label in batch[1]]


def of_a_function(batch: list[Tensor]) -> tuple[Tensor, Any]:
    return batch[0], lambda y: y[:, 1] - y[:, 0]


@pytest.mark.parametrize("read", [None, of_labels, of_three_classes, of_a_function])
@pytest.mark.parametrize(
    "make",
    [
        camkit.GradCAM,
        camkit.FullGrad,
        functools.partial(camkit.LayerCAM, layer=["features.1", "features"]),
        lambda model: camkit.Smoothed(camkit.HiResCAM(model), camkit.noise_views(2)),
    ],
)
def test_shards_hold_what_the_method_gives_for_each_batch(make: Any, read: Any, tmp_path: Path) -> None:
    x, labels = images(), torch.arange(ITEMS) % 4
    method = make(tiny(Plain))
    manifest = explain(method, TensorDataset(x, labels), tmp_path / "new" / "folder", read=read)
    read = read or of_images
    check(manifest, [method(*read([x[list(b)], labels[list(b)]])) for b in BATCHES])
    names = {"manifest.json", "shard-00000.npz", "shard-00001.npz"}
    assert set(contents(manifest.parent)) == names
    assert manifest == tmp_path / "new" / "folder" / "manifest.json"


@pytest.mark.parametrize("size", [1, 3, 5, 9, 100])
def test_shards_of_any_size(size: int, tmp_path: Path) -> None:
    x, method = images(), camkit.CAM(tiny(Plain))
    found = list(shards(explain(method, Items(x), tmp_path, shard_size=size)))
    assert [len(shard["index"]) for shard in found] == [min(size, 9 - first) for first in range(0, 9, size)]
    maps = np.concatenate([shard["maps"] for shard in found])
    np.testing.assert_allclose(maps, method(x).maps.numpy(), rtol=1e-12)


def test_no_items(tmp_path: Path) -> None:
    assert list(shards(explain(camkit.CAM(tiny(Plain)), Items([]), tmp_path))) == []


def test_only_what_is_missing_is_loaded(tmp_path: Path) -> None:
    items, method = Items(images()), camkit.CAM(tiny(Plain))
    explain(method, items, tmp_path, shard_size=2, colormap="jet")
    assert items.loaded == list(range(ITEMS))
    whole = contents(tmp_path)
    for missing in ([], [1, 2], [4]):
        for n in missing:
            (tmp_path / f"shard-{n:05d}.npz").unlink()
        items.loaded.clear()
        explain(method, items, tmp_path, shard_size=2, colormap="jet")
        assert items.loaded == [i for n in missing for i in (2 * n, 2 * n + 1) if i < ITEMS]
        assert contents(tmp_path) == whole


def test_stopped_by_an_error_it_goes_on(tmp_path: Path) -> None:
    items, method = Items(images()), camkit.CAM(tiny(Plain))
    explain(method, items, tmp_path / "whole", colormap="jet")
    items.fails_at = 8  # the last item, in the second shard
    with pytest.raises(OSError, match="no such image"):
        explain(method, items, tmp_path / "stopped", colormap="jet")
    whole, there = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert set(whole) - set(there) == {"shard-00001.npz", "heatmaps/00000008.png"}
    assert there.items() <= whole.items()
    items.fails_at, items.loaded = None, []
    explain(method, items, tmp_path / "stopped", colormap="jet")
    assert contents(tmp_path / "stopped") == whole
    assert items.loaded == [5, 6, 7, 8]


def test_all_else_is_left_as_found(tmp_path: Path) -> None:
    model = tiny(Plain).train()
    items, before = Items(images()), fingerprint(model)
    explain(camkit.GradCAM(model), items, tmp_path, colormap="jet")
    assert fingerprint(model) == before


def test_progress_in_batches(tmp_path: Path) -> None:
    seen: list[object] = []

    def progress(iterable: Iterable[Any]) -> Iterator[Any]:
        seen.append(len(iterable))  # type: ignore[arg-type]
        for one in iterable:
            yield one
            seen.append("done")
        seen.append("closed")

    items, method = Items(images()), camkit.CAM(tiny(Plain))
    explain(method, items, tmp_path, progress=progress)
    assert seen == [4, "done", "done", "done", "done", "closed"]
    (tmp_path / "shard-00001.npz").unlink()
    seen.clear()
    explain(method, items, tmp_path, progress=progress)
    assert seen == [2, "done", "done", "closed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_ends_with_the_same_files(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAMS / "killed_job.py"), str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True)
    kills, halves = map(int, output.stdout.split())
    assert kills > 50
    assert halves > 0  # some kills left a file half written
