"""The manifest of a job: a record of everything that its files depend on, kept in the folder."""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from camkit._tools import checks
from camkit._tools.nested import tensors_in
from camkit.dataset.files import (
    HEATMAPS,
    MANIFEST,
    SHARDS,
    delete_partial_files,
    shard_name,
    write_atomically,
)
from camkit.methods.smoothing import Smoothed


def make_manifest(
    method: Any, model: nn.Module, loader: DataLoader[Any], shard_size: int, colormap: str | None
) -> dict[str, Any]:
    """Makes the manifest: everything that the files depend on, as far as it can be known.

    It is the same at every start of a job and in each of its processes, and can be written as JSON.

    Args:
        method: the method.
        model: its model.
        loader: the loader, over a data set with a length.
        shard_size: number of items in one shard.
        colormap: the colours of the heatmaps; ``None`` for none.
    """
    items = len(loader.dataset)  # type: ignore[arg-type]
    return {
        "camkit": version("camkit"),
        "method": _describe(method),
        "model": type(model).__qualname__,
        "weights": _hash_weights(model),
        "items": items,
        "batch_size": loader.batch_size,  # the batch size changes how sums are rounded
        "colormap": colormap,
        "shard_size": shard_size,
        "shards": [
            {"file": shard_name(n), "first": first, "count": min(shard_size, items - first)}
            for n, first in enumerate(range(0, items, shard_size))
        ],
    }


def _describe(method: Any) -> str:
    """Returns a method's ``repr`` without parts that differ between processes or do not affect the maps."""
    if isinstance(method, Smoothed):
        return f"Smoothed({_describe(method.method)}, {_without_addresses(method.views)})"
    # A progress bar does not affect the maps, so a job may continue with another one.
    if getattr(method, "progress", None) is not None:
        method = copy.copy(method)
        method.progress = None
    return _without_addresses(method)


def _without_addresses(value: object) -> str:
    """Returns the ``repr`` of a value without the addresses of objects, which change at every start."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _hash_weights(model: nn.Module) -> str:
    """Returns the SHA-256 of a model's parameters and buffers, of any type and device, in hexadecimal."""
    digest = hashlib.sha256()
    # state_dict leaves out the buffers that are not persistent. Quantized layers put their weights into it
    # as tuples.
    for name, value in (dict(model.named_buffers()) | model.state_dict()).items():
        for tensor in tensors_in(value):
            digest.update(f"{name} {tensor.dtype} {checks.shape_of(tensor)}\n".encode())
            numbers = tensor.detach().cpu()
            if numbers.is_quantized:
                numbers = numbers.dequantize()
            if numbers.layout != torch.strided:
                numbers = numbers.to_dense()
            # A tensor that is conjugate or negative by a flag cannot be read as bytes.
            numbers = numbers.resolve_conj().resolve_neg().contiguous().flatten()
            digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prepare_folder(folder: Path, manifest: dict[str, Any]) -> Sequence[int]:
    """Makes the folder ready for a job, or for the rest of one that was stopped.

    Makes the folder and its manifest if they are missing, and deletes files that were never completed.

    Returns:
        The numbers of the shards that are still missing.

    Raises:
        ValueError: if the folder belongs to another job, or has shards without a manifest.
    """
    path = folder / MANIFEST
    existing = {shard.name for shard in folder.glob(SHARDS)}
    if path.exists():
        require_equal_manifests(
            "folder", f"the job of its {MANIFEST}", json.loads(path.read_text()), manifest
        )
    elif existing:
        raise ValueError(checks.error_message("folder", f"{MANIFEST} beside {min(existing)}", "none"))
    # Nothing is written or deleted before this line, so that a folder of another job stays as it is.
    (folder if manifest["colormap"] is None else folder / HEATMAPS).mkdir(parents=True, exist_ok=True)
    delete_partial_files(folder)
    if not path.exists():
        write_atomically(path, lambda file: file.write((json.dumps(manifest, indent=1) + "\n").encode()))
    return [n for n, shard in enumerate(manifest["shards"]) if shard["file"] not in existing]


def require_equal_manifests(name: str, expected: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises a ``ValueError`` unless two manifests are equal; it names the first entry that differs.

    Args:
        name: the argument that the error is about.
        expected: the job that ``first`` describes, in words.
        first: the manifest to compare with.
        other: the manifest that must equal it.
    """
    for key in first | other:
        if first.get(key) != other.get(key):
            expected = f"{expected}, with {key} {first.get(key)!r}"
            raise ValueError(checks.error_message(name, expected, repr(other.get(key))))
