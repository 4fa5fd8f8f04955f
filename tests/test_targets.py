from typing import Any

import numpy as np
import pytest
import torch

from camkit.targets import bind


def scores(target: Any, output: Any, count: int) -> tuple[torch.Tensor, Any]:
    bound = bind(target, output, count)
    return bound.score(output), bound.target


LOGITS = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    ("target", "expected", "reported"),
    [
        (None, [5, 7], [1, 0]),
        (2, [2, 3], [2, 2]),
        (np.int64(2), [2, 3], [2, 2]),
        ([2, 1], [2, 0], [2, 1]),
        ((2, 1), [2, 0], [2, 1]),
        (np.array([2, 1]), [2, 0], [2, 1]),
        (np.array([2, 1], np.uint16), [2, 0], [2, 1]),
        (torch.tensor([2, 1]), [2, 0], [2, 1]),
        (torch.tensor([2, 1], dtype=torch.int8), [2, 0], [2, 1]),
        ([[0, 1], [2, 2]], [[1, 5], [3, 3]], [[0, 1], [2, 2]]),
    ],
)
def test_classes(target: Any, expected: Any, reported: Any) -> None:
    values, indices = scores(target, LOGITS, 2)
    assert values.tolist() == expected
    assert indices.tolist() == reported


def test_a_function() -> None:
    def contrast(output: torch.Tensor) -> torch.Tensor:
        return output[:, 0] - output[:, 1]

    values, reported = scores(contrast, LOGITS, 2)
    assert values.tolist() == [-4, 7]
    assert reported is contrast


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (3, ValueError, "target: expected a class index in [0, 3), got 3"),
        (-1, ValueError, "target: expected a class index in [0, 3), got -1"),
        ([0, 9], ValueError, "target: expected a class index in [0, 3), got 9"),
        ([0], ValueError, "target: expected one target, 2 targets or 2 x K targets for 2 images, got 1"),
        (
            [0, 1, 2],
            ValueError,
            "target: expected one target, 2 targets or 2 x K targets for 2 images, got 3",
        ),
        (
            [[0, 1]],
            ValueError,
            "target: expected one target, 2 targets or 2 x K targets for 2 images, got 1 x 2",
        ),
        (
            [[], []],
            ValueError,
            "target: expected one target, 2 targets or 2 x K targets for 2 images, got 2 x 0",
        ),
        (
            [[0, 1], [2]],
            TypeError,
            "target: expected an int, N ints, N x K ints, a key or a function of the output, got [[",
        ),
        (
            "cat",
            TypeError,
            "target: expected an output that has 'cat', got an output of type Tensor",
        ),
        (1.0, TypeError, "target: expected integers, got torch.float64"),
        (True, TypeError, "target: expected integers, got torch.bool"),
        (lambda o: 3, TypeError, "target: expected a function that returns a tensor, got int"),
        (
            lambda o: o.sum(),
            ValueError,
            "target: expected a function that returns 2 or 2 x K scores for 2 images, got a",
        ),
        (
            lambda o: o[:1, 0],
            ValueError,
            "target: expected a function that returns 2 or 2 x K scores for 2 images, got 1",
        ),
    ],
)
def test_wrong_targets(target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        scores(target, LOGITS, 2)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(2, 3, 4, 4), "an output of 2 x 3 x 4 x 4"),
        ({"out": LOGITS}, "an output of type dict"),
        ((LOGITS, LOGITS), "an output of type tuple"),
    ],
)
def test_outputs_that_have_no_classes(output: Any, got: str) -> None:
    with pytest.raises(TypeError) as raised:
        scores(0, output, 2)
    assert str(raised.value).startswith(f"target: expected a model with logits (N, classes), got {got}; give")
