"""Heatmaps over pictures and batches, and grids of pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import ResNet18_Weights, ViT_B_16_Weights

import camkit


def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


RGB = noise(24, 32, 3)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        torch.from_numpy(RGB).permute(2, 0, 1),
        RGB / 255,
        RGB.astype(np.float32) / 255,
        torch.from_numpy(RGB).permute(2, 0, 1) / 255,
        (torch.from_numpy(RGB).permute(2, 0, 1) / 255).double(),
    ],
    ids=["PIL", "uint8 array", "uint8 tensor", "float64 array", "float32 array", "float32", "float64"],
)
@pytest.mark.parametrize("colormap", ["jet", "viridis"])
def test_alpha_0_gives_the_picture_back_bit_for_bit(image: Any, colormap: str) -> None:
    result = camkit.overlay(image, torch.rand(7, 7), alpha=0, colormap=colormap)
    assert (result.mode, result.size) == ("RGB", (32, 24))
    assert np.array_equal(np.asarray(result), RGB)


def test_blends_and_does_not_rescale() -> None:
    image = np.full((2, 2, 3), 40, np.uint8)
    heatmap = torch.zeros(2, 2)
    red, green, blue = (np.asarray(mpl.colormaps["jet"](0.0, bytes=True))[:3]).tolist()
    result = np.asarray(camkit.overlay(image, heatmap, alpha=0.25))
    expected = [math.floor(0.75 * 40 + 0.25 * c) for c in (red, green, blue)]
    assert (result == expected).all()  # pytorch-grad-cam would rescale the brightest value to 255


def test_grey_and_other_shapes() -> None:
    grey = noise(24, 32)
    for image in (
        grey,
        grey[..., None],
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        Image.fromarray(grey),
    ):
        result = np.asarray(camkit.overlay(image, torch.rand(3, 3), alpha=0))
        assert np.array_equal(result, np.stack([grey] * 3, 2))


def test_transparency_is_kept() -> None:
    rgba = noise(24, 32, 4)
    result = camkit.overlay(Image.fromarray(rgba), torch.rand(3, 3), alpha=0)
    assert np.array_equal(np.asarray(result), rgba)
    result = camkit.overlay(Image.fromarray(rgba), torch.rand(3, 3), alpha=0.7)
    assert np.array_equal(np.asarray(result)[..., 3], rgba[..., 3])
    palette = Image.fromarray(RGB).quantize(8)
    palette.info["transparency"] = 0
    assert camkit.overlay(palette, torch.rand(3, 3)).mode == "RGBA"


def test_a_path_is_read_the_right_way_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation 6: show the picture a quarter turn clockwise.
    path = tmp_path / "turned.png"
    Image.fromarray(RGB).save(path, exif=exif)
    for given_path in (path, str(path)):
        result = camkit.overlay(given_path, torch.rand(3, 3), alpha=0)
        assert np.array_equal(np.asarray(result), np.rot90(RGB, -1))


def test_sixteen_bits_are_not_clipped() -> None:
    deep = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    result = np.asarray(camkit.overlay(Image.fromarray(deep), torch.rand(3, 3), alpha=0))
    assert (result.min(), result.max()) == (0, 255)
    assert (np.diff(result[..., 0].flatten().astype(int)) >= 0).all()


def test_floats_in_pictures_are_floats() -> None:
    deep = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    result = np.asarray(camkit.overlay(Image.fromarray(deep), torch.rand(3, 3), alpha=0))
    assert np.array_equal(result[..., 0], np.rint(deep * 255))
    with pytest.raises(TypeError, match=r"^image: expected uint8, or floats in \[0, 1\], got int32$"):
        camkit.overlay(Image.fromarray(deep).convert("I"), torch.rand(3, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB", "HSV", "RGBA"])
def test_every_mode_of_pillow(mode: str) -> None:
    image = Image.fromarray(RGB)
    image = image.convert("L").convert(mode) if mode == "LA" else _as_mode(image, mode)
    result = camkit.overlay(image, torch.rand(3, 3), alpha=0)
    assert result.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert np.array_equal(np.asarray(result), np.asarray(image.convert(result.mode)))


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return Image.new("LAB", image.size, (50, 10, 10)) if mode == "LAB" else image.convert(mode)


def test_any_array_is_a_heatmap() -> None:
    heatmap = np.linspace(0, 1, 12).reshape(3, 4)
    expected = np.asarray(camkit.overlay(RGB, torch.from_numpy(heatmap[::-1].copy())))
    assert np.array_equal(np.asarray(camkit.overlay(RGB, heatmap[::-1])), expected)
    heatmap.flags.writeable = False
    camkit.overlay(RGB, heatmap)
    camkit.overlay(RGB, heatmap.astype(np.float16))
    camkit.overlay(RGB, heatmap > 0.5)


@given(st.floats(0, 1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_blend_is_the_same_for_every_image_of_a_batch(alpha: float, n: int, h: int, w: int) -> None:
    images, heatmaps = torch.rand(n, 3, h, w), torch.rand(n, h, w)
    batch = camkit.blend(images, heatmaps, alpha=alpha)
    assert batch.shape == images.shape
    assert ((batch >= 0) & (batch <= 1)).all()
    expected = (1 - alpha) * images + alpha * camkit.colorize(heatmaps)
    torch.testing.assert_close(batch, expected)
    for i in range(n):
        assert torch.equal(camkit.blend(images[i], heatmaps[i], alpha=alpha), batch[i])


def test_blend_equals_overlay_and_goes_where_its_images_are() -> None:
    heatmap = torch.rand(24, 32)
    image = torch.from_numpy(RGB).permute(2, 0, 1) / 255
    blended = 255 * camkit.blend(image.double(), heatmap, alpha=0.3).permute(1, 2, 0).numpy()
    lost = blended - np.asarray(camkit.overlay(RGB, heatmap, alpha=0.3))  # overlay rounds down
    assert lost.min() > -1e-4
    assert 0.9 < lost.max() < 1
    assert camkit.blend(image.bfloat16(), heatmap).dtype == torch.bfloat16
    assert camkit.blend(image.double()[:1], heatmap).shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"heatmap": torch.full((2, 2), math.nan)},
            ValueError,
            "heatmap: expected values in [0, 1], got NaN",
        ),
        (
            {"heatmap": torch.tensor([[0.0, 3.0]])},
            ValueError,
            "heatmap: expected values in [0, 1], got values in [0, 3]; camkit.normalize brings",
        ),
        (
            {"heatmap": torch.rand(1, 2, 2)},
            ValueError,
            "heatmap: expected shape (h, w), got 1 x 2 x 2; give one map",
        ),
        ({"heatmap": torch.zeros(0, 2)}, ValueError, "heatmap: expected at least one value, got 0 x 2"),
        ({"colormap": "jett"}, ValueError, "colormap: expected one of 'jet', 'turbo', "),
        ({"alpha": 1.5}, ValueError, "alpha: expected a number in [0, 1], got 1.5"),
        ({"alpha": math.nan}, ValueError, "alpha: expected a number in [0, 1], got nan"),
        (
            {"image": torch.randn(3, 8, 8) * 3},
            ValueError,
            "image: expected values in [0, 1], got values in [",
        ),
        ({"image": torch.full((3, 8, 8), math.nan)}, ValueError, "image: expected values in [0, 1], got NaN"),
        ({"image": RGB.astype(np.int64)}, TypeError, "image: expected uint8, or floats in [0, 1], got int64"),
        (
            {"image": RGB[None]},
            ValueError,
            "image: expected shape (H, W, C) or (H, W), C one of 1, 3, 4, got 1 x 24",
        ),
        (
            {"image": torch.from_numpy(RGB)},
            ValueError,
            "image: expected shape (C, H, W) or (H, W), C one of 1, 3, 4",
        ),
        ({"image": 3}, TypeError, "image: expected a PIL image, a path, a tensor or an array, got int"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        camkit.overlay(**{"image": RGB, "heatmap": torch.rand(3, 3), **arguments})
    assert str(raised.value).startswith(message)


def test_bad_arguments_of_blend_are_named() -> None:
    with pytest.raises(ValueError, match="^heatmaps: expected the images' size, 4 x 4, got 2 x 2$"):
        camkit.blend(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 2))
    with pytest.raises(TypeError, match=r"^images: expected floats in \[0, 1\], got torch.uint8$"):
        camkit.blend(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.rand(4, 4))
    with pytest.raises(ValueError, match=r"^images: expected shape \(..., 3, H, W\), got 2 x 4 x 4$"):
        camkit.blend(torch.rand(2, 4, 4), torch.rand(4, 4))


@pytest.mark.parametrize("weights", [ResNet18_Weights.DEFAULT, ViT_B_16_Weights.DEFAULT])
def test_denormalize_undoes_a_preset(weights: Any) -> None:
    preset = weights.transforms()
    images = torch.rand(2, 3, preset.crop_size[0], preset.crop_size[0])
    preset.resize_size = preset.crop_size  # so that the preset only normalises
    torch.testing.assert_close(camkit.denormalize(preset(images), preset), images, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        camkit.denormalize(preset(images)[0], mean=preset.mean, std=preset.std), images[0]
    )


def test_other_types_are_named() -> None:
    array = np.zeros((3, 4, 4), np.float32)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("images", lambda: camkit.denormalize(array)),  # type: ignore[arg-type]
        ("images", lambda: camkit.blend(array, torch.rand(4, 4))),  # type: ignore[arg-type]
        ("heatmaps", lambda: camkit.colorize(array)),  # type: ignore[arg-type]
        ("maps", lambda: camkit.normalize(array)),  # type: ignore[arg-type]
        ("heatmap", lambda: camkit.overlay(RGB, [[0.0]])),  # type: ignore[arg-type]
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got "):
            call()
    with pytest.raises(TypeError, match=r"^images: expected normalised floats, got torch.uint8$"):
        camkit.denormalize(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^heatmaps: expected shape \(..., H, W\), got 4$"):
        camkit.colorize(torch.rand(4))
    with pytest.raises(
        ValueError, match=r"^maps: expected floats with 2 spatial dimensions, got torch.float32, 4$"
    ):
        camkit.normalize(torch.rand(4))


def test_denormalize_of_other_channels() -> None:
    torch.testing.assert_close(
        camkit.denormalize(torch.zeros(1, 4, 4), mean=[0.5], std=[0.2]), torch.full((1, 4, 4), 0.5)
    )
    with pytest.raises(ValueError, match=r"^images: expected shape \(..., 3, H, W\), got 1 x 4 x 4$"):
        camkit.denormalize(torch.zeros(1, 4, 4))


def test_grid_places_every_picture_whole() -> None:
    colours = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
    rows = [[Image.new("RGB", (40, 30), c) for c in row] for row in colours]
    sheet = camkit.grid(rows, ["first", "second"], ["a", "b", "c"])
    pixels = np.asarray(sheet)
    corners = []
    for row in colours:
        for colour in row:
            value = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
            ys, xs = np.nonzero((pixels == value).all(2))
            assert len(ys) == 40 * 30
            assert (int(np.ptp(ys)), int(np.ptp(xs))) == (29, 39)
            corners.append((ys.min(), xs.min()))
    assert corners == sorted(corners)
    assert len({y for y, _ in corners}) == 2
    assert len({x for _, x in corners}) == 3
    # The labels are drawn above and to the left of the pictures, and do not touch the border.
    dark = np.all(pixels < 100, axis=2)
    assert dark[: corners[0][0]].any()
    assert dark[:, : corners[0][1]].any()
    assert not dark[0].any()
    assert not dark[:, 0].any()


def test_grid_takes_unequal_pictures_rows_and_long_labels() -> None:
    rows = [
        [Image.new("L", (10, 20), 0)],
        [Image.new("RGBA", (30, 8), (0, 0, 0, 0)), Image.new("RGB", (5, 5))],
    ]
    sheet = camkit.grid(rows, column_labels=["a long label over a narrow column", "b"])
    assert sheet.mode == "RGB"
    assert sheet.width > 150
    assert (np.asarray(camkit.grid(rows[1:]))[4:12, 4:34] == 255).all()  # transparency becomes white


def test_bad_arguments_of_grid_are_named() -> None:
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="^rows: expected at least one picture, got none$"):
        camkit.grid([])
    with pytest.raises(ValueError, match="^row_labels: expected 1 labels, got 2$"):
        camkit.grid([[picture]], ["a", "b"])
    with pytest.raises(ValueError, match="^column_labels: expected 2 labels, got 1$"):
        camkit.grid([[picture, picture]], None, ["a"])


def test_heatmaps_for_another_number_of_images() -> None:
    with pytest.raises(ValueError, match="^heatmaps: expected as many as images, 2, got 3$"):
        camkit.blend(torch.rand(2, 3, 4, 4), torch.rand(3, 4, 4))


def test_batches_are_coloured_as_single_pictures() -> None:
    """The same holds for one heatmap over several pictures."""
    images, heatmaps = torch.rand(3, 3, 300, 250), torch.rand(3, 300, 250)
    each = torch.stack([camkit.blend(i, h) for i, h in zip(images, heatmaps, strict=True)])
    assert torch.equal(camkit.blend(images, heatmaps), each)
    one = torch.stack([camkit.blend(i, heatmaps[0]) for i in images])
    assert torch.equal(camkit.blend(images, heatmaps[0]), one)
