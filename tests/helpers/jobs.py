"""A small data set, a job over it, and the files that the job writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
)

import camkit
from helpers.families import Plain

PROGRAMS = Path(__file__).parent / "programs"
ITEMS, BATCH, SHARD = 9, 3, 5
BATCHES = [range(3), range(3, 5), range(5, 8), range(8, 9)]  # no batch reaches over the end of a shard


class WithNumbers(Plain):
    """A network that takes a few numbers by name, beside the images."""

    def forward(self, x: Tensor, numbers: dict[str, Tensor] | None = None) -> Tensor:
        assert numbers is not None
        return super().forward(x) + numbers["given"]


class Items(Dataset[Any]):
    """A data set that notes the items it loads, and fails at one of them if it is told to."""

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
    """Asserts that the shards hold these explanations, one for each of BATCHES, bit for bit."""
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
