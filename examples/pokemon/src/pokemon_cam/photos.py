"""Reads photos from a folder that holds one folder per class."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar

PAPER_CLASSES = (
    "Arbok",
    "Bulbasaur",
    "Charizard",
    "Charmander",
    "Jigglypuff",
    "Pikachu",
    "Squirtle",
)

# What Pillow's decoders raise on broken files, by format.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Reading:
    """What came out of a folder.

    Attributes:
        pictures: the photos that could be read.
        broken: for each image file that could not be read, the reason.
        skipped: what is no image by its name: other files, hidden files, folders in class folders.
    """

    pictures: PictureSet
    broken: dict[Path, str]
    skipped: tuple[Path, ...]


def read_folder(root: Path, classes: Sequence[str], *, size: int) -> Reading:
    """Read the photos of some classes, squared to one size.

    Args:
        root: folder with one folder per class, named after it.
        classes: the classes to read, in the order of their labels.
        size: height and width in pixels that every photo is resized to.

    Returns:
        The photos, and the files that are not among them.

    Raises:
        ValueError: when the folder or one of the classes is not there, a class is named twice,
            fewer than two are named, or a class has fewer than two readable photos.
    """
    if not root.is_dir():
        raise ValueError(
            f"--data: expected 'creatures' or a folder with one folder per class, got '{root}'"
        )
    there = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in classes:
        if name not in there:
            raise ValueError(f"--classes: expected classes out of {there}, got {name!r}")
        if list(classes).count(name) > 1:
            raise ValueError(f"--classes: expected every class once, got {name!r} twice")
    if len(classes) < 2:
        raise ValueError(f"--classes: expected at least 2 classes, got {list(classes)}")

    entries = [
        (label, path)
        for label, name in enumerate(classes)
        for path in sorted((root / name).iterdir())
    ]
    images, labels, skipped = [], [], []
    broken: dict[Path, str] = {}
    with progress_bar("reading photos", len(entries), "file") as bar:
        for label, path in entries:
            bar.update()
            if not _is_named_as_image(path):
                skipped.append(path)
                continue
            try:
                images.append(read_photo(path, size=size))
                labels.append(label)
            except _BROKEN as error:
                broken[path] = str(error) or type(error).__name__
    for label, name in enumerate(classes):
        if labels.count(label) < 2:
            raise ValueError(
                f"--data: expected at least 2 readable images in '{root / name}', "
                f"got {labels.count(label)}"
            )
    pictures = PictureSet(torch.stack(images), torch.tensor(labels), tuple(classes))
    return Reading(pictures, broken, tuple(skipped))


def read_photo(path: Path, *, size: int) -> torch.Tensor:
    """Read one image file of any mode, upright and over white where it is transparent.

    Args:
        path: the file.
        size: height and width in pixels that the image is resized to, whatever its shape.

    Returns:
        The image, uint8, shape ``(3, size, size)``.

    Raises:
        OSError: when the file cannot be read; some formats raise other errors on broken data.
        ValueError: when the image's pixels have no known range (floating-point pixels).
    """
    with Image.open(path) as opened:
        opened.load()
        image = _as_rgb(ImageOps.exif_transpose(opened))
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips instead of scaling
        deep = np.asarray(image).astype(np.float64)
        return Image.fromarray((deep / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        cut_out = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, cut_out).convert("RGB")
    return image.convert("RGB")


def _is_named_as_image(path: Path) -> bool:
    Image.init()
    opened_as = Image.registered_extensions().get(path.suffix.lower())
    return path.is_file() and not path.name.startswith(".") and opened_as in Image.OPEN
