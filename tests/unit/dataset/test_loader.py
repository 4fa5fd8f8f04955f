"""The loader of a job: which loaders are refused, and the batches that are read from the others."""

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

import camkit
from helpers.families import Plain, tiny
from helpers.jobs import (
    BATCHES,
    ITEMS,
    SHARD,
    Items,
    WithNumbers,
    check,
    contents,
    explain,
    images,
    loader,
    shards,
)


def test_several_inputs(tmp_path: Path) -> None:
    x, numbers = images(), 9 * torch.randn(ITEMS, 4).double()
    method = camkit.GradCAM(tiny(WithNumbers))
    expected = [method((x[list(b)], {"given": numbers[list(b)]})) for b in BATCHES]
    assert len({int(c) for part in expected for c in part.target}) > 1  # the numbers change the classes
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
    read: list[Any] = [
        None,
        lambda batch: (UserDict(batch), None),
    ]  # image processors return a mapping that is no dict
    first, _ = shards(explain(method, Items(items), tmp_path, colormap="jet", read=read[mapping]))
    on_gpu = method({"x": x[:3].cuda(), "numbers": {"given": numbers[:3].cuda()}})
    np.testing.assert_allclose(first["maps"][:3], on_gpu.maps.cpu().numpy(), rtol=1e-9)


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
