"""The files of a job: shards, heatmaps, and writing each whole or not at all."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
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

MANIFEST, HEATMAPS, PART = "manifest.json", "heatmaps", "part"


def to_arrays(
    explanation: Explanation, indices: range, held: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> dict[str, np.ndarray[Any, Any]]:
    """One batch of a shard, to be put behind those that are held."""
    found = {
        "index": np.asarray(indices),
        "maps": maps.at_least_float32(explanation.maps.detach()).cpu().numpy().copy(),
    }
    if explanation.classes is not None:
        found["classes"] = explanation.classes.cpu().numpy()
    items = f"items {indices.start} to {indices.stop - 1}"
    if len(found["maps"]) != len(indices):
        got = f"{len(found['maps'])} maps for {items}"
        raise ValueError(checks.error_message("loader", f"a batch of {len(indices)}", got))
    before, now = (
        f"maps of {checks.shape_of(arrays['maps'].shape[1:])}{' with classes' * ('classes' in arrays)}"
        for arrays in (held[0] if held else found, found)
    )
    if before != now:
        hint = "a transform such as torchvision's Resize makes them alike"
        raise ValueError(
            checks.error_message("loader", f"{before}, as before in its shard", f"{now} for {items}", hint)
        )
    return found


def write_heatmaps(folder: Path, explanation: Explanation, indices: range, colormap: str) -> None:
    """Writes the heatmaps of a batch, one picture for each."""
    if len(explanation.input_size) != 2:
        got = f"heatmaps of {checks.shape_of(explanation.input_size)}"
        raise ValueError(checks.error_message("colormap", "None where inputs are no images", got))
    values = explanation.heatmaps()
    if colormap != "gray":  # whose table rounds once more
        values = colorize(values, colormap).movedim(-3, -1)
    pixels = (values * 255).round().to(torch.uint8).cpu().numpy()
    several = explanation.maps.ndim > 3
    for index, of_item in zip(indices, pixels, strict=True):
        for k, picture in enumerate(of_item if several else [of_item]):
            name = f"{index:08d}-{k}.png" if several else f"{index:08d}.png"
            # A third of the time that the default takes, for files a third larger.
            save = partial(Image.fromarray(picture).save, format="PNG", compress_level=1)
            write_atomically(folder / name, save)


def write_atomically(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that bears its name only when it is whole, and on the disk."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.{PART}")
    try:
        with part.open("wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
