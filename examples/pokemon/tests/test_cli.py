import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pokemon_cam import creatures
from pokemon_cam.cli import main

ROWS = ("VGG16-CAM", "AlexNet-CAM", "VGG19-Grad-CAM")
PICTURES = ["curves.png", "comparison.png", *(f"{name}.png" for name in ROWS)]
FAST = ["run", "--epochs", "1", "--image-size", "64"]


def test_short_run_on_creatures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"
    assert main([*FAST, "--creatures", "28", "--output", str(output)]) == 0

    # The same numbers appear on the terminal, in the table and in the JSON file.
    printed = capsys.readouterr()
    table = (output / "table.md").read_text(encoding="utf-8")
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results] == list(ROWS)
    for row in results:
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['name']} "))
        assert line in printed.out
        for score in (row["train"], row["test"]):
            assert f"{score['loss']:.3f}" in line and f"{score['accuracy']:.3f}" in line
        assert f"{row['pointing']['maps']:.3f}" in line
        assert f"{row['pointing']['random']:.3f}" in line
        assert row["image_size"] == 64
        assert row["network"] in table and f"{row['parameters']:,}" in table
        assert "AdamW" in row["recipe"] and "1 epoch" in row["recipe"]
        for stage in ("training", "scoring"):
            assert f"{stage} {row['name']}" in printed.err
    assert "drawing creatures" in printed.err and "writing the report" in printed.err

    assert {path.name for path in output.iterdir()} == {*PICTURES, "table.md", "results.json"}
    for name in PICTURES:
        with Image.open(output / name) as image:
            image.load()
            # A blank picture would have a handful of colours only.
            assert image.width >= 480 and len(image.convert("RGB").getcolors(1 << 24) or []) > 100
    with Image.open(output / "VGG16-CAM.png") as image:
        assert image.height >= 7 * 160  # One row of 160 pixels per class.


def test_short_run_on_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Drawn creatures serve as photos: three of each of the seven kinds.
    for index in range(21):
        creature = creatures.draw_creature(index, seed=0, size=64)
        folder = tmp_path / "photos" / creature.kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(creature.image).save(folder / f"{index}.png")
    # `folder` is now that of the last kind, Puffpom, which is one of the two classes below.
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    options = ["--data", str(tmp_path / "photos"), "--output", str(tmp_path / "results")]
    assert main([*FAST, *options, "--classes", "Puffpom", "Coilor"]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    for text in (printed, table):
        assert "classes: Puffpom, Coilor" in text
        assert "1 image file could not be read" in text and "broken.jpg" in text
        assert "1 other file was skipped" in text and "notes.txt" in text
        assert "not known" in text  # Pointing needs masks, which photos do not have.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data: expected 'creatures' or a folder"),
        (["--classes", "Mew", "Arbok"], "--classes: expected it only together with --data DIR"),
        (["--weights", "nowhere"], "--weights: expected 'default', 'none' or a folder"),
        (
            ["--weights", "default", "--image-size", "64"],
            "--image-size: expected it only together with --weights none",
        ),
        (["--device", "abacus"], "--device: expected a device of torch, got 'abacus'"),
    ],
)
def test_wrong_options_are_explained(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["run", "--creatures", "14", "--output", str(tmp_path / "results"), *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "three"])
def test_wrong_numbers_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--epochs", text])
    assert f"expected an integer of at least 1, got '{text}'" in capsys.readouterr().err


def test_same_seed_gives_same_numbers(tmp_path: Path) -> None:
    for name in ("one", "again"):
        # A different global state before each run must not matter.
        torch.manual_seed(hash(name) % 1000)
        main([*FAST, "--creatures", "14", "--output", str(tmp_path / name)])
    one, again = ((tmp_path / name / "results.json").read_text() for name in ("one", "again"))
    assert one == again
