"""The manifest of a job, which ties a folder to that job."""

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import camkit
from helpers.families import Plain, tiny
from helpers.jobs import (
    BATCH,
    ITEMS,
    SHARD,
    Items,
    contents,
    explain,
    images,
    loader,
)


def test_the_manifest_says_what_was_explained_by_what(tmp_path: Path) -> None:
    # The manifest leaves progress= out, because it changes no map.
    method = camkit.ScoreCAM(tiny(Plain), "features", progress=iter)
    assert json.loads(explain(method, Items(images()), tmp_path, colormap="gray").read_text()) | {
        "weights": ""
    } == {
        "camkit": version("camkit"),
        "method": repr(camkit.ScoreCAM(method.model, "features")),
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
    """Tensors in tuples of a state_dict, tensors of unusual kinds, and buffers outside the state_dict."""

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
    kept = [make(model)]  # keeping the first object gives the second another address in its repr
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
