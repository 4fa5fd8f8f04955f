"""Creatures: a procedural picture set in which the truth is known for every pixel.

Seven original kinds are drawn over clutter in any pose. They differ in their parts (a tail with a
flame, wings, a shell, a sprout, ...); two pairs of kinds share one colour, so colour alone does not
tell the kinds apart. Each picture comes with the exact mask of the creature and of each part.

Coordinates while drawing are ``(x, y)`` with y down; a creature is made in units of roughly half
its own height around the origin, facing right, and placed in the picture afterwards.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

_SUPERSAMPLING = 3
_BACKGROUND_STREAM, _CREATURE_STREAM = 0, 1

_DARK: Colour = (38, 30, 42)
_WHITE: Colour = (250, 250, 248)
_CREAM: Colour = (250, 232, 196)
_BROWN: Colour = (148, 98, 58)


@dataclass(frozen=True)
class Creature:
    """One picture and its ground truth.

    Attributes:
        image: the picture, uint8, shape ``(H, W, 3)``.
        kind: name of the kind, one of `KINDS`.
        mask: the creature with all its parts, shape ``(H, W)``: every pixel it touches.
        parts: for each part's name the pixels in which that part is seen, each ``(H, W)``.
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
        """Tight box of each part, as `box`."""
        return {name: bounding_box(mask) for name, mask in self.parts.items()}


@dataclass(frozen=True)
class _Shape:
    part: str
    points: Points
    colour: Colour
    outlined: bool = True


def draw(index: int, *, seed: int, size: int) -> Creature:
    """Draw picture ``index`` of the set.

    A picture depends on its index, the seed and the size only, so it stays the same however many
    others are drawn. Kinds take turns: ``index % 7`` is the kind.

    Args:
        index: which picture, from 0.
        seed: seed of the whole set, from 0.
        size: height and width in pixels, at least 32.

    Returns:
        The picture with its masks.

    Raises:
        ValueError: when ``index``, ``seed`` or ``size`` is too small.
    """
    background = draw_background(index, seed=seed, size=size).astype(np.float64)
    rng = np.random.default_rng([seed, index, _CREATURE_STREAM])
    kind = list(KINDS)[index % len(KINDS)]
    shapes = _placed(KINDS[kind](rng), rng, size)

    # One canvas holds colours, the other says which part each of its points belongs to.
    names = list(dict.fromkeys(shape.part for shape in shapes))
    large = size * _SUPERSAMPLING
    colours = Image.new("RGB", (large, large))
    labels = Image.new("L", (large, large))
    on_colours, on_labels = ImageDraw.Draw(colours), ImageDraw.Draw(labels)
    stroke = max(1, round(large / 110))
    for shape in shapes:
        corners = [(float(x), float(y)) for x, y in shape.points * _SUPERSAMPLING]
        label = names.index(shape.part) + 1
        on_colours.polygon(corners, fill=shape.colour)
        on_labels.polygon(corners, fill=label)
        if shape.outlined:
            ring = [*corners, corners[0], corners[1]]
            on_colours.line(ring, fill=_DARK, width=stroke, joint="curve")
            on_labels.line(ring, fill=label, width=stroke, joint="curve")

    label_blocks = _blocks(np.asarray(labels), size)
    covered = label_blocks > 0
    colour_blocks = np.stack(
        [_blocks(channel, size) for channel in np.moveaxis(np.asarray(colours), -1, 0)], axis=-1
    )
    coverage = covered.mean(axis=(1, 3))[..., None]
    paint = (colour_blocks * covered[..., None]).mean(axis=(1, 3)) * _light(rng, size)
    paint += coverage * rng.normal(0.0, 5.0, (size, size, 1))
    mask: Mask = np.asarray(covered.any(axis=(1, 3)))
    image = np.where(mask[..., None], background * (1 - coverage) + paint, background)
    return Creature(
        image=image.round().clip(0, 255).astype(np.uint8),
        kind=kind,
        mask=mask,
        parts={
            name: np.asarray((label_blocks == label).any(axis=(1, 3)))
            for label, name in enumerate(names, start=1)
        },
    )


