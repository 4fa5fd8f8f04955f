"""Writes the report of a run: tables, numbers, curves and picture grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import camkit
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pokemon_cam.networks import Network
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar
from pokemon_cam.scoring import Pointing
from pokemon_cam.training import History, Score, normalized

_TILE_SIZE = 160  # Height and width of one picture in a grid, in pixels.


@dataclass(frozen=True)
class Result:
    """The measurements of one network; one row of the tables.

    The field names are the keys in ``results.json``.

    Attributes:
        name: the paper's name of the network.
        network: the architecture and the weights it started from.
        image_size: height and width of its pictures, in pixels.
        layer: name of the explained layer.
        map_size: resolution ``(h, w)`` of the maps before upsampling.
        parameters: number of parameters.
        trainable_parameters: number of parameters that training changed.
        recipe: the training recipe in words.
        train: score on the training pictures after training.
        test: score on the test pictures after training.
        pointing: score of the maps; None if the pictures have no masks.
        history: scores over the epochs.
    """

    name: str
    network: str
    image_size: int
    layer: str
    map_size: tuple[int, int]
    parameters: int
    trainable_parameters: int
    recipe: str
    train: Score
    test: Score
    pointing: Pointing | None
    history: History


@dataclass(frozen=True)
class Explanations:
    """The predictions of a network for N pictures, and their heatmaps.

    Attributes:
        layer: name of the explained layer.
        map_size: resolution ``(h, w)`` of the maps before upsampling.
        predicted: name of the predicted class, for each picture.
        probability: probability of the predicted class, in [0, 1], for each picture.
        heatmaps: heatmap of the predicted class, in [0, 1], shape ``(N, T, T)``, where T is the
            size of a picture in a grid.
    """

    layer: str
    map_size: tuple[int, int]
    predicted: list[str]
    probability: list[float]
    heatmaps: Tensor


# Table I of the paper, on its test photos.
_PAPER_SCORES = {
    "VGG16-CAM": Score(0.218, 0.918),
    "AlexNet-CAM": Score(0.115, 0.955),
    "VGG19-Grad-CAM": Score(0.984, 0.881),
}


def write_report(
    folder: Path,
    results: Sequence[Result],
    pictures: PictureSet,
    explanations: Mapping[str, Explanations],
    notes: Sequence[str],
) -> str:
    """Write all files of the report.

    Args:
        folder: existing folder to write to.
        results: one per network.
        pictures: the explained pictures.
        explanations: each network's explanations of ``pictures``, by its name.
        notes: lines to write below the tables.

    Returns:
        The tables in Markdown.
    """
    with progress_bar("writing the report", 3 + len(results), "file") as bar:
        write_results(folder / "results.json", results)
        bar.update()
        write_curves(folder / "curves.png", results)
        bar.update()
        for name, explained in explanations.items():
            network_grid(pictures, explained).save(folder / f"{name}.png")
            bar.update()
        comparison_grid(pictures, explanations).save(folder / "comparison.png")
        bar.update()
    tables = f"{scores_table(results)}\n{networks_table(results)}\n"
    note_list = "\n".join(f"- {note}" for note in notes)
    (folder / "table.md").write_text(f"{tables}{note_list}\n", encoding="utf-8")
    return tables


def scores_table(results: Sequence[Result]) -> str:
    """Format the scores as a Markdown table, with the paper's test scores beside them.

    Args:
        results: one per network.

    Returns:
        The table, ending in a newline.
    """
    cells = [["", "train loss", "train acc.", "test loss", "test acc.", "pointing",
              "random map", "paper: test loss", "paper: test acc."]]  # fmt: skip
    for result in results:
        train, test, paper = result.train, result.test, _PAPER_SCORES[result.name]
        # Photos come without masks, so it is unknown whether a map points at the object.
        pointing = result.pointing
        shares = (pointing.maps, pointing.random) if pointing else (None, None)
        numbers = (train.loss, train.accuracy, test.loss, test.accuracy, *shares)
        numbers += (paper.loss, paper.accuracy)
        cells.append([result.name, *("not known" if n is None else f"{n:.3f}" for n in numbers)])
    return _format_table(cells)


def networks_table(results: Sequence[Result]) -> str:
    """Format the architectures and recipes as a Markdown table.

    Args:
        results: one per network.

    Returns:
        The table, ending in a newline.
    """
    cells = [["", "network", "images", "layer, map", "parameters (trained)", "recipe"]]
    for result in results:
        cells.append(
            [
                result.name,
                result.network,
                f"{result.image_size}x{result.image_size}",
                f"`{result.layer}`, {result.map_size[0]}x{result.map_size[1]}",
                f"{result.parameters:,} ({result.trainable_parameters:,})",
                result.recipe,
            ]
        )
    return _format_table(cells)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write all numbers as JSON.

    Args:
        path: the file to write.
        results: one per network.
    """
    text = json.dumps([asdict(result) for result in results], indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write_curves(path: Path, results: Sequence[Result]) -> None:
    """Plot loss and accuracy over the epochs; dashed lines are train, solid lines are test.

    Args:
        path: the PNG file to write.
        results: one per network.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("loss (cross entropy, nats)", "accuracy"),
        strict=True,
    ):
        # A network keeps its colour in both plots, so one legend serves both.
        for number, result in enumerate(results):
            for part, style in (("train", "--"), ("test", "-")):
                values = [getattr(score, quantity) for score in getattr(result.history, part)]
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    style,
                    color=f"C{number}",
                    marker=".",
                    label=f"{result.name}, {part}",
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.set_xlim(0.5, max(len(result.history.test) for result in results) + 0.5)
    losses, accuracies = figure.axes
    # With batch norm, the test loss of the first epochs can be very large; on a linear scale the
    # later epochs would all look alike.
    losses.set_yscale("log")
    accuracies.set_ylim(0, 1.02)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=120)


def first_of_each_class(pictures: PictureSet) -> PictureSet:
    """Select the first picture of every class.

    The choice does not depend on the results, so the report shows mistakes as well as successes.

    Args:
        pictures: at least one picture of each class.

    Returns:
        As many pictures as classes, in the order of the classes.
    """
    first = [int((pictures.labels == k).nonzero()[0]) for k in range(len(pictures.classes))]
    return pictures.subset(torch.tensor(first))


def explain(network: Network, pictures: PictureSet, *, device: torch.device) -> Explanations:
    """Predict the classes of pictures and explain the predictions.

    Args:
        network: the network, on ``device`` and in evaluation mode.
        pictures: N pictures; they run through the network as one batch.
        device: device to compute on.

    Returns:
        Predictions and heatmaps.
    """
    explanation = network.explain(normalized(pictures.images, device))
    probabilities = explanation.output.softmax(1).amax(1)
    return Explanations(
        layer=explanation.layer,
        map_size=(explanation.maps.shape[1], explanation.maps.shape[2]),
        predicted=[pictures.classes[k] for k in explanation.output.argmax(1).tolist()],
        probability=probabilities.tolist(),
        heatmaps=explanation.heatmaps(size=(_TILE_SIZE, _TILE_SIZE)).cpu(),
    )


def network_grid(pictures: PictureSet, explained: Explanations) -> Image.Image:
    """Draw one row per picture: original, heatmap and blend.

    Args:
        pictures: N pictures.
        explained: the network's explanations of them.

    Returns:
        The grid, labelled with the true and the predicted classes.
    """
    rows, labels = [], []
    for i, image in enumerate(_resize_to_tiles(pictures)):
        # With alpha 1 the heatmap covers the picture completely.
        heatmap = camkit.overlay(image, explained.heatmaps[i], alpha=1.0)
        rows.append([image, heatmap, camkit.overlay(image, explained.heatmaps[i])])
        name = pictures.classes[int(pictures.labels[i])]
        labels.append(f"{name}\nsaid: {explained.predicted[i]} {explained.probability[i]:.2f}")
    return camkit.grid(rows, row_labels=labels, column_labels=["original", "heatmap", "blend"])


def comparison_grid(pictures: PictureSet, explanations: Mapping[str, Explanations]) -> Image.Image:
    """Draw one row per picture: the original and the blend of every network.

    Args:
        pictures: N pictures.
        explanations: each network's explanations of them, by its name.

    Returns:
        The grid, labelled with the true classes and the names of the networks.
    """
    rows = [
        [image, *(camkit.overlay(image, e.heatmaps[i]) for e in explanations.values())]
        for i, image in enumerate(_resize_to_tiles(pictures))
    ]
    names = [pictures.classes[k] for k in pictures.labels.tolist()]
    return camkit.grid(rows, row_labels=names, column_labels=["original", *explanations])


def _resize_to_tiles(pictures: PictureSet) -> list[Image.Image]:
    # Pillow expects the channels last.
    arrays = pictures.images.permute(0, 2, 3, 1).numpy()
    size = (_TILE_SIZE, _TILE_SIZE)
    return [Image.fromarray(array).resize(size, Image.Resampling.BICUBIC) for array in arrays]


def _format_table(cells: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table; the first row is the header."""
    # Markdown does not need aligned columns, but the table is also printed to the terminal.
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
