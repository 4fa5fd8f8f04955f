"""Heatmap + picture -> picture: colour maps, blending, picture grids."""

import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from camkit import maps
from camkit._tools import checks
from camkit._tools.colormaps import TABLES

#: A picture: a PIL image, a path, a tensor ``(C, H, W)`` or an array ``(H, W, C)``, or either ``(H, W)``.
ImageLike = Image.Image | str | os.PathLike[str] | torch.Tensor | np.ndarray[Any, Any]


class Preset(Protocol):
    """What ``weights.transforms()`` of torchvision gives, as far as it is needed here."""

    mean: Sequence[float]
    std: Sequence[float]


def overlay(
    image: ImageLike,
    heatmap: torch.Tensor | np.ndarray[Any, Any],
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
) -> Image.Image:
    """Blends a heatmap over a picture, at the picture's own size.

    ``(1 - alpha) * picture + alpha * colours``, rounded down, and nothing else: the result is not rescaled.

    Args:
        image: a PIL image, a path (an EXIF rotation is applied), a uint8 tensor or array, or a float one
            in [0, 1]. Tensors are ``(C, H, W)``, arrays ``(H, W, C)``, both may be ``(H, W)``.
        heatmap: ``(h, w)``, in [0, 1]; resized to the picture.
        colormap: jet, turbo, viridis, inferno, magma, plasma, coolwarm or gray.
        alpha: how much of the heatmap: 0 gives the picture back bit for bit, 1 the heatmap alone.

    Returns:
        An RGB image of the picture's size; RGBA where the picture has transparency, which is kept.

    Raises:
        ValueError: for NaN or values out of range, for another shape, an unknown colour map.
        TypeError: for an image of another kind.

    Example:
        >>> import camkit, torch
        >>> from PIL import Image
        >>> camkit.overlay(Image.new("RGB", (32, 24)), torch.eye(7)).size
        (32, 24)
    """
    picture = _to_picture(image)
    _check_alpha(alpha)
    checks.one_of("colormap", colormap, TABLES)
    if isinstance(heatmap, np.ndarray):
        heatmap = torch.from_numpy(np.array(heatmap))  # a copy: torch reads no flipped or locked arrays
    checks.tensor("heatmap", heatmap)
    if heatmap.ndim != 2:
        hint = "give one map, such as explanation.heatmaps()[0]"
        expected = "shape (h, w)"
        raise ValueError(
            checks.error_message("heatmap", expected, checks.shape_of(heatmap) or "a number", hint)
        )
    # By NumPy and Pillow: a picture is so little that to wake torch's threads for it takes longer.
    heatmap = heatmap.detach().float().cpu()
    # Before the resizing, which would leave no trace of what was wrong.
    _in_unit_range("heatmap", heatmap.numpy(), "camkit.normalize brings a raw map there")
    resized = maps.resize(heatmap, picture.size[::-1])
    colours = Image.fromarray(np.clip(resized.numpy() * 256, 0, 255).astype(np.uint8))
    colours.putpalette(bytes.fromhex(TABLES[colormap]))
    opaque = picture.mode == "RGB"
    blended = Image.blend(picture if opaque else picture.convert("RGB"), colours.convert("RGB"), alpha)
    if not opaque:
        blended.putalpha(picture.getchannel("A"))
    return blended


