"""The command line: ``python -m pokemon_cam run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from pokemon_cam import creatures, networks, photos, pictures, report, scoring, training
from pokemon_cam.networks import Builder
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; those of the process if not given.

    Returns:
        The exit status: 0, or 2 for a wrong argument, which is explained on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        print(f"pokemon_cam: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Load, train, score and report, as the options say.

    Args:
        options: as `main` parses them.

    Raises:
        ValueError: when an option does not fit.
    """
    output: Path = options.output
    device = _device(options.device)
    builders, size = _builders(options)
    data, notes = _load(options, size)
    train_set, test_set = pictures.split(data, seed=options.seed)
    notes.insert(
        0,
        f"{len(train_set):,} pictures to train on and {len(test_set):,} to test on, "
        f"{size}x{size}, classes: {', '.join(data.classes)}",
    )
    print("\n".join(notes))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: expected a folder to write to, got '{output}'") from error

    shown = report.one_of_each(test_set)
    rows, histories, explained = [], {}, {}
    trained: dict[str, networks.Network] = {}
    for number, build in enumerate(builders.values()):
        seed = options.seed + number
        torch.manual_seed(seed)
        network = build(len(data.classes), trained)
        network.model.to(device)
        epochs = options.epochs or network.recipe.epochs
        batch = network.recipe.batch_size
        recipe = f"{network.recipe.text}, batch size {batch}, {epochs} epoch{'s' * (epochs > 1)}"
        print(
            f"{network.name}: {network.description}, {network.parameters:,} parameters "
            f"({network.trainable_parameters:,} trained); {recipe}"
        )
        history = training.train(
            network, train_set, test_set, epochs=epochs, seed=seed, device=device
        )
        trained[network.name] = network
        views = report.explain(network, shown, device=device)
        explained[network.name] = views
        histories[network.name] = history
        rows.append(
            report.Row(
                name=network.name,
                network=network.description,
                image_size=size,
                layer=views.layer,
                map_size=views.map_size,
                parameters=network.parameters,
                trainable_parameters=network.trainable_parameters,
                recipe=recipe,
                train=training.evaluate(network.model, train_set, device=device),
                test=history.test[-1],
                pointing=None
                if test_set.masks is None
                else scoring.point(network, test_set, seed=seed, device=device),
            )
        )

    with progress_bar("writing the report", 3 + len(rows), "file") as bar:
        report.write_results(output / "results.json", rows, histories)
        bar.update()
        report.write_curves(output / "curves.png", histories)
        bar.update()
        for name, views in explained.items():
            report.network_grid(shown, views).save(output / f"{name}.png")
            bar.update()
        report.comparison_grid(shown, explained).save(output / "comparison.png")
        bar.update()
    scores, kinds = report.scores_table(rows), report.networks_table(rows)
    summary = "\n".join(f"- {note}" for note in notes)
    (output / "table.md").write_text(f"{scores}\n{kinds}\n{summary}\n", encoding="utf-8")
    print(f"\n{scores}\n{kinds}\n" + "\n".join(notes) + f"\nwritten to {output.resolve()}")


def _load(options: argparse.Namespace, size: int) -> tuple[PictureSet, list[str]]:
    """The pictures, and what is to be told about them."""
    if options.data == "creatures":
        if options.classes is not None:
            raise ValueError("--classes: expected it with --data DIR only, got it with 'creatures'")
        return creatures.draw_set(options.creatures, seed=options.seed, size=size), []
    classes = photos.PAPER_CLASSES if options.classes is None else options.classes
    reading = photos.read_folder(Path(options.data), classes, size=size)
    broken, skipped = len(reading.broken), len(reading.skipped)
    notes = [f"{broken} image {'file' if broken == 1 else 'files'} could not be read"]
    notes += [f"could not read {path}: {reason}" for path, reason in reading.broken.items()]
    notes += [f"{skipped} other {'file was' if skipped == 1 else 'files were'} skipped"]
    notes += [f"skipped {path}" for path in reading.skipped]
    return reading.pictures, notes


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it has the backend
        raise ValueError(f"--device: expected a device of torch, got {name!r}: {error}") from error
    return device


def _builders(options: argparse.Namespace) -> tuple[dict[str, Builder], int]:
    """The networks, and the size of their pictures."""
    if options.weights == "none":
        return networks.scratch(options.image_size), options.image_size
    if options.image_size != networks.SCRATCH_SIZE:
        raise ValueError(
            "--image-size: expected it with --weights none only; published weights take "
            f"{networks.PAPER_SIZE}, got {options.image_size}"
        )
    load = (
        networks.published
        if options.weights == "default"
        else partial(networks.from_folder, Path(options.weights))
    )
    for weights in networks.PUBLISHED.values():
        load(weights)  # what is missing is told now, not after the first training
    return networks.pretrained(load), networks.PAPER_SIZE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pokemon_cam", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    run_parser = commands.add_parser(
        "run",
        help="train the three networks, explain them, write table and pictures",
    )
    add = run_parser.add_argument
    add(
        "--data",
        default="creatures",
        help="'creatures' (drawn; the default), or a folder with one folder per class",
    )
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="class folders to use (default: the paper's seven)",
    )
    add(
        "--weights",
        default="none",
        help="'none' (the default): smaller networks from scratch; 'default': torchvision's "
        "published weights; or a folder with their files",
    )
    add(
        "--output",
        type=Path,
        default=Path("pokemon-run"),
        help="folder for the results (default: %(default)s)",
    )
    add(
        "--seed",
        type=_count(0),
        default=0,
        help="seed of pictures, split and training (default: %(default)s)",
    )
    add("--epochs", type=_count(1), help="epochs (default: those of the recipe)")
    add(
        "--creatures",
        type=_count(14),
        default=1470,
        help="number of creatures to draw (default: %(default)s)",
    )
    add(
        "--image-size",
        type=_count(64),
        default=networks.SCRATCH_SIZE,
        help="height and width of the pictures, in pixels (default: %(default)s)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute, as torch names it (default: %(default)s)",
    )
    return parser


class _count:
    """Parses an integer that is at least ``least``."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, text: str) -> int:
        if not text.isdecimal() or int(text) < self.least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {self.least}, got {text!r}"
            )
        return int(text)
