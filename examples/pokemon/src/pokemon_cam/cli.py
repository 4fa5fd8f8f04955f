"""The command line: ``python -m pokemon_cam run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from pokemon_cam import creatures, networks, photos, pictures, report, scoring, training, weights
from pokemon_cam.networks import Builder, Network
from pokemon_cam.pictures import PictureSet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an invalid argument, which is explained on stderr.
    """
    options = _build_parser().parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        print(f"pokemon_cam: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Load the pictures, train and score the networks, and write the report.

    Args:
        options: the parsed options of ``run``.

    Raises:
        ValueError: if an option is invalid.
    """
    output: Path = options.output
    device = _find_device(options.device)
    builders, size = _choose_networks(options)
    data, notes = _load_pictures(options, size)
    train_set, test_set = pictures.split(data, seed=options.seed)
    notes.insert(
        0,
        f"{len(train_set):,} pictures to train on and {len(test_set):,} to test on, "
        f"{size}x{size}, classes: {', '.join(data.classes)}",
    )
    print("\n".join(notes))
    try:
        # Create the folder before training; an unusable path should not cost minutes of work.
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: expected a folder to write to, got '{output}'") from error

    shown = report.first_of_each_class(test_set)
    trained: dict[str, Network] = {}
    results, explanations = [], {}
    for number, build in enumerate(builders.values()):
        # Each network has a seed of its own, so the networks do not share random numbers.
        seed = options.seed + number
        torch.manual_seed(seed)
        # A builder may start from the weights of a network trained before it.
        network = build(len(data.classes), trained)
        network.model.to(device)
        epochs = options.epochs or network.recipe.epochs
        batch = network.recipe.batch_size
        recipe = (
            f"{network.recipe.description}, batch size {batch}, {epochs} epoch{'s' * (epochs > 1)}"
        )
        print(
            f"{network.name}: {network.description}, {network.parameters:,} parameters "
            f"({network.trainable_parameters:,} trained); {recipe}"
        )
        history = training.train(
            network, train_set, test_set, epochs=epochs, seed=seed, device=device
        )
        trained[network.name] = network
        explained = report.explain(network, shown, device=device)
        explanations[network.name] = explained
        pointing = (
            None
            if test_set.masks is None
            else scoring.score_pointing(network, test_set, seed=seed, device=device)
        )
        results.append(
            report.Result(
                name=network.name,
                network=network.description,
                image_size=size,
                layer=explained.layer,
                map_size=explained.map_size,
                parameters=network.parameters,
                trainable_parameters=network.trainable_parameters,
                recipe=recipe,
                # The history has the scores during the last epoch; this is the score after it.
                train=training.evaluate(network.model, train_set, device=device),
                test=history.test[-1],
                pointing=pointing,
                history=history,
            )
        )

    tables = report.write_report(output, results, shown, explanations, notes)
    print(f"\n{tables}" + "\n".join(notes) + f"\nwritten to {output.resolve()}")


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        # PyTorch accepts the name of a device that the machine lacks; using it raises the error.
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # A PyTorch build without CUDA raises AssertionError for "cuda".
        raise ValueError(f"--device: expected a device of torch, got {name!r}: {error}") from error
    return device


def _choose_networks(options: argparse.Namespace) -> tuple[dict[str, Builder], int]:
    """Return the builders of the networks, and the size of their pictures."""
    if options.weights == "none":
        return networks.small_networks(options.image_size), options.image_size
    if options.image_size != networks.SMALL_SIZE:
        raise ValueError(
            "--image-size: expected it only together with --weights none, "
            f"got {options.image_size}; published weights take {networks.PAPER_SIZE}"
        )
    load = (
        weights.download_weights
        if options.weights == "default"
        else partial(weights.read_weights, Path(options.weights))
    )
    # Load every file once before training starts. Otherwise a missing file for the last network
    # would be reported only after the others were trained.
    for published in weights.PUBLISHED.values():
        load(published)
    return networks.paper_networks(load), networks.PAPER_SIZE


def _load_pictures(options: argparse.Namespace, size: int) -> tuple[PictureSet, list[str]]:
    """Return the pictures, and notes for the report on files that were left out."""
    if options.data == "creatures":
        if options.classes is not None:
            raise ValueError(
                "--classes: expected it only together with --data DIR, got it with 'creatures'"
            )
        return creatures.draw_set(options.creatures, seed=options.seed, size=size), []
    classes = photos.PAPER_CLASSES if options.classes is None else options.classes
    reading = photos.read_folder(Path(options.data), classes, size=size)
    broken, skipped = len(reading.broken), len(reading.skipped)
    notes = [f"{broken} image {'file' if broken == 1 else 'files'} could not be read"]
    notes += [f"could not read {path}: {reason}" for path, reason in reading.broken.items()]
    notes += [f"{skipped} other {'file was' if skipped == 1 else 'files were'} skipped"]
    notes += [f"skipped {path}" for path in reading.skipped]
    return reading.pictures, notes


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pokemon_cam",
        description="Train image classifiers and explain them by class activation maps.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    text = "train the three networks, explain their predictions and write a report"
    run_parser = commands.add_parser("run", help=text, description=f"{text.capitalize()}.")
    add = run_parser.add_argument
    add(
        "--data",
        default="creatures",
        metavar="DIR",
        help="folder of photos with one folder per class, or 'creatures' for the drawn data set "
        "(default: %(default)s)",
    )
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names of the class folders to use; only together with --data DIR "
        "(default: the paper's seven classes)",
    )
    add(
        "--weights",
        default="none",
        help="'none' trains small networks from scratch, 'default' downloads torchvision's "
        "published weights, and a folder provides their files (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("pokemon-run"),
        metavar="DIR",
        help="folder for the report (default: %(default)s)",
    )
    add(
        "--seed",
        type=_integer_from(0),
        default=0,
        help="seed of the drawn pictures, the split and the training (default: %(default)s)",
    )
    add(
        "--epochs",
        type=_integer_from(1),
        help="number of epochs for every network (default: those of its recipe)",
    )
    add(
        "--creatures",
        # Two creatures of each of the seven kinds: one to train on and one to test on.
        type=_integer_from(14),
        default=1470,
        metavar="COUNT",
        help="number of creatures to draw, at least 14 (default: %(default)s)",
    )
    add(
        "--image-size",
        # The networks halve the resolution three times; smaller maps would show too little.
        type=_integer_from(64),
        default=networks.SMALL_SIZE,
        metavar="PIXELS",
        help="height and width of the pictures, at least 64; only together with --weights none "
        "(default: %(default)s)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="PyTorch device to compute on (default: %(default)s)",
    )
    return parser


def _integer_from(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return parse
