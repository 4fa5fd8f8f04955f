import functools
import json
import os
import re
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

import camkit
from helpers.families import Plain, tiny
from helpers.fingerprint import fingerprint

ITEMS, BATCH, SHARD = 9, 3, 5
BATCHES = [range(3), range(3, 5), range(5, 8), range(8, 9)]  # none reaches over the end of a shard


class WithNumbers(Plain):
    """Takes a few numbers beside the images, by name."""

    def forward(self, x: Tensor, numbers: dict[str, Tensor] | None = None) -> Tensor:
        assert numbers is not None
        return super().forward(x) + numbers["given"]


class Items(Dataset[Any]):
    """Notes what is loaded; may fail."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.loaded: list[int] = []
        self.fails_at: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise OSError("no such image")
        self.loaded.append(index)
        return self.items[index]


def images() -> Tensor:
    return torch.randn(ITEMS, 3, 12, 10).double()


def loader(items: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(items, **{"batch_size": BATCH} | settings)


def explain(method: Any, items: Any, folder: Path, **settings: Any) -> Path:
    return camkit.explain_dataset(method, loader(items), folder, **{"shard_size": SHARD} | settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shards(manifest: Path) -> Iterator[dict[str, Any]]:
    for shard in json.loads(manifest.read_text())["shards"]:
        with np.load(manifest.parent / shard["file"]) as file:
            yield dict(file)


def check(manifest: Path, expected: list[camkit.Explanation]) -> None:
    """That the shards hold these explanations, of the batches above, bit for bit."""
    first, second = shards(manifest)
    for found, numbers, parts in ((first, range(5), expected[:2]), (second, range(5, 9), expected[2:])):
        assert found["index"].tolist() == list(numbers)
        maps = torch.cat([part.maps for part in parts]).numpy()
        assert found["maps"].dtype == maps.dtype
        assert np.array_equal(found["maps"], maps)
        assert np.ptp(maps) > 0
        assert ("classes" in found) == (parts[0].classes is not None)
        if parts[0].classes is not None:
            classes = torch.cat([part.classes for part in parts if part.classes is not None])
            assert np.array_equal(found["classes"], classes.numpy())


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


def test_several_inputs(tmp_path: Path) -> None:
    x, numbers = images(), 9 * torch.randn(ITEMS, 4).double()
    method = camkit.GradCAM(tiny(WithNumbers))
    expected = [method((x[list(b)], {"given": numbers[list(b)]})) for b in BATCHES]
    assert len({int(c) for part in expected for c in part.target}) > 1  # the numbers matter
    by_name = [{"x": one, "numbers": {"given": other}} for one, other in zip(x, numbers, strict=True)]
    check(explain(method, Items(by_name), tmp_path / "dict"), expected)
    pairs = TensorDataset(x, numbers)
    check(
        explain(method, pairs, tmp_path / "tuple", read=lambda b: ((b[0], {"given": b[1]}), None)), expected
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mapping", [0, 1])
def test_what_is_read_goes_where_the_model_is(mapping: int, tmp_path: Path) -> None:
    x, numbers = images(), torch.randn(ITEMS, 4).double()
    method = camkit.GradCAM(tiny(WithNumbers).cuda())
    items = [{"x": one, "numbers": {"given": other}} for one, other in zip(x, numbers, strict=True)]
    read: list[Any] = [None, lambda batch: (UserDict(batch), None)]  # what image processors give is no dict
    first, _ = shards(explain(method, Items(items), tmp_path, colormap="jet", read=read[mapping]))
    on_gpu = method({"x": x[:3].cuda(), "numbers": {"given": numbers[:3].cuda()}})
    np.testing.assert_allclose(first["maps"][:3], on_gpu.maps.cpu().numpy(), rtol=1e-9)


def test_the_manifest_says_what_was_explained_by_what(tmp_path: Path) -> None:
    method = camkit.ScoreCAM(tiny(Plain), "features", progress=iter)
    assert json.loads(explain(method, Items(images()), tmp_path, colormap="gray").read_text()) | {
        "weights": ""
    } == {
        "camkit": version("camkit"),
        "method": repr(camkit.ScoreCAM(method.model, "features")),  # progress changes no map
        "model": "Plain",
        "weights": "",
        "items": 9,
        "batch_size": 3,
        "colormap": "gray",
        "shard_size": 5,
        "shards": [
            {"file": "shard-00000.npz", "first": 0, "count": 5},
            {"file": "shard-00001.npz", "first": 5, "count": 4},
        ],
    }
    assert method.progress is iter


@pytest.mark.parametrize("size", [1, 3, 5, 9, 100])
def test_shards_of_any_size(size: int, tmp_path: Path) -> None:
    x, method = images(), camkit.CAM(tiny(Plain))
    found = list(shards(explain(method, Items(x), tmp_path, shard_size=size)))
    assert [len(shard["index"]) for shard in found] == [min(size, 9 - first) for first in range(0, 9, size)]
    maps = np.concatenate([shard["maps"] for shard in found])
    np.testing.assert_allclose(maps, method(x).maps.numpy(), rtol=1e-12)


def test_no_items(tmp_path: Path) -> None:
    assert list(shards(explain(camkit.CAM(tiny(Plain)), Items([]), tmp_path))) == []


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
    items.fails_at = 8
    with pytest.raises(OSError, match="no such image"):
        explain(method, items, tmp_path / "stopped", colormap="jet")
    whole, there = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert set(whole) - set(there) == {"shard-00001.npz", "heatmaps/00000008.png"}
    assert there.items() <= whole.items()
    items.fails_at, items.loaded = None, []
    explain(method, items, tmp_path / "stopped", colormap="jet")
    assert contents(tmp_path / "stopped") == whole
    assert items.loaded == [5, 6, 7, 8]


def test_no_part_is_left_where_writing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError("no space left")

    items, method = Items(images()), camkit.CAM(tiny(Plain))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        explain(method, items, tmp_path)
    assert set(contents(tmp_path)) == {"manifest.json"}


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    others = {"film.part": b"", "shard.txt": b"1", "heatmaps/cat.jpg.part": b"2"}
    left = {"shard-00000.npz.7.part": b"", "manifest.json.7.part": b"", "heatmaps/00000001.png.7.part": b""}
    (tmp_path / "heatmaps").mkdir()
    for name, content in (others | left).items():
        (tmp_path / name).write_bytes(content)
    explain(camkit.CAM(tiny(Plain)), Items(images()), tmp_path)
    found = contents(tmp_path)
    assert others.items() <= found.items()
    assert left.keys().isdisjoint(found)


def test_all_else_is_left_as_found(tmp_path: Path) -> None:
    model = tiny(Plain).train()
    items, before = Items(images()), fingerprint(model)
    explain(camkit.GradCAM(model), items, tmp_path, colormap="jet")
    assert fingerprint(model) == before


class InAWorker(Items):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        assert info.dataset.started  # type: ignore[attr-defined]
        return super().__getitem__(index)


def start(worker: int) -> None:
    get_worker_info().dataset.started = True  # type: ignore[union-attr]


def stack(items: list[Tensor]) -> Tensor:
    return torch.stack(items) * 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loaded_as_the_loader_would(tmp_path: Path) -> None:
    x, method = images(), camkit.CAM(tiny(Plain))
    settings = {"num_workers": 2, "worker_init_fn": start, "collate_fn": stack, "prefetch_factor": 1}
    given = loader(InAWorker(x), multiprocessing_context="fork", **settings)
    before = torch.get_rng_state()
    manifest = camkit.explain_dataset(method, given, tmp_path, shard_size=SHARD)
    check(manifest, [method(2 * x[list(b)]) for b in BATCHES])
    assert torch.equal(torch.get_rng_state(), before)


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


def other_weights(model: Plain) -> Plain:
    with torch.no_grad():
        model.fc.bias[3] += 1e-3
    return model


def other_dtype(model: Plain) -> Plain:
    return model.bfloat16()


def other_statistics(model: Plain) -> Plain:
    model.features[1].running_var += 1  # type: ignore[operator, assignment]
    return model


JOBS: list[tuple[str, Callable[[Plain], Any], dict[str, Any], str]] = [
    (
        "method",
        lambda m: camkit.GradCAM(m, "features"),
        {},
        """"CAM(layer=None, fuse='mean', layout=None, differentiable=False)", """
        """got "GradCAM(layer='features', fuse='mean', layout=None, differentiable=False)"$""",
    ),
    (
        "method",
        lambda m: camkit.Smoothed(camkit.CAM(m), camkit.flip_views()),
        {},
        '"CAM(.*)", got "Smoothed(CAM(.*), .*View.*"$',
    ),
    ("method", camkit.FullGrad, {}, "\"CAM(.*)\", got '<camkit.FullGrad object>'$"),
    ("model", lambda m: camkit.CAM(tiny(type("Other", (Plain,), {}))), {}, "'Plain', got 'Other'"),
    ("weights", lambda m: camkit.CAM(other_weights(m)), {}, "'[0-9a-f]{64}', got '[0-9a-f]{64}'"),
    ("weights", lambda m: camkit.CAM(other_dtype(m)), {}, "'[0-9a-f]{64}', got '[0-9a-f]{64}'"),
    ("weights", lambda m: camkit.CAM(other_statistics(m)), {}, "'[0-9a-f]{64}', got '[0-9a-f]{64}'"),
    ("items", camkit.CAM, {"items": 8}, "9, got 8"),
    ("batch_size", camkit.CAM, {"batch_size": 4}, "3, got 4"),
    ("colormap", camkit.CAM, {"colormap": "jet"}, "None, got 'jet'"),
    ("shard_size", camkit.CAM, {"shard_size": 4}, "5, got 4"),
]


@pytest.mark.parametrize(("entry", "make", "given", "said"), JOBS)
def test_another_job_needs_another_folder(
    entry: str, make: Any, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, x = tiny(Plain), images()
    explain(camkit.CAM(model), Items(x), tmp_path)
    before = contents(tmp_path)
    given = {"items": ITEMS, "batch_size": BATCH, "shard_size": SHARD, "colormap": None} | given
    other = loader(Items(x[: given.pop("items")]), batch_size=given.pop("batch_size"))
    pattern = f"^folder: expected the job of its manifest.json, with {entry} {said}"
    with pytest.raises(ValueError, match=re.sub(r"[()]", r"\\\g<0>", pattern)):
        camkit.explain_dataset(make(model), other, tmp_path, **given)
    assert contents(tmp_path) == before
    assert not (tmp_path / "heatmaps").exists()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("change", ["rows", "scale", "sparse", "conjugate", "unsaved"])
def test_whatever_a_model_is_made_of_tells_it_from_another(change: str, tmp_path: Path) -> None:
    """What a state_dict holds in tuples, numbers of unusual kinds, and buffers that it does not hold."""

    def network(changed: bool) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = tiny(Plain)
        if change in ("rows", "scale"):
            weight = torch.randn(4, 6)
            weight = weight.flip(0) if changed and change == "rows" else weight
            layer = torch.ao.nn.quantized.Linear(6, 4)
            scale = 0.2 if changed and change == "scale" else 0.1
            layer.set_weight_bias(torch.quantize_per_tensor(weight, scale, 0, torch.qint8), None)
            model.unused = layer
        elif change == "sparse":
            model.register_buffer("unused", (torch.eye(3) * (1 + changed)).to_sparse())
        elif change == "conjugate":
            model.register_buffer("unused", torch.tensor([1j * (1 + changed)]).conj())
        else:
            model.register_buffer("unused", torch.ones(2) * (1 + changed), persistent=False)
        return model

    items = Items(images())
    explain(camkit.EigenCAM(network(False)), items, tmp_path)
    explain(camkit.EigenCAM(network(False)), items, tmp_path)
    assert items.loaded == list(range(ITEMS))
    with pytest.raises(ValueError, match="^folder: expected the job of its manifest.json, with weights"):
        explain(camkit.EigenCAM(network(True)), items, tmp_path)


def test_other_noise_is_another_job(tmp_path: Path) -> None:
    method = camkit.CAM(tiny(Plain))
    explain(camkit.Smoothed(method, camkit.noise_views(2, seed=1)), Items(images()), tmp_path)
    for other in (camkit.noise_views(2, seed=2), camkit.noise_views(2, std=0.2, seed=1)):
        with pytest.raises(ValueError, match="^folder: expected the job of its manifest.json, with method"):
            explain(camkit.Smoothed(method, other), Items(images()), tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        camkit.FullGrad,
        lambda m: camkit.ScoreCAM(m, progress=lambda chunks: chunks),
        lambda m: camkit.Smoothed(camkit.ScoreCAM(m, progress=lambda c: c), camkit.noise_views(1)),
    ],
)
def test_the_same_method_made_again_is_the_same_job(make: Any, tmp_path: Path) -> None:
    model, items = tiny(Plain), Items(images())
    kept = [make(model)]  # another object is at another address
    explain(kept[0], items, tmp_path)
    kept.append(make(model))
    explain(kept[1], items, tmp_path)
    assert items.loaded == list(range(ITEMS))


def test_shards_of_unknown_origin(tmp_path: Path) -> None:
    explain(camkit.CAM(tiny(Plain)), Items(images()), tmp_path).unlink()
    with pytest.raises(
        ValueError, match=r"^folder: expected manifest.json beside shard-00000.npz, got none$"
    ):
        explain(camkit.CAM(tiny(Plain)), Items(images()), tmp_path)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(images())


class Prefetching(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([images()])


def of(**settings: Any) -> dict[str, Any]:
    return {"loader": loader(Items(images()), **settings)}


READ = "read: expected a function from a batch to (x, target), got "
PART = "; torch.utils.data.Subset makes a data set of a part of one, in any order"
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"method": camkit.CAM},
        TypeError,
        "method: expected a method such as camkit.GradCAM(model), got <class 'camkit.CAM'>",
    ),
    ({"method": Plain()}, TypeError, "method: expected a method such as camkit.GradCAM(model), got Plain"),
    (
        {"method": camkit.GradCAM(Plain(), differentiable=True)},
        ValueError,
        "method: expected one with differentiable=False, got True",
    ),
    (
        {"method": camkit.Smoothed(camkit.GradCAM(Plain(), differentiable=True), camkit.flip_views())},
        ValueError,
        "method: expected one with differentiable=False, got True",
    ),
    (
        {"loader": images()},
        TypeError,
        "loader: expected a torch.utils.data.DataLoader, got Tensor",
    ),
    (
        {"loader": DataLoader(Stream())},
        TypeError,
        "loader: expected one over a data set with indices, got Stream, an IterableDataset",
    ),
    (
        of(shuffle=True),
        ValueError,
        "loader: expected one in the data set's order, got RandomSampler" + PART,
    ),
    (
        of(sampler=DistributedSampler(Items(images()), 2, 0)),
        ValueError,
        "loader: expected one in the data set's order, got DistributedSampler; "
        "processes share the items out by themselves",
    ),
    (
        {"loader": Prefetching(Items(images()))},
        TypeError,
        "loader: expected a torch.utils.data.DataLoader, got Prefetching, with an __iter__ of its own; "
        "collate_fn= and read= change batches",
    ),
    (of(batch_size=None), ValueError, "loader: expected one with a batch_size, got none"),
    (
        of(batch_size=1, batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, False)),
        ValueError,
        "loader: expected one with a batch_size, got BatchSampler",
    ),
    (
        of(sampler=SequentialSampler(range(4))),
        ValueError,
        "loader: expected one of all 9 items, got 4" + PART,
    ),
    (of(drop_last=True), ValueError, "loader: expected one of all items, got drop_last=True" + PART),
    (
        of(collate_fn=lambda items: torch.stack(items[1:])),
        ValueError,
        "loader: expected a batch of 3, got 2 maps for items 0 to 2",
    ),
    (of(collate_fn=str), TypeError, READ + "none, for batches of str"),
    (of(collate_fn=lambda items: []), TypeError, READ + "none, for batches of list"),
    ({"read": 3}, TypeError, READ + "int"),
    ({"read": lambda batch: batch[:2]}, TypeError, READ + "one to Tensor"),
    ({"read": lambda batch: (batch, None, None)}, TypeError, READ + "one to 3 items"),
    (
        {"colormap": "grey"},
        ValueError,
        "colormap: expected one of 'jet', 'turbo', 'viridis', 'inferno', 'magma', 'plasma', "
        "'coolwarm', 'gray', got 'grey'",
    ),
    ({"shard_size": 0}, ValueError, "shard_size: expected a positive number, got 0"),
    ({"shard_size": 2.0}, TypeError, "shard_size: expected an int, got float"),
    (
        {"progress": True},
        TypeError,
        "progress: expected a function that wraps an iterable, such as tqdm.tqdm, got bool",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_wrong_is_named(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "method": camkit.CAM(tiny(Plain)),
        "loader": loader(Items(images())),
        "folder": tmp_path,
    }
    with pytest.raises(error) as raised:
        camkit.explain_dataset(**arguments | given)
    assert str(raised.value) == message
    assert set(contents(tmp_path)) <= {"manifest.json"}


def test_a_part_in_another_order_by_subset(tmp_path: Path) -> None:
    x, method = images(), camkit.CAM(tiny(Plain))
    (found,) = shards(explain(method, Subset(Items(x), [7, 2]), tmp_path))
    assert np.array_equal(found["maps"], method(x[[7, 2]]).maps.numpy())


def test_images_of_several_sizes(tmp_path: Path) -> None:
    x, method = list(images()), camkit.CAM(tiny(Plain))
    x[5:] = [one[:, :8] for one in x[5:]]  # a shard of its own
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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import camkit

torch.set_num_threads(1)
folder = Path(sys.argv[1])
x = torch.randn(3, 3, 6, 6)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
method = camkit.CAM(model)  # without a gradient, which does not go with fork
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"}


def job(folder):
    loader = DataLoader(TensorDataset(x), batch_size=2)
    camkit.explain_dataset(method, loader, folder, shard_size=2, colormap="gray")


def killed(folder, last):
    '''Runs the job in a process that is killed at its last event with files; whether it was.'''
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    events = 0

    def count():
        nonlocal events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event, args):
        if event in EVENTS and str(args[0]).startswith(str(folder)):
            count()

    def called(frame, event, function):
        # Pictures are written by the same function; their pieces would only take time.
        inside = "PIL" not in frame.f_code.co_filename
        if event == "c_call" and inside and function.__name__ in ("write", "fsync"):
            count()

    sys.addaudithook(audited)
    sys.setprofile(called)
    job(folder)
    os._exit(0)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}



job(folder / "whole")  # here, so that no process has to import anything
whole = contents(folder / "whole")
assert len(whole) == 6, whole.keys()
last, halves = 1, 0
while killed(folder / "stopped", last):
    there = contents(folder / "stopped")
    parts = {name for name in there if name.endswith(".part")}
    halves += any(0 < len(there[name]) < len(whole[name.rsplit(".", 2)[0]]) for name in parts)
    assert len(parts) <= 1, (last, parts)
    for name in there.keys() - parts:
        assert there[name] == whole[name], (last, name)
    done = [name for name in there if name.startswith("shard-")]
    for name in done:
        for index in ([0, 1], [2])[int(name[6:11])]:
            assert f"heatmaps/{index:08d}.png" in there, (last, name, index)
    if last % 5 == 0:  # the second start is stopped, too
        killed(folder / "stopped", last // 2)
    job(folder / "stopped")
    assert contents(folder / "stopped") == whole, last
    shutil.rmtree(folder / "stopped")
    last += 1
assert contents(folder / "stopped") == whole
print(last - 1, halves)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_ends_with_the_same_files(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(KILLED)
    output = subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    kills, halves = map(int, output.stdout.split())
    assert kills > 50
    assert halves > 0  # some of them left half a file


SHARED = """
import json, os, signal, sys
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, Dataset

