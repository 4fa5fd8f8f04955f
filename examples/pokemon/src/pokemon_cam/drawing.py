"""Drawing primitives for the creatures: outlines, colours and the features several kinds share.

Coordinates are ``(x, y)`` with y pointing down. A creature is drawn around the origin, facing
right, in units of about half its height.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Point = tuple[float, float]
Colour = tuple[int, int, int]

DARK: Colour = (38, 30, 42)
WHITE: Colour = (250, 250, 248)
CREAM: Colour = (250, 232, 196)
BROWN: Colour = (148, 98, 58)

_STEPS_PER_PIECE = 8


@dataclass(frozen=True)
class Shape:
    """A filled polygon that belongs to one part of a creature.

    Attributes:
        part: name of the part, such as ``"tail"``.
        points: corners of the polygon, shape ``(N, 2)``.
        colour: RGB colour of the filling, each channel in [0, 255].
        outlined: whether a dark line is drawn around the polygon.
    """

    part: str
    points: Points
    colour: Colour
    outlined: bool = True


# --- outlines ---


def ellipse(x: float, y: float, rx: float, ry: float, *, sides: int = 40) -> Points:
    """Return the corners of an ellipse; few sides give a stretched regular polygon.

    Args:
        x: centre, horizontally.
        y: centre, vertically.
        rx: horizontal radius.
        ry: vertical radius.
        sides: number of corners.

    Returns:
        The corners, shape ``(sides, 2)``.
    """
    angles = np.linspace(0, 2 * math.pi, sides, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def rotate(points: Points, degrees: float, pivot: Point = (0.0, 0.0)) -> Points:
    """Rotate points around a pivot.

    Args:
        points: shape ``(N, 2)``.
        degrees: angle; because y points down, positive angles turn clockwise.
        pivot: the point that stays in place.

    Returns:
        The rotated points, shape ``(N, 2)``.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotated: Points = (points - pivot) @ np.array([[cos, sin], [-sin, cos]]) + pivot
    return rotated


def rotate_shapes(shapes: Sequence[Shape], degrees: float, pivot: Point) -> list[Shape]:
    """Rotate several shapes around one pivot, so that they stay joined.

    Args:
        shapes: the shapes to rotate.
        degrees: angle as in `rotate`.
        pivot: the point that stays in place.

    Returns:
        The rotated shapes in the same order.
    """
    return [replace(s, points=rotate(s.points, degrees, pivot)) for s in shapes]


def curve(knots: Sequence[Point]) -> Points:
    """Interpolate an open Catmull-Rom curve.

    Args:
        knots: K points that the curve passes through.

    Returns:
        Points on the curve from the first to the last knot, shape ``(8 * (K - 1) + 1, 2)``.
    """
    # A piece between two knots also depends on their neighbours. The end knots have only one
    # neighbour, so they are repeated.
    p = np.array([knots[0], *knots, knots[-1]], dtype=np.float64)
    t = np.linspace(0, 1, _STEPS_PER_PIECE, endpoint=False)[:, None]
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


def blob(knots: Sequence[Point]) -> Points:
    """Interpolate a smooth closed outline.

    Args:
        knots: K points that the outline passes through, in order.

    Returns:
        The corners of the outline, shape ``(8 * K, 2)``.
    """
    # The knots are extended past both ends, which makes the outline smooth where it closes. The
    # first and the last piece of the extended curve repeat other pieces, so they are cut off.
    extended = [knots[-1], *knots, knots[0], knots[1]]
    return curve(extended)[_STEPS_PER_PIECE : -_STEPS_PER_PIECE - 1]


def ribbon(knots: Sequence[Point], start: float, end: float) -> Points:
    """Return the outline of a band along a curve.

    Args:
        knots: points that the middle of the band passes through.
        start: half of the band's width at the first knot.
        end: half of the band's width at the last knot; the width changes linearly in between.

    Returns:
        The corners of the band: down one side and back up the other.
    """
    spine = curve(knots)
    tangent = np.gradient(spine, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    # The small number keeps the division finite where neighbouring points coincide.
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half_width = np.linspace(start, end, len(spine))[:, None]
    # Go along one side and back along the other; otherwise the polygon would cross itself.
    return np.concatenate([spine + normal * half_width, (spine - normal * half_width)[::-1]])


# --- colours ---


def random_vivid_colour(rng: np.random.Generator, low: float, high: float) -> Colour:
    """Draw a saturated, bright colour from a range of hues.

    Args:
        rng: source of randomness.
        low: smallest hue in degrees.
        high: largest hue in degrees.

    Returns:
        The RGB colour.
    """
    return _hsv_to_rgb(rng.uniform(low, high), rng.uniform(0.6, 0.9), rng.uniform(0.78, 0.98))


def random_colour(rng: np.random.Generator) -> Colour:
    """Draw a colour of any hue, from greyish to vivid and from dark to bright.

    Args:
        rng: source of randomness.

    Returns:
        The RGB colour.
    """
    return _hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0.05, 0.8), rng.uniform(0.25, 0.95))


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """Mix two colours.

    Args:
        colour: first RGB colour.
        other: second RGB colour.
        share: weight of the second colour, in [0, 1].

    Returns:
        The mixed RGB colour.
    """
    red, green, blue = (
        round(a * (1 - share) + b * share) for a, b in zip(colour, other, strict=True)
    )
    return red, green, blue


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> Colour:
    # `colorsys` takes the hue as a fraction of the full circle.
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


# --- features that several kinds share ---


def eye(part: str, x: float, y: float, radius: float) -> list[Shape]:
    """Return the white of an eye, its pupil and a highlight.

    Args:
        part: the part that the eye belongs to.
        x: centre, horizontally.
        y: centre, vertically.
        radius: horizontal radius of the white.

    Returns:
        The three shapes, from back to front.
    """
    # The pupil sits right of the centre, because the creature looks to the right.
    return [
        Shape(part, ellipse(x, y, radius, 1.15 * radius), WHITE),
        Shape(part, ellipse(x + 0.2 * radius, y, 0.6 * radius, 0.8 * radius), DARK,
              outlined=False),
        Shape(part, ellipse(x + 0.4 * radius, y - 0.4 * radius, 0.25 * radius, 0.25 * radius),
              WHITE, outlined=False),
    ]  # fmt: skip


def smile(part: str, x: float, y: float, width: float) -> Shape:
    """Return a smiling mouth.

    Args:
        part: the part that the mouth belongs to.
        x: centre, horizontally.
        y: height of the corners of the mouth.
        width: half of the distance between the corners.

    Returns:
        The mouth as one shape.
    """
    knots = [(x - width, y), (x, y + 0.6 * width), (x + width, y)]
    return Shape(part, ribbon(knots, 0.025, 0.025), DARK, outlined=False)


def feet(colour: Colour, left: float, right: float, y: float) -> list[Shape]:
    """Return a pair of feet.

    Args:
        colour: their RGB colour.
        left: centre of the left foot, horizontally.
        right: centre of the right foot, horizontally.
        y: centre of both feet, vertically.

    Returns:
        One shape per foot.
    """
    return [Shape("feet", ellipse(x, y, 0.19, 0.12), colour) for x in (left, right)]