def blend(
    images: torch.Tensor, heatmaps: torch.Tensor, *, colormap: str = "jet", alpha: float = 0.5
) -> torch.Tensor:
    """Blends heatmaps over pictures: :func:`overlay` for batches of tensors, on their device.

    Args:
        images: floats in [0, 1], ``(..., 3, H, W)`` or ``(..., 1, H, W)``.
        heatmaps: floats in [0, 1], ``(..., H, W)``.
        colormap: see :func:`overlay`.
        alpha: how much of the heatmap, in [0, 1].

    Returns:
        ``(..., 3, H, W)``, in [0, 1], in the type of ``images``.

    Raises:
        ValueError: for NaN or values out of range, unequal sizes, an unknown colour map.
        TypeError: for images that are not floats.

    Example:
        >>> import camkit, torch
        >>> camkit.blend(torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    checks.tensor("images", images)
    _check_alpha(alpha)
    if not images.is_floating_point():
        raise TypeError(checks.error_message("images", "floats in [0, 1]", images.dtype))
    if images.ndim < 3 or images.shape[-3] not in (1, 3):
        expected = "shape (..., 3, H, W)"
        raise ValueError(checks.error_message("images", expected, checks.shape_of(images)))
    _in_unit_range("images", images, "camkit.denormalize undoes a preset's normalisation")
    _check_heatmaps(heatmaps, colormap)
    if heatmaps.shape[-2:] != images.shape[-2:]:
        expected = f"the images' size, {checks.shape_of(images.shape[-2:])}"
        raise ValueError(checks.error_message("heatmaps", expected, checks.shape_of(heatmaps.shape[-2:])))
    try:
        batch = torch.broadcast_shapes(images.shape[:-3], heatmaps.shape[:-2])
    except RuntimeError:
        expected = f"as many as images, {checks.shape_of(images.shape[:-3])}"
        got = checks.shape_of(heatmaps.shape[:-2])
        raise ValueError(checks.error_message("heatmaps", expected, got)) from None
    heatmaps = heatmaps.to(images.device).expand(*batch, *heatmaps.shape[-2:])
    blended = _look_up(alpha * _table(colormap).to(images), heatmaps)
    return blended.add_(images, alpha=1 - alpha).clamp_(0, 1)


def colorize(heatmaps: torch.Tensor, colormap: str = "jet") -> torch.Tensor:
    """The colours of heatmaps.

    Args:
        heatmaps: floats in [0, 1], ``(..., H, W)``.
        colormap: see :func:`overlay`.

    Returns:
        ``(..., 3, H, W)``, float32, in [0, 1], on the heatmaps' device.

    Raises:
        ValueError: for NaN or values out of [0, 1], or an unknown colour map.
    """
    _check_heatmaps(heatmaps, colormap)
    return _look_up(_table(colormap).to(heatmaps.device), heatmaps)


def denormalize(
    images: torch.Tensor,
    preset: Preset | None = None,
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> torch.Tensor:
    """Undoes the normalisation of a torchvision preset, so that images can be looked at.

    Args:
        images: normalised floats, ``(..., C, H, W)``.
        preset: what ``weights.transforms()`` gives; its mean and deviation are used.
        mean: mean of each channel, where there is no preset; ImageNet's by default.
        std: standard deviation of each channel, likewise.

    Returns:
        Images of the same shape and type, clipped to [0, 1].

    Raises:
        ValueError: if the number of channels is another.
        TypeError: for images that are not floats.

    Example:
        >>> import camkit, torch
        >>> from torchvision.models import ResNet18_Weights
        >>> x = ResNet18_Weights.DEFAULT.transforms()(torch.rand(1, 3, 256, 256))
        >>> camkit.denormalize(x, ResNet18_Weights.DEFAULT.transforms()).shape
        torch.Size([1, 3, 224, 224])
    """
    checks.tensor("images", images)
    if not images.is_floating_point():
        raise TypeError(checks.error_message("images", "normalised floats", images.dtype))
    if preset is not None:
        mean, std = preset.mean, preset.std
    if images.ndim < 3 or images.shape[-3] not in (len(mean), len(std)) or len(mean) != len(std):
        expected = f"shape (..., {len(mean)}, H, W)"
        raise ValueError(checks.error_message("images", expected, checks.shape_of(images)))
    shift, scale = (images.new_tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    return (images * scale + shift).clamp(0, 1)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Lays pictures out in labelled rows and columns on white, as a paper's figures do.

    Every picture is centred in a cell; columns are as wide, and rows as high, as their largest picture.

    Args:
        rows: the pictures, row by row; rows may differ in length.
        row_labels: a label for each row, to its left.
        column_labels: a label for each column, above it.

    Returns:
        One RGB image.

    Raises:
        ValueError: if there is no picture, or for a wrong number of labels.

    Example:
        >>> import camkit
        >>> from PIL import Image
        >>> camkit.grid([[Image.new("RGB", (20, 10))] * 3] * 2).size
        (84, 32)
    """
    rows = [list(row) for row in rows]
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError(checks.error_message("rows", "at least one picture", "none"))
    for name, labels, count in (
        ("row_labels", row_labels, len(rows)),
        ("column_labels", column_labels, columns),
    ):
        if labels is not None and len(labels) != count:
            raise ValueError(checks.error_message(name, f"{count} labels", len(labels)))
    gap = 4
    widths = [max((r[c].width for r in rows if c < len(r)), default=0) for c in range(columns)]
    heights = [max((picture.height for picture in row), default=0) for row in rows]
    font = ImageFont.load_default(size=max(10, min(20, max(heights) // 8)))
    # A column is at least as wide as its label, so that no label is cut.
    if column_labels is not None:
        widths = [max(w, _extent(t, font)[0]) for w, t in zip(widths, column_labels, strict=True)]
    if row_labels is not None:
        heights = [max(h, _extent(t, font)[1]) for h, t in zip(heights, row_labels, strict=True)]
    left = gap + max((_extent(t, font)[0] + 2 * gap for t in row_labels or ()), default=0)
    top = gap + max((_extent(t, font)[1] + 2 * gap for t in column_labels or ()), default=0)
    lefts = [left + sum(widths[:c]) + gap * 2 * c for c in range(columns)]
    tops = [top + sum(heights[:r]) + gap * r for r in range(len(rows))]
    size = (lefts[-1] + widths[-1] + gap, tops[-1] + heights[-1] + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for x, width, label in zip(lefts, widths, column_labels or (), strict=False):
        draw.text((x + width / 2, top / 2), label, fill="black", font=font, anchor="mm", align="center")
    for y, height, label in zip(tops, heights, row_labels or (), strict=False):
        draw.text(
            (left - 2 * gap, y + height / 2), label, fill="black", font=font, anchor="rm", align="right"
        )
    for row, y, height in zip(rows, tops, heights, strict=True):
        for picture, x, width in zip(row, lefts, widths, strict=False):
            corner = (x + (width - picture.width) // 2, y + (height - picture.height) // 2)
            canvas.paste(_on_white(_to_picture(picture)), corner)
    return canvas


def _extent(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Width and height of a text of one or more lines."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(box[2]), round(box[3])


@cache
def _table(colormap: str) -> torch.Tensor:
    """The colours of a map, ``(256, 3)``, in [0, 1]."""
    colours = np.frombuffer(bytes.fromhex(TABLES[colormap]), np.uint8).reshape(256, 3)
    return torch.from_numpy(colours.astype(np.float32) / 255)


def _look_up(colours: torch.Tensor, heatmaps: torch.Tensor) -> torch.Tensor:
    """The colours ``(256, 3)`` of heatmaps ``(..., H, W)`` in [0, 1], as a new ``(..., 3, H, W)``."""
    # 256 equal bins, the last of which holds 1.
    index = (heatmaps.detach().float() * 256).clamp_(max=255).int().flatten()
    found = colours.new_empty(*heatmaps.shape[:-2], 3, *heatmaps.shape[-2:])
    for channel, values in zip(found.unbind(-3), colours.T.contiguous(), strict=True):
        channel.copy_(values.index_select(0, index).view(heatmaps.shape))
    return found


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(checks.error_message("alpha", "a number in [0, 1]", repr(alpha)))


def _check_heatmaps(heatmaps: torch.Tensor, colormap: str) -> None:
    checks.tensor("heatmaps", heatmaps)
    checks.one_of("colormap", colormap, TABLES)
    if heatmaps.ndim < 2:
        got = checks.shape_of(heatmaps) or "a number"
        raise ValueError(checks.error_message("heatmaps", "shape (..., H, W)", got))
    _in_unit_range("heatmaps", heatmaps, "camkit.normalize brings raw maps there")


def _in_unit_range(name: str, values: torch.Tensor | np.ndarray[Any, Any], hint: str) -> None:
    if 0 in values.shape:
        raise ValueError(
            checks.error_message(name, "at least one value", checks.shape_of(tuple(values.shape)))
        )
    if isinstance(values, torch.Tensor):
        low, high = (value.item() for value in torch.aminmax(values.detach()))
    else:
        low, high = values.min().item(), values.max().item()
    if math.isnan(low):  # of all values, if one of them is
        raise ValueError(checks.error_message(name, "values in [0, 1]", "NaN"))
    # What interpolation and float16 add to a 1 is no mistake of the caller's.
    if low < -1e-3 or high > 1 + 1e-3:
        got = f"values in [{low:.4g}, {high:.4g}]"
        raise ValueError(checks.error_message(name, "values in [0, 1]", got, hint))


def _to_picture(image: ImageLike) -> Image.Image:
    """A picture as RGB, or RGBA where it has transparency."""
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as file:
            return _to_picture(ImageOps.exif_transpose(file))
    if isinstance(image, Image.Image):
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):  # no range is agreed on for these: read as arrays are
            return _to_picture(np.asarray(image))
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return image if image.mode == mode else image.convert(mode)
    array: np.ndarray[Any, Any]
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        tensor = tensor.movedim(0, -1) if tensor.ndim == 3 else tensor
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        axes = "(C, H, W) or (H, W), C one of 1, 3, 4"
    elif isinstance(image, np.ndarray):
        array, axes = image, "(H, W, C) or (H, W), C one of 1, 3, 4"
    else:
        expected = "a PIL image, a path, a tensor or an array"
        raise TypeError(checks.error_message("image", expected, type(image).__name__))
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(checks.error_message("image", f"shape {axes}", checks.shape_of(image.shape)))
    if np.issubdtype(array.dtype, np.floating):
        hint = "camkit.denormalize undoes a preset's normalisation"
        _in_unit_range("image", array, hint)
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise TypeError(checks.error_message("image", "uint8, or floats in [0, 1]", array.dtype))
    return Image.fromarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def _on_white(picture: Image.Image) -> Image.Image:
    """The same picture without transparency."""
    if picture.mode == "RGB":
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