import camkit

torch.set_num_threads(1)
work, dies_at, own_group = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
method, x = torch.load(work / "job.pt", weights_only=False)
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]


def note(kind, what):
    with open(work / f"{kind}-{attempt}-{rank}", "a") as file:
        print(what, file=file)


class Items(Dataset):
    def __len__(self):
        return len(x)

    def __getitem__(self, index):
        note("loaded", index)
        if index == dies_at and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return x[index]


def progress(batches):
    note("shown", len(batches))
    return batches


if own_group:
    distributed.init_process_group("gloo")
loader = DataLoader(Items(), batch_size=2)
job = {"folder": work / "job", "colormap": "jet"}
manifest = camkit.explain_dataset(method, loader, **job, shard_size=2, progress=progress)
files = [shard["file"] for shard in json.loads(manifest.read_text())["shards"]]
note("missing", [file for file in files if not (work / "job" / file).exists()])
try:
    camkit.explain_dataset(method, loader, **job, shard_size=3)
except ValueError as error:
    note("refused", error)
try:
    camkit.explain_dataset(method, loader, work / f"apart-{rank}")
except ValueError as error:
    note("refused", error)
with torch.no_grad():
    method.model[-1].bias += int(rank)
try:
    camkit.explain_dataset(method, loader, work / "other")
