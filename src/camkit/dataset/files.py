"""The files in the folder of a job: their names and contents, and writing them so that none is incomplete."""

import os
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from camkit import maps
from camkit._tools import checks
from camkit.methods.base import Explanation
from camkit.overlays import colorize

MANIFEST, HEATMAPS, SHARDS = "manifest.json", "heatmaps", "shard-*.npz"
#: The arrays of a shard, or of one batch in it, by name.
Arrays = dict[str, np.ndarray[Any, Any]]


def shard_name(number: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:05d}.npz"


def batch_to_arrays(explanation: Explanation, indices: range) -> Arrays:
    """Returns the arrays that one batch adds to its shard.

    Args:
        explanation: the explanation of the batch.
        indices: the numbers of its items in the data set.

    Raises:
        ValueError: if there is not one map for each item.
    """
    arrays = {
        "index": np.asarray(indices),
        "maps": maps.at_least_float32(explanation.maps.detach()).cpu().numpy().copy(),
    }
    if explanation.classes is not None:
        arrays["classes"] = explanation.classes.cpu().numpy()
    if len(arrays["maps"]) != len(indices):
        got = f"{len(arrays['maps'])} maps for {_items(indices)}"
        raise ValueError(checks.error_message("loader", f"a batch of {len(indices)}", got))
    return arrays


def require_alike(earlier: Arrays, arrays: Arrays, indices: range) -> None:
    """Raises a ``ValueError`` unless a batch can be joined to an earlier batch of its shard."""
    expected, got = (
        f"maps of {checks.shape_of(batch['maps'].shape[1:])}{' with classes' * ('classes' in batch)}"
        for batch in (earlier, arrays)
    )
    if expected != got:
        hint = "a transform such as torchvision's Resize makes them alike"
        expected, got = f"{expected}, as before in its shard", f"{got} for {_items(indices)}"
        raise ValueError(checks.error_message("loader", expected, got, hint))


def _items(indices: range) -> str:
    return f"items {indices.start} to {indices.stop - 1}"


def write_shard(path: Path, batches: Sequence[Arrays]) -> None:
    """Writes one shard from all of its batches."""
    joined: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    write_atomically(path, partial(np.savez, **joined))


def write_heatmaps(folder: Path, explanation: Explanation, indices: range, colormap: str) -> None:
    """Writes the heatmaps of one batch as PNG files, one for each item or one for each of its K maps.

    Args:
        folder: the folder of the heatmaps.
        explanation: the explanation of the batch.
        indices: the numbers of its items in the data set.
        colormap: name of the colours.

    Raises:
        ValueError: if the input has other than two spatial dimensions.
    """
    if len(explanation.input_size) != 2:
        got = f"heatmaps of {checks.shape_of(explanation.input_size)}"
        raise ValueError(checks.error_message("colormap", "None where inputs are no images", got))
    values = explanation.heatmaps()
    # Gray needs no table of colours, which would round the values once more.
    if colormap != "gray":
        values = colorize(values, colormap).movedim(-3, -1)
    pixels = (values * 255).round().to(torch.uint8).cpu().numpy()
    has_several = explanation.maps.ndim > 3  # (N, K, h, w)
    for index, of_item in zip(indices, pixels, strict=True):
        for k, picture in enumerate(of_item if has_several else [of_item]):
            name = f"{index:08d}-{k}.png" if has_several else f"{index:08d}.png"
            # Level 1 takes a third of the time of the default level, for files a third larger.
            save = partial(Image.fromarray(picture).save, format="PNG", compress_level=1)
            write_atomically(folder / name, save)


def write_atomically(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that gets its name only when it is complete and on the disk.

    Args:
        path: the file; an existing one is replaced.
        save: writes the content to an open file.
    """
    part = partial_file(path)
    try:
        with part.open("wb") as file:
            save(file)
            file.flush()
            # Without fsync, a power failure could leave the name on the disk without the content.
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # Ctrl-C too
        part.unlink(missing_ok=True)
        raise


def partial_file(path: Path) -> Path:
    """Returns a new name beside ``path``, for a file that :func:`delete_partial_files` may delete later."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


def delete_partial_files(folder: Path) -> None:
    """Deletes the incomplete files that a job left in its folder when it was killed."""
    for name in (MANIFEST, SHARDS, f"{HEATMAPS}/*.png"):
        for part in folder.glob(f"{name}.*.part"):
            part.unlink()
