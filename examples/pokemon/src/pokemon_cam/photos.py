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
"""The classes of the paper, in the order of their labels."""

# Pillow has no common error for a broken file; each decoder raises errors of its own.
_DECODING_ERRORS = (
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
    """The result of reading a folder of photos.

    Attributes:
        pictures: the photos that could be read.
        broken: the image files that could not be read, each with the reason.
        skipped: everything in the class folders that is not an image by its name: other files,
            hidden files and folders.
    """

    pictures: PictureSet
    broken: dict[Path, str]
    skipped: tuple[Path, ...]


def read_folder(root: Path, classes: Sequence[str], *, size: int) -> Reading:
    """Read the photos of the given classes and resize all of them to one square size.

    Args:
        root: folder that contains one folder per class, named after the class.
        classes: names of the classes to read, in the order of their labels.
        size: height and width of the resized photos, in pixels.

    Returns:
        The photos, and the files that could not be read or were skipped.

    Raises:
        ValueError: if the folder or a class is missing, if a class is given twice, if fewer than
            two classes are given, or if a class has fewer than two readable photos.
    """
    if not root.is_dir():
        raise ValueError(
            f"--data: expected 'creatures' or a folder with one folder per class, got '{root}'"
        )
    available = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in classes:
        if name not in available:
            raise ValueError(f"--classes: expected classes out of {available}, got {name!r}")
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
    # One broken file among thousands does not end the run; it is reported with the results.
    with progress_bar("reading photos", len(entries), "file") as bar:
        for label, path in entries:
            bar.update()
            if not _looks_like_image(path):
                skipped.append(path)
                continue
            try:
                images.append(read_photo(path, size=size))
                labels.append(label)
            except _DECODING_ERRORS as error:
                # Some of these errors have no message; the name of the error stands in for it.
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
    """Read one image file as RGB and resize it to a square.

    The image may be greyscale, RGB, CMYK or use a palette, and have 16 bits per pixel or
    transparency. Transparent pixels are blended with white, and an EXIF rotation is undone.

    Args:
        path: the file to read.
        size: height and width of the result in pixels; the aspect ratio is not kept.

    Returns:
        The image, uint8, shape ``(3, size, size)``.

    Raises:
        OSError: if the file cannot be read; some formats raise other errors on broken data.
        ValueError: if the image has floating-point pixels, whose range is unknown.
    """
    with Image.open(path) as opened:
        opened.load()  # `open` reads the header only; a broken file shows here.
        image = _as_rgb(ImageOps.exif_transpose(opened))
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        # These are 16-bit pixels. Pillow's own conversion would clip values above 255 instead of
        # scaling them; 257 maps 65,535 to 255.
        pixels = np.asarray(image).astype(np.float64)
        return Image.fromarray((pixels / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    # "a" is premultiplied alpha; palette images name their transparent colours in `info`.
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _looks_like_image(path: Path) -> bool:
    """Test whether a path is a visible file with the suffix of a format that Pillow can open."""
    Image.init()  # Pillow knows only a few formats until then.
    file_format = Image.registered_extensions().get(path.suffix.lower())
    # Pillow can only write some of its formats, such as PDF; those are not in `Image.OPEN`.
    return path.is_file() and not path.name.startswith(".") and file_format in Image.OPEN
