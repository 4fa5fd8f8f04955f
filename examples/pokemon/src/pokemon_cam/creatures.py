"""The built-in data set: drawn creatures with a known mask for every picture.

Each of the seven kinds in `pokemon_cam.kinds` is drawn over clutter in a random pose. The kinds
differ in their parts (a tail with a flame, wings, a shell, a sprout, ...). Two pairs of kinds share
a range of colours, so colour alone does not tell all kinds apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from pokemon_cam.drawing import DARK, Points, Shape, ellipse, random_colour, rotate
from pokemon_cam.kinds import KINDS
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]

# Pictures are drawn at 3 times their size and averaged down, which smooths the edges.
_SUPERSAMPLING = 3
# The background and the creature use separate random streams, so that `draw_background` can draw
# exactly the background of a picture without drawing its creature.
_BACKGROUND_STREAM, _CREATURE_STREAM = 0, 1


@dataclass(frozen=True)
class Creature:
    """One picture and its ground truth.

    Attributes:
        image: the picture, uint8, shape ``(H, W, 3)``.
        kind: name of the kind, one of `KINDS`.
        mask: every pixel that the creature touches, bool, shape ``(H, W)``.
        parts: for each part's name, the pixels in which that part is visible, bool, each of shape
            ``(H, W)``.
    """

    image: Pixels
    kind: str
    mask: Mask
    parts: dict[str, Mask]

    @property
    def box(self) -> Box:
        """Tight box ``(left, top, right, bottom)`` of the creature; right and bottom exclusive."""
        return bounding_box(self.mask)

    @property
    def part_boxes(self) -> dict[str, Box]:
        """Tight box of each part, in the format of `box`."""
        return {name: bounding_box(mask) for name, mask in self.parts.items()}


def draw_set(count: int, *, seed: int, size: int) -> PictureSet:
    """Draw the first pictures of the data set.

    Args:
        count: number of pictures, at least 1.
        seed: seed of the data set, at least 0.
        size: height and width in pixels, at least 32.

    Returns:
        The pictures with the masks of their creatures.

    Raises:
        ValueError: if ``count``, ``seed`` or ``size`` is too small.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    images, masks, labels = [], [], []
    classes = tuple(KINDS)
    with progress_bar("drawing creatures", count, "picture") as bar:
        for index in range(count):
            creature = draw_creature(index, seed=seed, size=size)
            images.append(torch.from_numpy(creature.image).permute(2, 0, 1))
            masks.append(torch.from_numpy(creature.mask))
            labels.append(classes.index(creature.kind))
            bar.update()
    return PictureSet(torch.stack(images), torch.tensor(labels), classes, torch.stack(masks))


def draw_creature(index: int, *, seed: int, size: int) -> Creature:
    """Draw one picture of the data set.

    A picture depends only on its index, the seed and the size, not on the number of pictures drawn.
    The kinds alternate: picture ``index`` shows kind ``index % 7``.

    Args:
        index: index of the picture, at least 0.
        seed: seed of the data set, at least 0.
        size: height and width in pixels, at least 32.

    Returns:
        The picture with its masks.

    Raises:
        ValueError: if ``index``, ``seed`` or ``size`` is too small.
    """
    background = draw_background(index, seed=seed, size=size).astype(np.float64)
    rng = np.random.default_rng([seed, index, _CREATURE_STREAM])
    kind = list(KINDS)[index % len(KINDS)]
    shapes = _place(KINDS[kind](rng), rng, size)

    colours, labels, parts = _rasterise(shapes, size)
    covered = labels > 0
    coverage = covered.mean(axis=(1, 3))[..., None]
    # Samples outside the creature count as black. The mean colour is therefore already weighted by
    # the coverage, and adding the background with the remaining weight blends the edge.
    paint = (colours * covered[..., None]).mean(axis=(1, 3)) * _lighting(rng, size)
    paint += coverage * rng.normal(0.0, 5.0, (size, size, 1))
    image = background * (1 - coverage) + paint
    return Creature(
        image=_to_pixels(image),
        kind=kind,
        # A pixel belongs to a mask as soon as one of its samples does, so a faint edge counts too.
        mask=np.asarray(covered.any(axis=(1, 3))),
        parts={
            name: np.asarray((labels == label).any(axis=(1, 3)))
            for label, name in enumerate(parts, start=1)
        },
    )