def draw_set(count: int, *, seed: int, size: int) -> PictureSet:
    """Draw the first pictures of the set.

    Args:
        count: how many, at least 1.
        seed: seed of the whole set, from 0.
        size: height and width in pixels, at least 32.

    Returns:
        The pictures with the creatures' masks.

    Raises:
        ValueError: when ``count``, ``seed`` or ``size`` is too small.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    images, masks, labels = [], [], []
    classes = tuple(KINDS)
    with progress_bar("drawing creatures", count, "picture") as bar:
        for index in range(count):
            creature = draw(index, seed=seed, size=size)
            images.append(torch.from_numpy(creature.image).permute(2, 0, 1))
            masks.append(torch.from_numpy(creature.mask))
            labels.append(classes.index(creature.kind))
            bar.update()
    return PictureSet(torch.stack(images), torch.tensor(labels), classes, torch.stack(masks))


def draw_background(index: int, *, seed: int, size: int) -> Pixels:
    """Draw the scene of picture ``index`` without its creature.

    Args:
        index: which picture, from 0.
        seed: seed of the whole set, from 0.
        size: height and width in pixels, at least 32.

    Returns:
        The clutter, uint8, shape ``(size, size, 3)``: what `draw` draws its creature over.

    Raises:
        ValueError: when ``index``, ``seed`` or ``size`` is too small.
    """
    for name, value, least in (("index", index, 0), ("seed", seed, 0), ("size", size, 32)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    rng = np.random.default_rng([seed, index, _BACKGROUND_STREAM])
    large = size * _SUPERSAMPLING
    near, far = np.array(_any_colour(rng)), np.array(_any_colour(rng))
    slope = np.linspace(0, 1, large)[:, None, None]
    sky = np.broadcast_to(near * (1 - slope) + far * slope, (large, large, 3))
    canvas = Image.fromarray(sky.astype(np.uint8))
    brush = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(8, 19)):
        centre = rng.uniform(0, large, 2)
        radii = rng.uniform(0.02, 0.14, 2) * large
        sides = int(rng.choice([3, 4, 5, 32]))
        corners = _turned(_ellipse(0, 0, *radii, sides=sides), rng.uniform(0, 360)) + centre
        brush.polygon([(float(x), float(y)) for x, y in corners], fill=_any_colour(rng))
    for _ in range(rng.integers(0, 5)):
        ends = [(float(x), float(y)) for x, y in rng.uniform(0, large, (2, 2))]
        brush.line(ends, fill=_any_colour(rng), width=int(rng.integers(1, large // 25)))
    scene = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64)
    scene += rng.normal(0.0, rng.uniform(2.0, 10.0), (size, size, 1))
    return scene.round().clip(0, 255).astype(np.uint8)


def bounding_box(mask: Mask) -> Box:
    """Tight box of a mask.

    Args:
        mask: boolean, shape ``(H, W)``, with at least one true pixel.

    Returns:
        ``(left, top, right, bottom)`` in pixels; right and bottom exclusive.

    Raises:
        ValueError: when the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("mask: expected at least one true pixel, got an empty mask")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _blocks(plane: Pixels, size: int) -> Pixels:
    """View a supersampled plane as ``(size, s, size, s)``: the points of each pixel."""
    return plane.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)


def _light(rng: np.random.Generator, size: int) -> Points:
    """Brightness factors ``(size, size, 1)``: a soft light from any side."""
    angle = rng.uniform(0, 2 * math.pi)
    along = np.linspace(-1, 1, size)
    slope = math.cos(angle) * along[None, :] + math.sin(angle) * along[:, None]
    return (rng.uniform(0.88, 1.08) + 0.12 * slope)[..., None]