except ValueError as error:
    note("refused", error)
assert distributed.is_initialized() == own_group
"""


class Shared:
    """A job of twelve items in six shards that several processes share; what they noted."""

    def __init__(self, folder: Path) -> None:
        x, self.folder = torch.randn(12, 3, 8, 8), folder
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        method = camkit.GradCAM(model.eval())
        torch.save((method, x), folder / "job.pt")
        camkit.explain_dataset(method, loader(x, batch_size=2), folder / "one", shard_size=2, colormap="jet")
        self.whole = contents(folder / "one")
        (folder / "job.py").write_text(SHARED)

    def run(self, processes: int, *, dies_at: int = -1, restarts: int = 0, own_group: bool = False) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        command += [str(self.folder / "job.py"), str(self.folder), str(dies_at), str(own_group)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as started:
            try:
                return started.wait(120)
            except subprocess.TimeoutExpired:
                started.terminate()  # which ends its workers, too
                raise

    def noted(self, kind: str, attempt: int) -> dict[int, list[str]]:
        """What each rank noted."""
        files = self.folder.glob(f"{kind}-{attempt}-*")
        return {int(file.name.rpartition("-")[2]): file.read_text().splitlines() for file in files}

    def check(self, ranks: int, attempt: int, done: set[int]) -> None:
        """That the job is whole, and that this attempt did what was not done, each rank its share."""
        assert contents(self.folder / "job") == self.whole
        loaded = self.noted("loaded", attempt)
        missing = [i for n in range(6) if n not in done for i in (2 * n, 2 * n + 1)]
        assert sorted(int(i) for each in loaded.values() for i in each) == missing
        counts = [len(loaded.get(rank, [])) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 2  # a shard
        assert self.noted("shown", attempt) == {0: [str(-(-counts[0] // 2))]}
        assert self.noted("missing", attempt) == {rank: ["[]"] for rank in range(ranks)}
        for first, second, third in self.noted("refused", attempt).values():
            assert first == "folder: expected the job of its manifest.json, with shard_size 2, got 3"
            assert second == "folder: expected one that all processes share, got another one in process 1"
            assert "method, loader: expected the same in every process, with weights " in third
        assert len(self.noted("refused", attempt)) == ranks
        assert not (self.folder / "other").exists()


def numbers(names: Iterable[str]) -> set[int]:
    return {int(name[6:11]) for name in names if re.fullmatch(r"shard-\d{5}\.npz", name)}


def test_two_processes_one_of_them_killed_and_started_again(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(2, dies_at=6, restarts=1) == 0
    before = job.noted("loaded", 0)
    assert before[1] == ["2", "3", "6"]  # the first shard of its share, and into the second
    assert before[0] in (["0", "1", "4", "5", "8", "9"][:n] for n in range(7))
    again = {int(i) // 2 for each in job.noted("loaded", 1).values() for i in each}
    assert {3, 5} <= again
    assert 1 not in again
    job.check(2, 1, set(range(6)) - again)


@pytest.mark.slow
def test_four_processes_one_of_them_killed_and_two_that_go_on(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(4, dies_at=10) != 0
    there = contents(tmp_path / "job")
    assert all(content == job.whole[name] for name, content in there.items() if not name.endswith(".part"))
    done = numbers(there)
    assert 1 in done
    assert 5 not in done
    assert job.noted("loaded", 0)[1] == ["2", "3", "10"]
    for file in tmp_path.glob("*-0-*"):
        file.unlink()
    assert job.run(2, own_group=True) == 0
    job.check(2, 0, done)


@pytest.mark.slow
def test_four_processes_undisturbed(tmp_path: Path) -> None:
    job = Shared(tmp_path)
    assert job.run(4) == 0
    job.check(4, 0, set())
