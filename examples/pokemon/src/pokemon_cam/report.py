"""The table, the curves and the picture grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import camkit
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pokemon_cam.networks import Network
from pokemon_cam.pictures import PictureSet
from pokemon_cam.scoring import Pointing
from pokemon_cam.training import History, Score, normalized

_TILE = 160  # side of one picture in a grid, in pixels


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the paper's name of the network.
        network: what the network really is.
        image_size: height and width of its pictures, in pixels.
        layer: the explained layer's name.
        map_size: the maps' resolution ``(h, w)``.
        parameters: number of all parameters.
        trainable_parameters: number of those that training changed.
        recipe: how it was trained.
        train: score on the training pictures after training.
        test: score on the test pictures after training.
        pointing: score of the maps; None where the truth is not known.
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


_PAPER = {
    "VGG16-CAM": Score(0.218, 0.918),
    "AlexNet-CAM": Score(0.115, 0.955),
    "VGG19-Grad-CAM": Score(0.984, 0.881),
}


def scores_table(rows: Sequence[Row]) -> str:
    """Table I in Markdown: losses, accuracies, pointing, and the paper's test results.

    Args:
        rows: one per network.

    Returns:
        The table, ending in a newline.
    """
    cells = [["", "train loss", "train acc.", "test loss", "test acc.", "pointing",
              "random map", "paper: test loss", "paper: test acc."]]  # fmt: skip
    for row in rows:
        paper = _PAPER[row.name]
        points = (row.pointing.maps, row.pointing.random) if row.pointing else ()
        numbers = (row.train.loss, row.train.accuracy, row.test.loss, row.test.accuracy, *points)
        missing = ["not known"] * (6 - len(numbers))
        cells.append(
            [
                row.name,
                *(f"{n:.3f}" for n in numbers),
                *missing,
                f"{paper.loss:.3f}",
                f"{paper.accuracy:.3f}",
            ]
        )
    return _markdown(cells)


def networks_table(rows: Sequence[Row]) -> str:
    """What each row of the table really is, in Markdown.

    Args:
        rows: one per network.

    Returns:
        The table, ending in a newline.
    """
    cells = [["", "network", "images", "layer, map", "parameters (trained)", "recipe"]]
    for row in rows:
        cells.append(
            [
                row.name,
                row.network,
                f"{row.image_size}x{row.image_size}",
                f"`{row.layer}`, {row.map_size[0]}x{row.map_size[1]}",
                f"{row.parameters:,} ({row.trainable_parameters:,})",
                row.recipe,
            ]
        )
    return _markdown(cells)


def write_results(path: Path, rows: Sequence[Row], histories: Mapping[str, History]) -> None:
    """Write all numbers as JSON.

    Args:
        path: the file to write.
        rows: one per network.
        histories: the curves of each network, by its name.
    """
    results = [asdict(row) | {"history": asdict(histories[row.name])} for row in rows]
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_curves(path: Path, histories: Mapping[str, History]) -> None:
    """Draw loss and accuracy over the epochs, training dashed and test solid.

    Args:
        path: the PNG file to write.
        histories: the curves of each network, by its name.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("loss (cross entropy, nats)", "accuracy"),
        strict=True,
    ):
        for colour, (name, history) in enumerate(histories.items()):
            for part, style in (("train", "--"), ("test", "-")):
                values = [getattr(score, quantity) for score in getattr(history, part)]
                epochs = range(1, len(values) + 1)
                axes.plot(
                    epochs, values, style, color=f"C{colour}", marker=".", label=f"{name}, {part}"
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.set_xlim(0.5, max(len(history.test) for history in histories.values()) + 0.5)
    losses, accuracies = figure.axes
    losses.set_yscale("log")  # the first epochs of batch norm can be far off
    accuracies.set_ylim(0, 1.02)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(histories))
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Explained:
    """A network's view of some pictures.

    Attributes:
        layer: the explained layer's name.
        map_size: the raw maps' resolution ``(h, w)``.
        predicted: name of the predicted class of each.
        probability: of that class, in [0, 1].
        heatmaps: of that class, in [0, 1], shape ``(N, T, T)`` at the grids' tile size.
    """

    layer: str
    map_size: tuple[int, int]
    predicted: list[str]
    probability: list[float]
    heatmaps: Tensor


def one_of_each(pictures: PictureSet) -> PictureSet:
    """The first picture of every class: the same ones for every network, chosen by no result.

    Args:
        pictures: at least one of each class.

    Returns:
        As many pictures as classes, in the order of the classes.
    """
    first = [int((pictures.labels == k).nonzero()[0]) for k in range(len(pictures.classes))]
    return pictures.subset(torch.tensor(first))


def explain(network: Network, pictures: PictureSet, *, device: torch.device) -> Explained:
    """Explain what a network predicts for pictures.

    Args:
        network: on ``device``, in evaluation mode.
        pictures: N pictures.
        device: where to compute.

    Returns:
        Predictions and heatmaps.
    """
    explanation = network.explain(normalized(pictures.images, device))
    probabilities = explanation.output.softmax(1).amax(1)
    return Explained(
        explanation.layer,
        (explanation.maps.shape[1], explanation.maps.shape[2]),
        [pictures.classes[k] for k in explanation.output.argmax(1).tolist()],
        probabilities.tolist(),
        explanation.heatmaps(size=(_TILE, _TILE)).cpu(),
    )


def network_grid(pictures: PictureSet, explained: Explained) -> Image.Image:
    """One row per picture: original, heatmap, blend.

    Args:
        pictures: N pictures.
        explained: what the network makes of them.

    Returns:
        The labelled grid.
    """
    rows, labels = [], []
    for i, image in enumerate(_tiles(pictures)):
        heatmap = explained.heatmaps[i]
        pure = camkit.overlay(image, heatmap, alpha=1.0)
        rows.append([image, pure, camkit.overlay(image, heatmap)])
        labels.append(_label(pictures, explained, i))
    return camkit.grid(rows, row_labels=labels, column_labels=["original", "heatmap", "blend"])


def comparison_grid(pictures: PictureSet, explained: Mapping[str, Explained]) -> Image.Image:
    """One row per picture: original, and every network's blend.

    Args:
        pictures: N pictures.
        explained: what each network makes of them, by its name.

    Returns:
        The labelled grid.
    """
    rows = [
        [image, *(camkit.overlay(image, e.heatmaps[i]) for e in explained.values())]
        for i, image in enumerate(_tiles(pictures))
    ]
    names = [pictures.classes[k] for k in pictures.labels.tolist()]
    return camkit.grid(rows, row_labels=names, column_labels=["original", *explained])


def _tiles(pictures: PictureSet) -> list[Image.Image]:
    arrays: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = list(
        pictures.images.permute(0, 2, 3, 1).numpy()
    )
    return [
        Image.fromarray(array).resize((_TILE, _TILE), Image.Resampling.BICUBIC) for array in arrays
    ]


def _label(pictures: PictureSet, explained: Explained, i: int) -> str:
    name = pictures.classes[int(pictures.labels[i])]
    said = f"{explained.predicted[i]} {explained.probability[i]:.2f}"
    return f"{name}\nsaid: {said}"


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it reads well in a terminal too."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
