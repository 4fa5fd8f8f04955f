"""Pictures of heatmaps: colour maps, blending with a photo, grids of pictures."""

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

#: A picture: a PIL image, the path of one, a tensor ``(C, H, W)`` or ``(H, W)``, or an array ``(H, W, C)`` or
#: ``(H, W)``.
ImageLike = Image.Image | str | os.PathLike[str] | torch.Tensor | np.ndarray[Any, Any]


class Preset(Protocol):
    """The preprocessing of a model, as ``weights.transforms()`` of torchvision returns it.

    Attributes:
        mean: the mean of each channel, which it subtracts.
        std: the standard deviation of each channel, by which it divides.
    """

    mean: Sequence[float]
    std: Sequence[float]


def overlay(
    image: ImageLike,
    heatmap: torch.Tensor | np.ndarray[Any, Any],
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
) -> Image.Image:
    """Blends a heatmap over a picture, at the size of the picture.

    Each pixel is ``(1 - alpha) * picture + alpha * colour``, rounded down. The result is not rescaled.

    Args:
        image: a PIL image, the path of one, or a tensor ``(C, H, W)`` or array ``(H, W, C)`` of uint8 or of
            floats in [0, 1]; both may also be ``(H, W)``. A file is rotated as its EXIF data says.
        heatmap: shape ``(h, w)``, in [0, 1]. It is resized to the picture.
        colormap: jet, turbo, viridis, inferno, magma, plasma, coolwarm or gray.
        alpha: weight of the heatmap, in [0, 1]: 0 returns the picture bit for bit, 1 the heatmap alone.

    Returns:
        An RGB image of the picture's size. If the picture has transparency, it is kept in an RGBA image.

    Raises:
        ValueError: for NaN, a value or ``alpha`` out of range, a wrong shape, or an unknown colour map.
        TypeError: for an image or a heatmap of the wrong type.
        OSError: if the path is not that of a picture that Pillow can read.

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
        # Copy: torch cannot read arrays with negative strides, and warns about read-only ones.
        heatmap = torch.from_numpy(np.array(heatmap))
    checks.tensor("heatmap", heatmap)
    if heatmap.ndim != 2:
        hint = "give one map, such as explanation.heatmaps()[0]"
        raise ValueError(checks.error_message("heatmap", "shape (h, w)", checks.shape_of(heatmap), hint))
    # Colour with NumPy and Pillow: for one picture, starting torch's threads would take longer.
    heatmap = heatmap.detach().float().cpu()
    # Check before resizing, which may drop a wrong value or spread it over its neighbours.
    _require_unit_range("heatmap", heatmap.numpy(), "camkit.normalize brings a raw map there")
    resized = maps.resize(heatmap, picture.size[::-1])
    # The grey values of this image are indices into the colours: 256 equal bins, the last of which holds 1.
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
    """Blends heatmaps over pictures, as :func:`overlay` does, for batches of tensors on any device.

    Args:
        images: floats in [0, 1], ``(..., 3, H, W)``, or ``(..., 1, H, W)`` for grey images.
        heatmaps: floats in [0, 1], ``(..., H, W)``. Leading dimensions broadcast with those of ``images``.
        colormap: see :func:`overlay`.
        alpha: weight of the heatmaps, in [0, 1].

    Returns:
        Pictures ``(..., 3, H, W)``, in [0, 1], with the dtype and device of ``images``.

    Raises:
        ValueError: for NaN, a value or ``alpha`` out of range, wrong shapes, or an unknown colour map.
        TypeError: if ``images`` or ``heatmaps`` is not a tensor, or the images are not floats.

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
        raise ValueError(checks.error_message("images", "shape (..., 3, H, W)", checks.shape_of(images)))
    _require_unit_range("images", images, "camkit.denormalize undoes a preset's normalisation")
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
    blended = _look_up(alpha * _colours_of(colormap).to(images), heatmaps)
    return blended.add_(images, alpha=1 - alpha).clamp_(0, 1)


def colorize(heatmaps: torch.Tensor, colormap: str = "jet") -> torch.Tensor:
    """Colours heatmaps, without a picture under them.

    Args:
        heatmaps: floats in [0, 1], ``(..., H, W)``.
        colormap: see :func:`overlay`.

    Returns:
        Colours ``(..., 3, H, W)``, float32, in [0, 1], on the device of ``heatmaps``.

    Raises:
        ValueError: for NaN, a value out of range, a wrong shape, or an unknown colour map.
        TypeError: if ``heatmaps`` is not a tensor.
    """
    _check_heatmaps(heatmaps, colormap)
    return _look_up(_colours_of(colormap).to(heatmaps.device), heatmaps)