def draw_background(index: int, *, seed: int, size: int) -> Pixels:
    """Draw the background of one picture, without its creature.

    Args:
        index: index of the picture, at least 0.
        seed: seed of the data set, at least 0.
        size: height and width in pixels, at least 32.

    Returns:
        The clutter over which `draw_creature` paints, uint8, shape ``(size, size, 3)``.

    Raises:
        ValueError: if ``index``, ``seed`` or ``size`` is too small.
    """
    for name, value, least in (("index", index, 0), ("seed", seed, 0), ("size", size, 32)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    rng = np.random.default_rng([seed, index, _BACKGROUND_STREAM])
    large = size * _SUPERSAMPLING
    top, bottom = np.array(random_colour(rng)), np.array(random_colour(rng))
    slope = np.linspace(0, 1, large)[:, None, None]
    gradient = np.broadcast_to(top * (1 - slope) + bottom * slope, (large, large, 3))
    canvas = Image.fromarray(gradient.astype(np.uint8))
    brush = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(8, 19)):
        centre = rng.uniform(0, large, 2)
        radii = rng.uniform(0.02, 0.14, 2) * large
        # Triangles, quadrilaterals, pentagons, and ellipses that are approximated by 32 sides.
        sides = int(rng.choice([3, 4, 5, 32]))
        corners = rotate(ellipse(0, 0, *radii, sides=sides), rng.uniform(0, 360)) + centre
        brush.polygon(_flatten(corners), fill=random_colour(rng))
    for _ in range(rng.integers(0, 5)):
        ends = _flatten(rng.uniform(0, large, (2, 2)))
        brush.line(ends, fill=random_colour(rng), width=int(rng.integers(1, large // 25)))
    scene = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64)
    # The creature gets noise as well; without this noise it would be the only grainy region.
    scene += rng.normal(0.0, rng.uniform(2.0, 10.0), (size, size, 1))
    return _to_pixels(scene)


def bounding_box(mask: Mask) -> Box:
    """Compute the tight box of a mask.

    Args:
        mask: bool, shape ``(H, W)``, with at least one true pixel.

    Returns:
        ``(left, top, right, bottom)`` in pixels; right and bottom exclusive.

    Raises:
        ValueError: if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("mask: expected at least one true pixel, got an empty mask")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(shapes: Sequence[Shape], rng: np.random.Generator, size: int) -> list[Shape]:
    """Mirror, rotate, scale and move shapes so that the whole creature is inside the picture."""
    mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
    angle = rng.uniform(-50, 50)
    posed = [rotate(shape.points * mirror, angle) for shape in shapes]
    corners = np.concatenate(posed)
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = 3.0  # The outline extends beyond the corners and needs some room.
    longest = rng.uniform(0.55, 0.95) * size - 2 * margin
    scale = longest / float((high - low).max())
    room = size - 2 * margin - scale * (high - low)
    offset = margin + rng.uniform(0, 1, 2) * room - scale * low
    return [
        replace(shape, points=points * scale + offset)
        for shape, points in zip(shapes, posed, strict=True)
    ]


def _rasterise(shapes: Sequence[Shape], size: int) -> tuple[Pixels, Pixels, list[str]]:
    """Paint shapes and record the part to which each sample belongs.

    Returns:
        Colours ``(size, s, size, s, 3)``, labels ``(size, s, size, s)`` and the names of the parts.
        Axes 1 and 3 hold the s x s samples of each pixel. Label 0 is the background, and label i is
        part i - 1.
    """
    parts = list(dict.fromkeys(shape.part for shape in shapes))
    large = size * _SUPERSAMPLING
    colours, labels = Image.new("RGB", (large, large)), Image.new("L", (large, large))
    colour_brush, label_brush = ImageDraw.Draw(colours), ImageDraw.Draw(labels)
    width = max(1, round(large / 110))
    for shape in shapes:
        label = parts.index(shape.part) + 1
        corners = shape.points * _SUPERSAMPLING
        # The outline runs over its first side twice, so that the joint at the first corner is
        # rounded like the others.
        outline = np.concatenate([corners, corners[:2]])
        # Both canvases get the same strokes, so a later part hides an earlier one in both.
        for brush, fill, line in (
            (colour_brush, shape.colour, DARK),
            (label_brush, label, label),
        ):
            brush.polygon(_flatten(corners), fill=fill)
            if shape.outlined:
                brush.line(_flatten(outline), fill=line, width=width, joint="curve")

    samples = (size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return np.asarray(colours).reshape(*samples, 3), np.asarray(labels).reshape(samples), parts


def _lighting(rng: np.random.Generator, size: int) -> Floats:
    """Return brightness factors ``(size, size, 1)`` of a soft light from a random side."""
    angle = rng.uniform(0, 2 * math.pi)
    position = np.linspace(-1, 1, size)
    slope = math.cos(angle) * position[None, :] + math.sin(angle) * position[:, None]
    return (rng.uniform(0.88, 1.08) + 0.12 * slope)[..., None]


def _flatten(points: Points) -> list[float]:
    """Return points as Pillow takes them: ``[x0, y0, x1, y1, ...]``."""
    flat: list[float] = points.ravel().tolist()
    return flat


def _to_pixels(image: Floats) -> Pixels:
    """Round to uint8; noise can leave values below 0 or above 255, which are clipped."""
    return image.round().clip(0, 255).astype(np.uint8)
