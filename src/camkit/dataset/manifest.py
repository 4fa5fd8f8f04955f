"""The manifest of a job: all that its files depend on."""

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
from camkit.dataset.files import HEATMAPS, MANIFEST, PART, write_atomically
from camkit.methods.smoothing import Smoothed


def make_manifest(
    method: Any, model: nn.Module, loader: DataLoader[Any], shard_size: int, colormap: str | None
) -> dict[str, Any]:
    """All that the files depend on, as far as it is known; the same at every start and in every process."""
    items = len(loader.dataset)  # type: ignore[arg-type]
    return {
        "camkit": version("camkit"),
        "method": _describe(method),
        "model": type(model).__qualname__,
        "weights": _hash_weights(model),
        "items": items,
        "batch_size": loader.batch_size,  # which changes rounding
        "colormap": colormap,
        "shard_size": shard_size,
        "shards": [
            {"file": f"shard-{n:05d}.npz", "first": first, "count": min(shard_size, items - first)}
            for n, first in enumerate(range(0, items, shard_size))
        ],
    }


def _describe(method: Any) -> str:
    """A method in words, without what changes from process to process or nothing in the maps."""
    if isinstance(method, Smoothed):
        return f"Smoothed({_describe(method.method)}, {_without_addresses(method.views)})"
    if getattr(method, "progress", None) is not None:
        method = copy.copy(method)
        method.progress = None
    return _without_addresses(method)


def _without_addresses(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _hash_weights(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, of any type and on any device."""
    found = hashlib.sha256()
    # Quantized layers keep theirs in tuples; some buffers are in no state_dict.
    for name, value in (dict(model.named_buffers()) | model.state_dict()).items():
        for tensor in tensors_in(value):
            found.update(f"{name} {tensor.dtype} {checks.shape_of(tensor)}\n".encode())
            numbers = tensor.detach().cpu()
            if numbers.is_quantized:
                numbers = numbers.dequantize()
            if numbers.layout != torch.strided:
                numbers = numbers.to_dense()
            numbers = numbers.resolve_conj().resolve_neg().contiguous().flatten()
            found.update(numbers.view(torch.uint8).numpy().data)
    return found.hexdigest()


def prepare_folder(folder: Path, manifest: dict[str, Any]) -> Sequence[int]:
    """The numbers of the shards still to do, in a folder that is ready for them."""
    path = folder / MANIFEST
    there = {shard.name for shard in folder.glob("shard-*.npz")}
    if path.exists():
        require_equal("folder", f"the job of its {MANIFEST}", json.loads(path.read_text()), manifest)
    elif there:
        raise ValueError(checks.error_message("folder", f"{MANIFEST} beside {min(there)}", "none"))
    (folder if manifest["colormap"] is None else folder / HEATMAPS).mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, "shard-*.npz", f"{HEATMAPS}/*.png"):
        for left_over in folder.glob(f"{name}.*.{PART}"):
            left_over.unlink()
    if not path.exists():
        write_atomically(path, lambda file: file.write((json.dumps(manifest, indent=1) + "\n").encode()))
    return [n for n, shard in enumerate(manifest["shards"]) if shard["file"] not in there]


def require_equal(name: str, expected: str, there: dict[str, Any], came: dict[str, Any]) -> None:
    """Raise a ``ValueError`` unless two manifests are equal."""
    for key in there | came:
        if there.get(key) != came.get(key):
            expected = f"{expected}, with {key} {there.get(key)!r}"
            raise ValueError(checks.error_message(name, expected, repr(came.get(key))))
