from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pokemon_cam.photos import PAPER_CLASSES, read_folder, read_photo

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Saver = Callable[[Path], Path]  # Saves an image into a folder and returns its path.


def make_quadrants(mode: str, colours: list[object], size: int = 32) -> Image.Image:
    """Return an image of four colours: top left, top right, bottom left, bottom right."""
    image = Image.new(mode, (size, size))
    half = size // 2
    for i, colour in enumerate(colours):
        x, y = i % 2 * half, i // 2 * half
        image.paste(colour, (x, y, x + half, y + half))  # type: ignore[arg-type]
    return image


def read_quadrants(path: Path) -> list[tuple[int, ...]]:
    photo = read_photo(path, size=32)
    assert photo.shape == (3, 32, 32)
    # The centres of the quadrants, away from edges that resizing blurs.
    return [tuple(photo[:, y, x].tolist()) for y in (8, 24) for x in (8, 24)]


def save_rgb(folder: Path) -> Path:
    make_quadrants("RGB", [RED, GREEN, BLUE, WHITE]).save(folder / "a.png")
    return folder / "a.png"


def save_rgba(folder: Path) -> Path:
    # The fourth quadrant is dark but transparent; over white it must be white.
    image = make_quadrants("RGBA", [(*RED, 255), (*GREEN, 255), (*BLUE, 255), (9, 9, 9, 0)])
    image.save(folder / "a.png")
    return folder / "a.png"


def save_palette(folder: Path) -> Path:
    image = make_quadrants("P", [0, 1, 2, 3])
    image.putpalette([*RED, *GREEN, *BLUE, 9, 9, 9])
    image.save(folder / "a.png", transparency=3)
    return folder / "a.png"


def save_palette_with_alphas(folder: Path) -> Path:
    image = make_quadrants("P", [0, 1, 2, 3])
    image.putpalette([*RED, *GREEN, *BLUE, 9, 9, 9])
    image.save(folder / "a.png", transparency=bytes([255, 255, 255, 0]))
    return folder / "a.png"


def save_gif(folder: Path) -> Path:
    image = make_quadrants("P", [0, 1, 2, 3])
    image.putpalette([*RED, *GREEN, *BLUE, 9, 9, 9])
    image.save(folder / "a.gif", transparency=3)
    return folder / "a.gif"


def save_cmyk(folder: Path) -> Path:
    colours: list[object] = [(0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 0)]
    make_quadrants("CMYK", colours).save(folder / "a.tif")
    return folder / "a.tif"


@pytest.mark.parametrize(
    "save", [save_rgb, save_rgba, save_palette, save_palette_with_alphas, save_gif, save_cmyk]
)
def test_colours_are_read_correctly(save: Saver, tmp_path: Path) -> None:
    assert read_quadrants(save(tmp_path)) == [RED, GREEN, BLUE, WHITE]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    red, green, blue = read_photo(tmp_path / "a.png", size=8)[:, 4, 4].tolist()
    assert (red, green, blue) == (255, 127, 127)


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    pixel = read_photo(tmp_path / "a.jpg", size=16)[:, 8, 8].int()
    # Cyan; JPEG compression changes the values slightly.
    assert (pixel - pixel.new_tensor([0, 255, 255])).abs().max() < 8


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greyscale(mode: str, tmp_path: Path) -> None:
    make_quadrants(mode, [0, 255, 255, 0]).save(tmp_path / "a.png")
    assert read_quadrants(tmp_path / "a.png") == [(0, 0, 0), WHITE, WHITE, (0, 0, 0)]