def denormalize(
    images: torch.Tensor,
    preset: Preset | None = None,
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> torch.Tensor:
    """Undoes the normalisation of a model's preprocessing, so that the images can be shown.

    Args:
        images: normalised floats, ``(..., C, H, W)``.
        preset: the preprocessing, as ``weights.transforms()`` of torchvision returns it. Its mean and
            standard deviation then take the place of the next two arguments.
        mean: mean of each channel; by default that of ImageNet.
        std: standard deviation of each channel; by default that of ImageNet.

    Returns:
        Images of the same shape and dtype, clipped to [0, 1].

    Raises:
        ValueError: if the images, the mean and the standard deviation differ in their number of channels.
        TypeError: if ``images`` is not a tensor of floats.

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
    """Lays out pictures in rows and columns on white, with labels, as figures of papers do.

    Pictures are centred. Columns are as wide, and rows as high, as their largest picture or label.

    Args:
        rows: the pictures, row by row. Rows may differ in length.
        row_labels: a label for each row, shown to its left.
        column_labels: a label for each column, shown above it.

    Returns:
        One RGB image.

    Raises:
        ValueError: if there is no picture, or the number of labels is wrong.

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
    labelled = [("row_labels", row_labels, len(rows)), ("column_labels", column_labels, columns)]
    for name, labels, count in labelled:
        if labels is not None and len(labels) != count:
            raise ValueError(checks.error_message(name, f"{count} labels", len(labels)))
    gap = 4  # pixels
    widths = [max((r[c].width for r in rows if c < len(r)), default=0) for c in range(columns)]
    heights = [max((picture.height for picture in row), default=0) for row in rows]
    font = ImageFont.load_default(size=max(10, min(20, max(heights) // 8)))
    # Make room for the labels too, so that none is cut.
    if column_labels is not None:
        widths = [max(w, _text_size(t, font)[0]) for w, t in zip(widths, column_labels, strict=True)]
    if row_labels is not None:
        heights = [max(h, _text_size(t, font)[1]) for h, t in zip(heights, row_labels, strict=True)]
    left = gap + max((_text_size(t, font)[0] + 2 * gap for t in row_labels or ()), default=0)
    top = gap + max((_text_size(t, font)[1] + 2 * gap for t in column_labels or ()), default=0)
    # Two gaps between columns, so that the labels above them stay apart, and one between rows.
    lefts = [left + sum(widths[:c]) + gap * 2 * c for c in range(columns)]
    tops = [top + sum(heights[:r]) + gap * r for r in range(len(rows))]
    canvas = Image.new("RGB", (lefts[-1] + widths[-1] + gap, tops[-1] + heights[-1] + gap), "white")
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


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Returns the width and height of a text of one or more lines."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return round(box[2]), round(box[3])


@cache
def _colours_of(colormap: str) -> torch.Tensor:
    """Returns the colours of a colour map, ``(256, 3)``, in [0, 1]."""
    colours = np.frombuffer(bytes.fromhex(TABLES[colormap]), np.uint8).reshape(256, 3)
    return torch.from_numpy(colours.astype(np.float32) / 255)


def _look_up(colours: torch.Tensor, heatmaps: torch.Tensor) -> torch.Tensor:
    """Returns colours ``(..., 3, H, W)`` of heatmaps ``(..., H, W)`` in [0, 1] from a table ``(256, 3)``."""
    # 256 equal bins, the last of which holds 1, as in overlay.
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
        raise ValueError(checks.error_message("heatmaps", "shape (..., H, W)", checks.shape_of(heatmaps)))
    _require_unit_range("heatmaps", heatmaps, "camkit.normalize brings raw maps there")


def _require_unit_range(name: str, values: torch.Tensor | np.ndarray[Any, Any], hint: str) -> None:
    if 0 in values.shape:
        raise ValueError(checks.error_message(name, "at least one value", checks.shape_of(values.shape)))
    if isinstance(values, torch.Tensor):
        low, high = (value.item() for value in torch.aminmax(values.detach()))
    else:
        low, high = values.min().item(), values.max().item()
    if math.isnan(low):  # the minimum is NaN if any value is
        raise ValueError(checks.error_message(name, "values in [0, 1]", "NaN"))
    # Interpolation and float16 may bring a value slightly out of range, without a mistake of the caller.
    if low < -1e-3 or high > 1 + 1e-3:
        got = f"values in [{low:.4g}, {high:.4g}]"
        raise ValueError(checks.error_message(name, "values in [0, 1]", got, hint))


def _to_picture(image: ImageLike) -> Image.Image:
    """Converts a picture to RGB, or to RGBA if it has transparency."""
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as file:
            return _to_picture(ImageOps.exif_transpose(file))
    if isinstance(image, Image.Image):
        if image.mode.startswith("I;16"):  # convert() would turn all values above 255 into white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):  # these modes have no fixed range, so treat the image as an array
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
        _require_unit_range("image", array, "camkit.denormalize undoes a preset's normalisation")
        array = np.rint(array * np.float32(255)).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise TypeError(checks.error_message("image", "uint8, or floats in [0, 1]", array.dtype))
    return Image.fromarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def _on_white(picture: Image.Image) -> Image.Image:
    """Puts a picture on a white background, which removes its transparency."""
    if picture.mode == "RGB":
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