def _placed(shapes: Sequence[_Shape], rng: np.random.Generator, size: int) -> list[_Shape]:
    """Mirror, turn, scale and move shapes so that the whole creature is inside the picture."""
    mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
    angle = rng.uniform(-50, 50)
    posed = [_turned(shape.points * mirror, angle) for shape in shapes]
    corners = np.concatenate(posed)
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = 3.0  # room for the outline
    longest = rng.uniform(0.55, 0.95) * size - 2 * margin
    scale = longest / float((high - low).max())
    room = size - 2 * margin - scale * (high - low)
    offset = margin + rng.uniform(0, 1, 2) * room - scale * low
    return [
        _Shape(shape.part, points * scale + offset, shape.colour, shape.outlined)
        for shape, points in zip(shapes, posed, strict=True)
    ]


# --- outlines ---


def _ellipse(x: float, y: float, rx: float, ry: float, *, sides: int = 40) -> Points:
    angles = np.linspace(0, 2 * math.pi, sides, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _turned(points: Points, degrees: float, about: tuple[float, float] = (0.0, 0.0)) -> Points:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned: Points = (points - about) @ np.array([[cos, sin], [-sin, cos]]) + about
    return turned


def _curve(knots: Sequence[tuple[float, float]], *, steps: int = 8) -> Points:
    """Open Catmull-Rom curve through the knots."""
    p = np.array([knots[0], *knots, knots[-1]], dtype=np.float64)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        0.5
        * (
            2 * b
            + (c - a) * t
            + (2 * a - 5 * b + 4 * c - d) * t**2
            + (3 * b - a - 3 * c + d) * t**3
        )
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate([*pieces, p[-1:]])


def _blob(knots: Sequence[tuple[float, float]]) -> Points:
    """Closed smooth outline through the knots."""
    around = [knots[-1], *knots, knots[0], knots[1]]
    return _curve(around)[8:-9]


def _ribbon(knots: Sequence[tuple[float, float]], start: float, end: float) -> Points:
    """Outline of a band along a curve, its half-width going from ``start`` to ``end``."""
    spine = _curve(knots)
    along = np.gradient(spine, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = np.linspace(start, end, len(spine))[:, None]
    return np.concatenate([spine + normal * half, (spine - normal * half)[::-1]])


# --- colours ---


def _hue(rng: np.random.Generator, low: float, high: float) -> Colour:
    """A lively colour with a hue between ``low`` and ``high`` degrees."""
    return _rgb(rng.uniform(low, high), rng.uniform(0.6, 0.9), rng.uniform(0.78, 0.98))


def _any_colour(rng: np.random.Generator) -> Colour:
    return _rgb(rng.uniform(0, 360), rng.uniform(0.05, 0.8), rng.uniform(0.25, 0.95))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (
        round(a * (1 - share) + b * share) for a, b in zip(colour, other, strict=True)
    )
    return red, green, blue


# --- pieces that several kinds have ---


def _eye(part: str, x: float, y: float, radius: float) -> list[_Shape]:
    return [
        _Shape(part, _ellipse(x, y, radius, 1.15 * radius), _WHITE),
        _Shape(part, _ellipse(x + 0.2 * radius, y, 0.6 * radius, 0.8 * radius), _DARK, False),
        _Shape(part, _ellipse(x + 0.4 * radius, y - 0.4 * radius, 0.25 * radius, 0.25 * radius),
               _WHITE, False),
    ]  # fmt: skip


def _smile(part: str, x: float, y: float, width: float) -> _Shape:
    knots = [(x - width, y), (x, y + 0.6 * width), (x + width, y)]
    return _Shape(part, _ribbon(knots, 0.025, 0.025), _DARK, False)


def _feet(colour: Colour, left: float, right: float, y: float) -> list[_Shape]:
    return [_Shape("feet", _ellipse(x, y, 0.19, 0.12), colour) for x in (left, right)]


# --- the kinds ---


def _emberkit(rng: np.random.Generator) -> list[_Shape]:
    """An orange kit: pointed ears, and a tail that ends in a flame."""
    fur = _hue(rng, 14, 34)
    swing = rng.uniform(-14, 14)
    root = (-0.3, 0.6)
    tail = [root, (-0.75, 0.62), (-0.95, 0.2), (-0.85, -0.2)]
    flame = [(-0.85, -0.12), (-1.1, -0.32), (-1.02, -0.6), (-0.93, -0.5), (-0.82, -0.9),
             (-0.72, -0.52), (-0.62, -0.58), (-0.6, -0.3)]  # fmt: skip
    heart = [(-0.85, -0.18), (-0.97, -0.34), (-0.84, -0.62), (-0.72, -0.34)]
    ears = [[(-0.22, -0.55), (-0.2, -1.05), (0.12, -0.74)],
            [(0.3, -0.76), (0.58, -1.08), (0.6, -0.56)]]  # fmt: skip
    return [
        _Shape("tail", _turned(_ribbon(tail, 0.14, 0.07), swing, root), fur),
        _Shape("flame", _turned(_blob(flame), swing, root), (236, 72, 28)),
        _Shape("flame", _turned(_blob(heart), swing, root), (255, 214, 64), False),
        *_feet(fur, -0.22, 0.3, 0.86),
        _Shape("body", _ellipse(0.02, 0.42, 0.4, 0.46), fur),
        _Shape("body", _ellipse(0.1, 0.5, 0.25, 0.32), _CREAM, False),
        *(_Shape("ears", np.array(ear), fur) for ear in ears),
        _Shape("head", _ellipse(0.2, -0.34, 0.5, 0.44), fur),
        _Shape("head", _ellipse(0.3, -0.16, 0.26, 0.18), _CREAM, False),
        *_eye("head", 0.02, -0.4, 0.11),
        *_eye("head", 0.42, -0.4, 0.11),
        _Shape("head", _ellipse(0.31, -0.22, 0.06, 0.04), _DARK, False),
        _smile("head", 0.31, -0.13, 0.1),
    ]


def _galewing(rng: np.random.Generator) -> list[_Shape]:
    """A drake as orange as the emberkit: two wings, horns, and a tail without a flame."""
    hide = _hue(rng, 14, 34)
    membrane = _mixed(hide, (40, 60, 110), 0.62)
    flap = rng.uniform(-16, 16)
    near = [(-0.1, 0.1), (-0.35, -0.55), (-0.9, -1.0), (-1.25, -0.55), (-0.95, -0.5),
            (-1.05, -0.1), (-0.7, -0.15), (-0.65, 0.22), (-0.35, 0.1)]  # fmt: skip
    far = [(0.1, 0.1), (0.35, -0.5), (0.8, -0.95), (1.2, -0.45), (0.9, -0.42), (0.98, -0.05),
           (0.66, -0.1), (0.6, 0.24), (0.32, 0.14)]  # fmt: skip
    return [
        _Shape("wings", _turned(np.array(near), flap, (-0.1, 0.1)), membrane),
        _Shape("wings", _turned(np.array(far), -flap, (0.1, 0.1)), membrane),
        _Shape("tail", _ribbon([(-0.1, 0.7), (-0.55, 0.95), (-0.98, 0.74)], 0.15, 0.04), hide),
        *_feet(hide, -0.18, 0.24, 0.98),
        _Shape("body", _ellipse(0.0, 0.48, 0.34, 0.52), hide),
        _Shape("body", _ellipse(0.06, 0.55, 0.2, 0.38), _CREAM, False),
        _Shape("horns", np.array([(-0.02, -0.62), (-0.3, -0.98), (0.14, -0.74)]), _CREAM),
        _Shape("horns", np.array([(0.16, -0.74), (0.1, -1.12), (0.34, -0.74)]), _CREAM),
        _Shape("head", _ribbon([(0.02, 0.25), (0.04, -0.2), (0.14, -0.5)], 0.2, 0.17), hide),
        _Shape("head", _blob([(-0.1, -0.5), (0.12, -0.78), (0.4, -0.66), (0.74, -0.5),
                              (0.72, -0.34), (0.3, -0.3), (0.02, -0.3)]), hide),
        *_eye("head", 0.24, -0.57, 0.09),
        _Shape("head", _ellipse(0.66, -0.48, 0.03, 0.03), _DARK, False),
        _Shape("head", _ribbon([(0.34, -0.38), (0.52, -0.36), (0.68, -0.4)], 0.02, 0.02),
               _DARK, False),
    ]  # fmt: skip


def _domeback(rng: np.random.Generator) -> list[_Shape]:
    """A blue walker under a domed shell."""
    skin = _hue(rng, 188, 216)
    shell = _mixed(_BROWN, (96, 110, 60), rng.uniform(0, 0.6))
    nod = rng.uniform(-14, 14)
    plates = [(-0.5, -0.02), (-0.05, -0.02), (-0.28, -0.34), (0.16, -0.3)]
    neck = (0.5, 0.2)
    head = [
        _Shape("head", _ribbon([neck, (0.7, 0.05), (0.82, -0.1)], 0.2, 0.18), skin),
        _Shape("head", _ellipse(0.9, -0.2, 0.34, 0.31), skin),
        *_eye("head", 1.0, -0.26, 0.11),
        _smile("head", 1.04, -0.06, 0.1),
    ]
    return [
        _Shape("tail", _ribbon([(-0.75, 0.3), (-1.02, 0.28), (-1.1, 0.05)], 0.12, 0.05), skin),
        *(_Shape("legs", _ribbon([(x, 0.2), (x, 0.62)], 0.17, 0.15), skin)
          for x in (-0.55, -0.15, 0.42)),
        *(_Shape(s.part, _turned(s.points, nod, neck), s.colour, s.outlined) for s in head),
        _Shape("shell", _blob([(-0.9, 0.3), (-0.8, -0.25), (-0.42, -0.6), (0.05, -0.62),
                               (0.46, -0.3), (0.62, 0.3)]), shell),
        *(_Shape("shell", _ellipse(x, y, 0.17, 0.14, sides=6), _mixed(shell, _CREAM, 0.35))
          for x, y in plates),
        _Shape("shell", _ribbon([(-0.95, 0.26), (-0.15, 0.36), (0.68, 0.26)], 0.09, 0.09),
               _CREAM),
    ]  # fmt: skip


def _budling(rng: np.random.Generator) -> list[_Shape]:
    """A green seed with a sprout of two leaves on its head."""
    skin = _hue(rng, 88, 138)
    leaf = _mixed(skin, (20, 90, 40), 0.5)
    sway = rng.uniform(-16, 16)
    root = (0.0, -0.38)
    right = [(0.02, -0.72), (0.22, -1.1), (0.62, -1.18), (0.72, -0.96), (0.4, -0.72)]
    left = [(-0.02, -0.72), (-0.26, -1.02), (-0.62, -1.04), (-0.7, -0.8), (-0.38, -0.66)]
    sprout = [
        _Shape("sprout", _ribbon([root, (0.0, -0.76)], 0.06, 0.05), leaf),
        _Shape("sprout", _blob(right), leaf),
        _Shape("sprout", _blob(left), leaf),
        _Shape("sprout", _ribbon([(0.05, -0.76), (0.3, -0.94), (0.6, -1.04)], 0.02, 0.02),
               _mixed(leaf, _WHITE, 0.5), False),
        _Shape("sprout", _ribbon([(-0.05, -0.74), (-0.3, -0.86), (-0.6, -0.88)], 0.02, 0.02),
               _mixed(leaf, _WHITE, 0.5), False),
    ]  # fmt: skip
    return [
        *(_Shape(s.part, _turned(s.points, sway, root), s.colour, s.outlined) for s in sprout),
        *_feet(_BROWN, -0.24, 0.3, 0.74),
        _Shape("body", _blob([(0.0, -0.5), (0.5, -0.2), (0.62, 0.3), (0.34, 0.7), (-0.3, 0.7),
                              (-0.6, 0.3), (-0.48, -0.2)]), skin),
        _Shape("body", _ellipse(0.08, 0.4, 0.32, 0.24), _mixed(skin, _CREAM, 0.6), False),
        *_eye("body", -0.12, -0.02, 0.13),
        *_eye("body", 0.3, -0.02, 0.13),
        _smile("body", 0.1, 0.22, 0.12),
        *(_Shape("body", _ellipse(x, 0.18, 0.08, 0.05), (240, 140, 130), False)
          for x in (-0.3, 0.47)),
    ]  # fmt: skip


def _coilor(rng: np.random.Generator) -> list[_Shape]:
    """A serpent as green as the budling: a coiled body, a frill, and a rattle."""
    scales = _hue(rng, 88, 138)
    stripe = _mixed(scales, (250, 240, 90), 0.55)
    frill = (206, 70, 96)
    lean = rng.uniform(-12, 12)
    root = (0.05, 0.3)
    fan = [(0.2, -0.4), (-0.12, -0.42), (-0.3, -0.7), (-0.08, -0.78), (-0.06, -1.08),
           (0.16, -0.96), (0.34, -1.16), (0.44, -0.86)]  # fmt: skip
    front = [
        _Shape("frill", np.array(fan), frill),
        _Shape("neck", _ribbon([root, (-0.12, -0.05), (0.08, -0.36), (0.2, -0.6)], 0.19, 0.16),
               scales),
        _Shape("neck", _ribbon([(0.1, 0.26), (-0.04, -0.05), (0.16, -0.36)], 0.06, 0.05),
               stripe, False),
        _Shape("head", _ribbon([(0.6, -0.56), (0.8, -0.52), (0.9, -0.44)], 0.025, 0.02),
               (200, 30, 60), False),
        _Shape("head", _blob([(0.02, -0.7), (0.24, -0.9), (0.54, -0.78), (0.7, -0.6),
                              (0.52, -0.46), (0.12, -0.46)]), scales),
        *_eye("head", 0.36, -0.7, 0.1),
    ]  # fmt: skip
    beads = [(-0.8, 0.42, 0.13), (-0.92, 0.24, 0.11), (-0.98, 0.06, 0.09), (-1.0, -0.1, 0.07)]
    return [
        *(_Shape("rattle", _ellipse(x, y, r, r), _CREAM) for x, y, r in beads),
        _Shape("coil", _ellipse(0.02, 0.66, 0.82, 0.25), scales),
        _Shape("coil", _ribbon([(-0.7, 0.72), (0.0, 0.84), (0.74, 0.72)], 0.04, 0.04), stripe,
               False),
        _Shape("coil", _ellipse(0.02, 0.42, 0.62, 0.22), scales),
        _Shape("coil", _ribbon([(-0.5, 0.47), (0.0, 0.57), (0.54, 0.47)], 0.04, 0.04), stripe,
               False),
        _Shape("coil", _ellipse(0.02, 0.24, 0.4, 0.16), scales),
        *(_Shape(s.part, _turned(s.points, lean, root), s.colour, s.outlined) for s in front),
    ]  # fmt: skip


def _hornhare(rng: np.random.Generator) -> list[_Shape]:
    """A yellow hare: long ears, antlers between them, and a cotton tail."""
    fur = _hue(rng, 44, 58)
    inner = _mixed(fur, _WHITE, 0.7)
    fold = rng.uniform(-14, 14)
    ears: list[_Shape] = []
    for x, turn in ((-0.16, fold - 46), (0.42, fold + 46)):
        foot = (x, -0.5)
        ears += [
            _Shape("ears", _turned(_ellipse(x, -0.96, 0.16, 0.52), turn, foot), fur),
            _Shape("ears", _turned(_ellipse(x, -0.96, 0.07, 0.38), turn, foot), inner, False),
        ]
    antlers = [
        _Shape("antlers", _ribbon(knots, 0.055, 0.035), _BROWN)
        for side in (-1, 1)
        for knots in (
            [(0.13 + 0.1 * side, -0.58), (0.13 + 0.2 * side, -0.9), (0.13 + 0.16 * side, -1.24)],
            [(0.13 + 0.2 * side, -0.88), (0.13 + 0.38 * side, -1.04), (0.13 + 0.4 * side, -1.2)],
        )
    ]
    return [
        _Shape("tail", _blob([(-0.34, 0.42), (-0.52, 0.36), (-0.6, 0.52), (-0.68, 0.66),
                              (-0.5, 0.76), (-0.34, 0.76)]), _WHITE),
        _Shape("body", _ellipse(0.0, 0.44, 0.38, 0.46), fur),
        _Shape("body", _ellipse(0.1, 0.48, 0.2, 0.3), inner, False),
        _Shape("feet", _ellipse(-0.1, 0.9, 0.3, 0.12), fur),
        _Shape("feet", _ellipse(0.36, 0.88, 0.28, 0.12), fur),
        *ears,
        *antlers,
        _Shape("head", _ellipse(0.14, -0.28, 0.42, 0.38), fur),
        _Shape("head", _ellipse(0.22, -0.12, 0.22, 0.17), inner, False),
        *_eye("head", 0.0, -0.34, 0.1),
        *_eye("head", 0.36, -0.34, 0.1),
        _Shape("head", _ellipse(0.22, -0.2, 0.05, 0.04), (214, 110, 120), False),
        _Shape("head", np.array([(0.17, -0.06), (0.27, -0.06), (0.27, 0.06), (0.17, 0.06)]),
               _WHITE),
    ]  # fmt: skip


def _puffpom(rng: np.random.Generator) -> list[_Shape]:
    """A pink ball with two feelers that carry a pompom each."""
    fluff = _hue(rng, 318, 342)
    pom = _mixed(fluff, _WHITE, 0.6)
    feelers: list[_Shape] = []
    for side in (-1, 1):
        foot = (side * 0.22, -0.4)
        turn = rng.uniform(-12, 12)
        stalk = _ribbon([foot, (side * 0.3, -0.8), (side * 0.56, -1.02)], 0.05, 0.04)
        ball = _ellipse(side * 0.6, -1.04, 0.19, 0.19)
        feelers += [
            _Shape("feelers", _turned(stalk, turn, foot), fluff),
            _Shape("feelers", _turned(ball, turn, foot), pom),
        ]
    curl = [(0.1, -0.5), (0.02, -0.3), (0.16, -0.2), (0.24, -0.32)]
    return [
        *feelers,
        *_feet(_mixed(fluff, _DARK, 0.25), -0.3, 0.34, 0.64),
        _Shape("body", _ellipse(0.0, 0.08, 0.66, 0.62), fluff),
        _Shape("body", _ribbon(curl, 0.05, 0.03), _mixed(fluff, _DARK, 0.3), False),
        *_eye("body", -0.18, 0.0, 0.17),
        *_eye("body", 0.34, 0.0, 0.17),
        *(_Shape("body", _ellipse(x, 0.26, 0.1, 0.06), (240, 90, 120), False)
          for x in (-0.4, 0.52)),
        _smile("body", 0.1, 0.3, 0.1),
    ]  # fmt: skip


KINDS: dict[str, Callable[[np.random.Generator], list[_Shape]]] = {
    "Emberkit": _emberkit,
    "Galewing": _galewing,
    "Domeback": _domeback,
    "Budling": _budling,
    "Coilor": _coilor,
    "Hornhare": _hornhare,
    "Puffpom": _puffpom,
}
"""The kinds: name -> the shapes of one creature, in painter's order."""
