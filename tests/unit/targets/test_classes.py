"""Targets of classes: probabilities, negatives, contrasts and finer differences."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import camkit
from camkit import targets
from camkit.targets import bind
from helpers.families import Plain, tiny
from helpers.outputs import FIRST, OTHER, scores


def softmaxed(row: list[float], c: int) -> float:
    return math.exp(row[c]) / sum(math.exp(value) for value in row)


@pytest.mark.parametrize(
    ("make", "one"),
    [(targets.probability, softmaxed), (targets.negative, lambda row, c: -row[c])],
    ids=["probability", "negative"],
)
@pytest.mark.parametrize(
    ("classes", "settled"),
    [(None, [1, 0]), (2, [2, 2]), ([2, 1], [2, 1]), ([[0, 1], [2, 2]], [[0, 1], [2, 2]])],
)
def test_formulas_of_the_logits(make: Any, one: Any, classes: Any, settled: Any) -> None:
    def literal(output: Tensor) -> Tensor:
        rows = zip(output.tolist(), settled, strict=True)
        return torch.tensor(
            [[one(r, c) for c in cs] if isinstance(cs, list) else one(r, cs) for r, cs in rows]
        )

    target = make(classes)
    bound = bind(target, FIRST, 2)
    for output in (FIRST, OTHER):  # OTHER is scored for the classes that FIRST predicts
        assert_close(bound.score(output), literal(output))
    assert_close(target(FIRST), literal(FIRST))


@pytest.mark.parametrize(
    ("classes", "against", "expected"),
    [
        (1, 2, [3, -3]),
        ([1, 0], [2, 1], [3, 7]),
        (None, 0, [4, 0]),
        (0, None, [-4, 0]),
        (0, [[1, 2], [1, 1]], [1 - 3.5, 7]),
        ([[0, 1], [2, 2]], 0, [[0, 4], [-4, -4]]),
        ([[0, 1], [2, 1]], [2, 1], [[-1, 3], [3, 0]]),
        ([[0, 1], [2, 1]], [[0, 2], [0, 1]], [[-0.5, 3.5], [-0.5, -3.5]]),
    ],
)
def test_contrast(classes: Any, against: Any, expected: Any) -> None:
    target = targets.contrast(classes, against)
    assert scores(target, FIRST, 2)[0].tolist() == expected
    assert target(FIRST).tolist() == expected


def finer_by_loops(
    first: Tensor, output: Tensor, classes: list[list[int]], share: float, similar: int
) -> list[list[float]]:
    def one(near: list[float], row: list[float], c: int) -> float:
        others = sorted((abs(near[j] - near[c]), j) for j in range(len(near)) if j != c)[:similar]
        return row[c] - share * sum(row[j] for _, j in others) / len(others)

    rows = zip(first.tolist(), output.tolist(), classes, strict=True)
    return [[one(near, row, c) for c in several] for near, row, several in rows]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31 - 1), st.integers(2, 7), st.integers(1, 9), st.floats(0, 2), st.integers(1, 3))
def test_finer_takes_off_the_nearest_classes_of_the_first_pass(
    seed: int, classes: int, similar: int, share: float, several: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, output = torch.randn(2, 4, classes, generator=generator).double()
    chosen = torch.randint(classes, (4, several), generator=generator)
    target = targets.finer(chosen, share=share, similar=similar)
    bound = bind(target, first, 4)
    for now in (first, output):
        expected = torch.tensor(finer_by_loops(first, now, chosen.tolist(), share, similar)).double()
        assert_close(bound.score(now), expected)
        assert_close(bind(bound.target, now, 4).score(now), expected)


def test_finer_by_default() -> None:
    """By default 0.6 times the mean of the three nearest logits is subtracted from the predicted class's."""
    logits = torch.tensor([[1.0, 9.0, 2.0, 7.0, 6.0]])
    bound = bind(targets.finer(), logits, 1)
    assert bound.score(logits).tolist() == pytest.approx([9 - 0.6 * (7 + 6 + 2) / 3])
    assert bound.score(logits.flip(1)).tolist() == pytest.approx([7 - 0.6 * (9 + 2 + 1) / 3])


def test_maps_are_linear_in_the_score() -> None:
    """HiResCAM's map of a formula is the sum of the maps of all classes, weighted by its derivatives."""
    model, x = tiny(Plain), torch.randn(3, 3, 12, 10).double()
    method = camkit.HiResCAM(model)
    every = method(x, [[0, 1, 2, 3]] * 3)
    p, one = every.output.softmax(1), torch.eye(4).double()
    for target, weights in [
        (targets.negative([2, 1, 0]), -one[[2, 1, 0]]),
        (targets.contrast(1, 3), (one[1] - one[3]).expand(3, 4)),
        (targets.contrast([0, 1, 3], [[0, 2]] * 3), one[[0, 1, 3]] - (one[0] + one[2]) / 2),
        (targets.finer(2, share=0.3), one[[2] * 3] - 0.1 * (1 - one[2])),
        (targets.probability(2), p[:, 2:3] * (one[2] - p)),
    ]:
        expected = torch.einsum("nk,nkhw->nhw", weights, every.maps)
        assert_close(method(x, target).maps, expected, rtol=1e-9, atol=1e-15)


def test_other_passes_keep_the_similar_classes_of_the_first() -> None:
    model, x = tiny(Plain), torch.randn(3, 3, 12, 10).double()
    with torch.no_grad():
        y = model(x)
    classes = y.argmax(1).tolist()
    pairs = list(zip(y.tolist(), classes, strict=True))
    nearest = [min((abs(row[j] - row[c]), j) for j in range(4) if j != c)[1] for row, c in pairs]
    for method in (camkit.AblationCAM(model), camkit.ScoreCAM(model)):
        explained = method(x, targets.finer(similar=1))
        expected = method(x, lambda z: z[range(3), classes] - 0.6 * z[range(3), nearest])
        assert expected.maps.amax() > 0
        assert_close(explained.maps, expected.maps)
    assert_close(method(x, targets.probability()).maps, method(x).maps)  # Score-CAM always uses probabilities
