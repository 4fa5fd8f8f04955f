import numpy as np
import pytest
import torch

from pokemon_cam.creatures import bounding_box, draw_background, draw_creature, draw_set
from pokemon_cam.kinds import KINDS

SIZE = 96
INDICES = range(14)  # Two creatures of each kind.


def test_picture_is_reproducible_and_changes_with_the_seed() -> None:
    first, again, other = (draw_creature(3, seed=s, size=SIZE) for s in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.mask.tobytes() == again.mask.tobytes()
    assert (first.image != other.image).any()


def test_picture_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = (draw_set(n, seed=1, size=48) for n in (8, 15))
    assert torch.equal(few.images, many.images[:8])
    assert few.masks is not None and many.masks is not None
    assert torch.equal(few.masks, many.masks[:8])
    # The kinds alternate.
    assert many.labels.tolist() == [i % 7 for i in range(15)]
    assert len({image.numpy().tobytes() for image in many.images}) == 15


@pytest.mark.parametrize("index", INDICES)
def test_only_pixels_in_the_mask_belong_to_the_creature(index: int) -> None:
    creature = draw_creature(index, seed=0, size=SIZE)
    changed = (creature.image != draw_background(index, seed=0, size=SIZE)).any(axis=-1)
    assert not (changed & ~creature.mask).any()
    # The creature's colour can equal the background at a few pixels by chance.
    assert changed[creature.mask].mean() > 0.98


@pytest.mark.parametrize("index", INDICES)
def test_parts_make_up_the_mask(index: int) -> None:
    creature = draw_creature(index, seed=0, size=SIZE)
    assert np.array_equal(np.any(list(creature.parts.values()), axis=0), creature.mask)
    for name, part in creature.parts.items():
        assert part.any(), name
        assert not (part & ~creature.mask).any(), name


@pytest.mark.parametrize("index", INDICES)
def test_boxes_are_tight(index: int) -> None:
    creature = draw_creature(index, seed=0, size=SIZE)
    boxes = [(creature.box, creature.mask)]
    boxes += [(creature.part_boxes[name], mask) for name, mask in creature.parts.items()]
    for (left, top, right, bottom), mask in boxes:
        inside = mask[top:bottom, left:right]
        assert inside.sum() == mask.sum()
        # A box that could shrink would have an empty row or column at an edge.
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()


@pytest.mark.parametrize("seed", range(5))
def test_whole_creature_is_inside_the_picture(seed: int) -> None:
    # A creature that is cut off would touch the border of the picture.
    for index in range(7):
        mask = draw_creature(index, seed=seed, size=64).mask
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_box_of_a_known_mask() -> None:
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 3] = mask[4, 5] = True
    assert bounding_box(mask) == (3, 2, 6, 5)
    with pytest.raises(ValueError, match="mask: expected at least one true pixel"):
        bounding_box(np.zeros((4, 4), dtype=bool))


def test_kinds_differ_by_their_parts() -> None:
    parts = [frozenset(draw_creature(i, seed=0, size=SIZE).parts) for i in range(7)]
    assert len(set(parts)) == 7


@pytest.mark.parametrize(("one", "other"), [("Emberkit", "Galewing"), ("Budling", "Coilor")])
def test_some_kinds_share_their_colour(one: str, other: str) -> None:
    def outlined_colours(kind: str) -> set[tuple[int, int, int]]:
        return {shape.colour for shape in KINDS[kind](np.random.default_rng(0)) if shape.outlined}

    # Brown and cream parts occur in many kinds; only saturated colours identify a kind.
    def saturated(colours: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
        return {c for c in colours if max(c) - min(c) > 100}

    assert saturated(outlined_colours(one)) & saturated(outlined_colours(other))
    assert not saturated(outlined_colours(one)) & saturated(outlined_colours("Domeback"))


def test_poses_vary() -> None:
    # Every seventh picture shows the same kind, the Emberkit.
    creatures = [draw_creature(7 * i, seed=0, size=64) for i in range(12)]
    heights = {c.box[3] - c.box[1] for c in creatures}
    lefts = {c.box[0] for c in creatures}
    # The creature is mirrored at random, so the flame is on either side of the head.
    flame_is_left = {c.part_boxes["flame"][0] < c.part_boxes["head"][0] for c in creatures}
    assert len(heights) > 5 and len(lefts) > 5
    assert flame_is_left == {True, False}


@pytest.mark.parametrize(
    ("index", "seed", "size", "message"),
    [
        (-1, 0, 64, "index: expected at least 0, got -1"),
        (0, -2, 64, "seed: expected at least 0, got -2"),
        (0, 0, 8, "size: expected at least 32, got 8"),
    ],
)
def test_invalid_numbers_are_reported(index: int, seed: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_creature(index, seed=seed, size=size)


def test_empty_set_is_rejected() -> None:
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        draw_set(0, seed=0, size=64)
