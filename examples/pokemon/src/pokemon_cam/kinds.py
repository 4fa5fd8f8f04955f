"""The seven kinds of creatures; one function per kind returns the shapes of one creature.

All numbers are coordinates and lengths as `pokemon_cam.drawing` defines them. The shapes are listed
from back to front: later shapes are painted over earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pokemon_cam.drawing import (
    BROWN,
    CREAM,
    DARK,
    WHITE,
    Shape,
    blob,
    ellipse,
    eye,
    feet,
    mix,
    random_vivid_colour,
    ribbon,
    rotate,
    rotate_shapes,
    smile,
)


def _emberkit(rng: np.random.Generator) -> list[Shape]:
    """An orange kit with pointed ears and a tail that ends in a flame."""
    fur = random_vivid_colour(rng, 14, 34)
    swing = rng.uniform(-14, 14)
    root = (-0.3, 0.6)
    flame = [(-0.85, -0.12), (-1.1, -0.32), (-1.02, -0.6), (-0.93, -0.5), (-0.82, -0.9),
             (-0.72, -0.52), (-0.62, -0.58), (-0.6, -0.3)]  # fmt: skip
    flame_core = [(-0.85, -0.18), (-0.97, -0.34), (-0.84, -0.62), (-0.72, -0.34)]
    # The tail and its flame swing together around the root of the tail, which the body covers.
    tail = [
        Shape("tail", ribbon([root, (-0.75, 0.62), (-0.95, 0.2), (-0.85, -0.2)], 0.14, 0.07), fur),
        Shape("flame", blob(flame), (236, 72, 28)),
        Shape("flame", blob(flame_core), (255, 214, 64), outlined=False),
    ]
    return [
        *rotate_shapes(tail, swing, root),
        *feet(fur, -0.22, 0.3, 0.86),
        Shape("body", ellipse(0.02, 0.42, 0.4, 0.46), fur),
        Shape("body", ellipse(0.1, 0.5, 0.25, 0.32), CREAM, outlined=False),
        Shape("ears", np.array([(-0.22, -0.55), (-0.2, -1.05), (0.12, -0.74)]), fur),
        Shape("ears", np.array([(0.3, -0.76), (0.58, -1.08), (0.6, -0.56)]), fur),
        # The face is right of the middle, because the kit looks to the right.
        Shape("head", ellipse(0.2, -0.34, 0.5, 0.44), fur),
        Shape("head", ellipse(0.3, -0.16, 0.26, 0.18), CREAM, outlined=False),
        *eye("head", 0.02, -0.4, 0.11),
        *eye("head", 0.42, -0.4, 0.11),
        Shape("head", ellipse(0.31, -0.22, 0.06, 0.04), DARK, outlined=False),
        smile("head", 0.31, -0.13, 0.1),
    ]


def _galewing(rng: np.random.Generator) -> list[Shape]:
    """A drake with two wings, horns and a tail without a flame."""
    # The range of hues is the Emberkit's, so that colour alone does not tell the two apart.
    hide = random_vivid_colour(rng, 14, 34)
    membrane = mix(hide, (40, 60, 110), 0.62)
    flap = rng.uniform(-16, 16)
    near = [(-0.1, 0.1), (-0.35, -0.55), (-0.9, -1.0), (-1.25, -0.55), (-0.95, -0.5),
            (-1.05, -0.1), (-0.7, -0.15), (-0.65, 0.22), (-0.35, 0.1)]  # fmt: skip
    far = [(0.1, 0.1), (0.35, -0.5), (0.8, -0.95), (1.2, -0.45), (0.9, -0.42), (0.98, -0.05),
           (0.66, -0.1), (0.6, 0.24), (0.32, 0.14)]  # fmt: skip
    return [
        # Opposite angles make both wings rise or sink together.
        Shape("wings", rotate(np.array(near), flap, near[0]), membrane),
        Shape("wings", rotate(np.array(far), -flap, far[0]), membrane),
        Shape("tail", ribbon([(-0.1, 0.7), (-0.55, 0.95), (-0.98, 0.74)], 0.15, 0.04), hide),
        *feet(hide, -0.18, 0.24, 0.98),
        Shape("body", ellipse(0.0, 0.48, 0.34, 0.52), hide),
        Shape("body", ellipse(0.06, 0.55, 0.2, 0.38), CREAM, outlined=False),
        # The horns come before the head, which covers their lower ends.
        Shape("horns", np.array([(-0.02, -0.62), (-0.3, -0.98), (0.14, -0.74)]), CREAM),
        Shape("horns", np.array([(0.16, -0.74), (0.1, -1.12), (0.34, -0.74)]), CREAM),
        Shape("head", ribbon([(0.02, 0.25), (0.04, -0.2), (0.14, -0.5)], 0.2, 0.17), hide),
        Shape("head", blob([(-0.1, -0.5), (0.12, -0.78), (0.4, -0.66), (0.74, -0.5),
                            (0.72, -0.34), (0.3, -0.3), (0.02, -0.3)]), hide),
        *eye("head", 0.24, -0.57, 0.09),
        Shape("head", ellipse(0.66, -0.48, 0.03, 0.03), DARK, outlined=False),
        Shape("head", ribbon([(0.34, -0.38), (0.52, -0.36), (0.68, -0.4)], 0.02, 0.02), DARK,
              outlined=False),
    ]  # fmt: skip


def _domeback(rng: np.random.Generator) -> list[Shape]:
    """A blue creature on legs, under a domed shell."""
    skin = random_vivid_colour(rng, 188, 216)
    shell = mix(BROWN, (96, 110, 60), rng.uniform(0, 0.6))
    nod = rng.uniform(-14, 14)
    neck = (0.5, 0.2)
    head = [
        Shape("head", ribbon([neck, (0.7, 0.05), (0.82, -0.1)], 0.2, 0.18), skin),
        Shape("head", ellipse(0.9, -0.2, 0.34, 0.31), skin),
        *eye("head", 1.0, -0.26, 0.11),
        smile("head", 1.04, -0.06, 0.1),
    ]
    plates = [(-0.5, -0.02), (-0.05, -0.02), (-0.28, -0.34), (0.16, -0.3)]
    return [
        Shape("tail", ribbon([(-0.75, 0.3), (-1.02, 0.28), (-1.1, 0.05)], 0.12, 0.05), skin),
        # There is no body: the shell covers the upper ends of the legs, the tail and the neck.
        *(Shape("legs", ribbon([(x, 0.2), (x, 0.62)], 0.17, 0.15), skin)
          for x in (-0.55, -0.15, 0.42)),
        *rotate_shapes(head, nod, neck),
        Shape("shell", blob([(-0.9, 0.3), (-0.8, -0.25), (-0.42, -0.6), (0.05, -0.62),
                             (0.46, -0.3), (0.62, 0.3)]), shell),
        # The plates of the shell are hexagons; a light rim runs along its lower edge.
        *(Shape("shell", ellipse(x, y, 0.17, 0.14, sides=6), mix(shell, CREAM, 0.35))
          for x, y in plates),
        Shape("shell", ribbon([(-0.95, 0.26), (-0.15, 0.36), (0.68, 0.26)], 0.09, 0.09), CREAM),
    ]  # fmt: skip


def _budling(rng: np.random.Generator) -> list[Shape]:
    """A green seed with a sprout of two leaves on its head."""
    skin = random_vivid_colour(rng, 88, 138)
    leaf = mix(skin, (20, 90, 40), 0.5)
    vein = mix(leaf, WHITE, 0.5)
    sway = rng.uniform(-16, 16)
    root = (0.0, -0.38)
    right = [(0.02, -0.72), (0.22, -1.1), (0.62, -1.18), (0.72, -0.96), (0.4, -0.72)]
    left = [(-0.02, -0.72), (-0.26, -1.02), (-0.62, -1.04), (-0.7, -0.8), (-0.38, -0.66)]
    # The stem and both leaves sway around the lower end of the stem, which the body covers.
    sprout = [
        Shape("sprout", ribbon([root, (0.0, -0.76)], 0.06, 0.05), leaf),
        Shape("sprout", blob(right), leaf),
        Shape("sprout", blob(left), leaf),
        Shape("sprout", ribbon([(0.05, -0.76), (0.3, -0.94), (0.6, -1.04)], 0.02, 0.02), vein,
              outlined=False),
        Shape("sprout", ribbon([(-0.05, -0.74), (-0.3, -0.86), (-0.6, -0.88)], 0.02, 0.02), vein,
              outlined=False),
    ]  # fmt: skip
    return [
        *rotate_shapes(sprout, sway, root),
        *feet(BROWN, -0.24, 0.3, 0.74),
        # The body is also the head: it carries the eyes, the mouth and the cheeks.
        Shape("body", blob([(0.0, -0.5), (0.5, -0.2), (0.62, 0.3), (0.34, 0.7), (-0.3, 0.7),
                            (-0.6, 0.3), (-0.48, -0.2)]), skin),
        Shape("body", ellipse(0.08, 0.4, 0.32, 0.24), mix(skin, CREAM, 0.6), outlined=False),
        *eye("body", -0.12, -0.02, 0.13),
        *eye("body", 0.3, -0.02, 0.13),
        smile("body", 0.1, 0.22, 0.12),
        *(Shape("body", ellipse(x, 0.18, 0.08, 0.05), (240, 140, 130), outlined=False)
          for x in (-0.3, 0.47)),
    ]  # fmt: skip


def _coilor(rng: np.random.Generator) -> list[Shape]:
    """A serpent with a coiled body, a frill and a rattle."""
    # The range of hues is the Budling's, so that colour alone does not tell the two apart.
    scales = random_vivid_colour(rng, 88, 138)
    stripe = mix(scales, (250, 240, 90), 0.55)
    lean = rng.uniform(-12, 12)
    root = (0.05, 0.3)
    frill = [(0.2, -0.4), (-0.12, -0.42), (-0.3, -0.7), (-0.08, -0.78), (-0.06, -1.08),
             (0.16, -0.96), (0.34, -1.16), (0.44, -0.86)]  # fmt: skip
    front = [
        Shape("frill", np.array(frill), (206, 70, 96)),
        Shape("neck", ribbon([root, (-0.12, -0.05), (0.08, -0.36), (0.2, -0.6)], 0.19, 0.16),
              scales),
        Shape("neck", ribbon([(0.1, 0.26), (-0.04, -0.05), (0.16, -0.36)], 0.06, 0.05), stripe,
              outlined=False),
        # The tongue comes before the head, which covers its inner end.
        Shape("head", ribbon([(0.6, -0.56), (0.8, -0.52), (0.9, -0.44)], 0.025, 0.02),
              (200, 30, 60), outlined=False),
        Shape("head", blob([(0.02, -0.7), (0.24, -0.9), (0.54, -0.78), (0.7, -0.6),
                            (0.52, -0.46), (0.12, -0.46)]), scales),
        *eye("head", 0.36, -0.7, 0.1),
    ]  # fmt: skip
    beads = [(-0.8, 0.42, 0.13), (-0.92, 0.24, 0.11), (-0.98, 0.06, 0.09), (-1.0, -0.1, 0.07)]
    return [
        *(Shape("rattle", ellipse(x, y, r, r), CREAM) for x, y, r in beads),
        # Three loops lie on top of each other, the smallest last.
        Shape("coil", ellipse(0.02, 0.66, 0.82, 0.25), scales),
        Shape("coil", ribbon([(-0.7, 0.72), (0.0, 0.84), (0.74, 0.72)], 0.04, 0.04), stripe,
              outlined=False),
        Shape("coil", ellipse(0.02, 0.42, 0.62, 0.22), scales),
        Shape("coil", ribbon([(-0.5, 0.47), (0.0, 0.57), (0.54, 0.47)], 0.04, 0.04), stripe,
              outlined=False),
        Shape("coil", ellipse(0.02, 0.24, 0.4, 0.16), scales),
        *rotate_shapes(front, lean, root),
    ]  # fmt: skip


def _hornhare(rng: np.random.Generator) -> list[Shape]:
    """A yellow hare with long ears, antlers between them and a cotton tail."""
    fur = random_vivid_colour(rng, 44, 58)
    inner = mix(fur, WHITE, 0.7)
    fold = rng.uniform(-14, 14)
    ears = []
    # The ears are defined upright. Each is tilted outwards by 46 degrees, and both by the fold.
    for x, degrees in ((-0.16, fold - 46), (0.42, fold + 46)):
        ear = [
            Shape("ears", ellipse(x, -0.96, 0.16, 0.52), fur),
            Shape("ears", ellipse(x, -0.96, 0.07, 0.38), inner, outlined=False),
        ]
        ears += rotate_shapes(ear, degrees, (x, -0.5))
    # An antler is a beam with one branch; the second is the mirror image of the first about x=0.13.
    antlers = [
        Shape("antlers", ribbon(knots, 0.055, 0.035), BROWN)
        for side in (-1, 1)
        for knots in (
            [(0.13 + 0.1 * side, -0.58), (0.13 + 0.2 * side, -0.9), (0.13 + 0.16 * side, -1.24)],
            [(0.13 + 0.2 * side, -0.88), (0.13 + 0.38 * side, -1.04), (0.13 + 0.4 * side, -1.2)],
        )
    ]
    return [
        Shape("tail", blob([(-0.34, 0.42), (-0.52, 0.36), (-0.6, 0.52), (-0.68, 0.66),
                            (-0.5, 0.76), (-0.34, 0.76)]), WHITE),
        Shape("body", ellipse(0.0, 0.44, 0.38, 0.46), fur),
        Shape("body", ellipse(0.1, 0.48, 0.2, 0.3), inner, outlined=False),
        # A hare's feet are longer than those that `feet` draws.
        Shape("feet", ellipse(-0.1, 0.9, 0.3, 0.12), fur),
        Shape("feet", ellipse(0.36, 0.88, 0.28, 0.12), fur),
        *ears,
        *antlers,
        Shape("head", ellipse(0.14, -0.28, 0.42, 0.38), fur),
        Shape("head", ellipse(0.22, -0.12, 0.22, 0.17), inner, outlined=False),
        *eye("head", 0.0, -0.34, 0.1),
        *eye("head", 0.36, -0.34, 0.1),
        # The nose, and below it the front teeth.
        Shape("head", ellipse(0.22, -0.2, 0.05, 0.04), (214, 110, 120), outlined=False),
        Shape("head", np.array([(0.17, -0.06), (0.27, -0.06), (0.27, 0.06), (0.17, 0.06)]),
              WHITE),
    ]  # fmt: skip


def _puffpom(rng: np.random.Generator) -> list[Shape]:
    """A pink ball with two feelers, each of which carries a pompom."""
    fluff = random_vivid_colour(rng, 318, 342)
    pom = mix(fluff, WHITE, 0.6)
    feelers = []
    # Each feeler has an angle of its own, unlike the ears of the Hornhare.
    for side in (-1, 1):
        root = (side * 0.22, -0.4)
        feeler = [
            Shape("feelers", ribbon([root, (side * 0.3, -0.8), (side * 0.56, -1.02)], 0.05, 0.04),
                  fluff),
            Shape("feelers", ellipse(side * 0.6, -1.04, 0.19, 0.19), pom),
        ]  # fmt: skip
        feelers += rotate_shapes(feeler, rng.uniform(-12, 12), root)
    curl = [(0.1, -0.5), (0.02, -0.3), (0.16, -0.2), (0.24, -0.32)]
    return [
        *feelers,
        *feet(mix(fluff, DARK, 0.25), -0.3, 0.34, 0.64),
        Shape("body", ellipse(0.0, 0.08, 0.66, 0.62), fluff),
        Shape("body", ribbon(curl, 0.05, 0.03), mix(fluff, DARK, 0.3), outlined=False),
        *eye("body", -0.18, 0.0, 0.17),
        *eye("body", 0.34, 0.0, 0.17),
        *(Shape("body", ellipse(x, 0.26, 0.1, 0.06), (240, 90, 120), outlined=False)
          for x in (-0.4, 0.52)),
        smile("body", 0.1, 0.3, 0.1),
    ]  # fmt: skip


KINDS: dict[str, Callable[[np.random.Generator], list[Shape]]] = {
    "Emberkit": _emberkit,
    "Galewing": _galewing,
    "Domeback": _domeback,
    "Budling": _budling,
    "Coilor": _coilor,
    "Hornhare": _hornhare,
    "Puffpom": _puffpom,
}
"""Maps the name of each kind to the function that returns the shapes of one creature."""