def test_greyscale_with_alpha(tmp_path: Path) -> None:
    make_quadrants("LA", [(0, 255), (100, 255), (0, 0), (0, 255)]).save(tmp_path / "a.png")
    expected = [(0, 0, 0), (100, 100, 100), WHITE, (0, 0, 0)]
    assert read_quadrants(tmp_path / "a.png") == expected


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(suffix: str, tmp_path: Path) -> None:
    # 257 steps of 16 bits are one step of 8 bits.
    values = np.full((32, 32), 257 * 100, dtype=np.uint16)
    values[:, 16:] = 65535
    values[16:, :16] = 256
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    grey = [pixel[0] for pixel in read_quadrants(tmp_path / f"a.{suffix}")]
    assert grey == [100, 255, 1, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int, tmp_path: Path) -> None:
    upright = make_quadrants("RGB", [RED, GREEN, BLUE, WHITE])
    transpose = Image.Transpose
    # The stored pixels of an upright scene, for each orientation in which a camera is held.
    stored_as = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_as[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation  # The EXIF tag "Orientation".
    stored.save(tmp_path / "a.png", exif=exif)
    assert read_quadrants(tmp_path / "a.png") == [RED, GREEN, BLUE, WHITE]


def test_photos_are_resized_as_a_whole(tmp_path: Path) -> None:
    make_quadrants("RGB", [RED, GREEN, BLUE, WHITE]).resize((200, 50), 0).save(tmp_path / "a.png")
    assert read_quadrants(tmp_path / "a.png") == [RED, GREEN, BLUE, WHITE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with three good photos each, beside broken photos and unrelated files."""
    for name, colour in (("Arbok", RED), ("Pikachu", GREEN)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20, 20), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "Arbok" / "not-an-image.jpg").write_text("nothing of the kind")
    whole = (tmp_path / "Arbok" / "0.png").read_bytes()
    (tmp_path / "Arbok" / "cut-off.png").write_bytes(whole[: len(whole) // 2])
    # "float.tif" is a valid image, but its pixels have no known range.
    (tmp_path / "Pikachu" / "empty.png").touch()
    Image.new("F", (8, 8)).save(tmp_path / "Pikachu" / "float.tif")
    for name in ("notes.txt", "drawing.svg", ".DS_Store", "._0.png"):
        (tmp_path / "Pikachu" / name).write_text("no image")
    (tmp_path / "Pikachu" / "more").mkdir()
    # Entries beside the class folders are ignored.
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").touch()
    return tmp_path


def test_folder_is_read_with_its_labels(folder: Path) -> None:
    pictures = read_folder(folder, ["Pikachu", "Arbok"], size=16).pictures
    assert pictures.classes == ("Pikachu", "Arbok")
    assert pictures.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [tuple(image[:, 5, 5].tolist()) for image in pictures.images] == [GREEN] * 3 + [RED] * 3
    assert pictures.masks is None


def test_broken_and_skipped_files_are_reported(folder: Path) -> None:
    reading = read_folder(folder, ["Arbok", "Pikachu"], size=16)
    assert {path.name for path in reading.broken} == {
        "not-an-image.jpg",
        "cut-off.png",
        "empty.png",
        "float.tif",
    }
    assert all(reading.broken.values())  # Each has a reason.
    assert {path.name for path in reading.skipped} == {
        "._0.png",
        ".DS_Store",
        "drawing.svg",
        "more",
        "notes.txt",
    }
    assert len(reading.skipped) == 5


def test_missing_class_error_lists_the_available_classes(folder: Path) -> None:
    message = r"^--classes: expected classes out of \['Arbok', 'Pikachu'\], got 'Mew'$"
    with pytest.raises(ValueError, match=message):
        read_folder(folder, ["Arbok", "Mew"], size=16)
    with pytest.raises(ValueError, match="got 'Bulbasaur'"):
        read_folder(folder, PAPER_CLASSES, size=16)


def test_class_without_a_readable_image_is_reported(folder: Path) -> None:
    (folder / "Mew").mkdir()
    (folder / "Mew" / "0.png").write_text("broken")
    message = r"--data: expected at least 2 readable images in '.*Mew', got 0"
    with pytest.raises(ValueError, match=message):
        read_folder(folder, ["Arbok", "Mew"], size=16)


def test_at_least_two_different_classes_are_required(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--classes: expected at least 2 classes, got \['Arbok'\]"
    ):
        read_folder(folder, ["Arbok"], size=16)
    with pytest.raises(ValueError, match="--classes: expected every class once, got 'Arbok' twice"):
        read_folder(folder, ["Arbok", "Arbok"], size=16)


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--data: expected 'creatures' or a folder .* got '.*gone'"
    ):
        read_folder(tmp_path / "gone", ["Arbok", "Pikachu"], size=16)
