"""Targets bound to a first output: their scores, their classes, and the targets that are refused."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import camkit
from camkit import targets
from camkit.targets import bind, binding, key
from helpers.families import Plain, tiny
from helpers.outputs import (
    FIRST,
    LOGITS,
    MASK,
    OTHER,
    SEGMENTED,
    A,
    Named,
    Output,
    Wrap,
    Wrapped,
    detections,
    refused,
    scores,
)


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


#: Outputs that hold logits next to features: a function that makes the output, and one that wraps a target in
#: the key of the logits.
KINDS: dict[str, tuple[Wrap, Callable[[Any], Any]]] = {
    "dict": (lambda f, y: {"features": f, "logits": y}, lambda t: key("logits", t)),
    "integer keys": (lambda f, y: {0: y, 1: f}, lambda t: key(0, t)),
    "tuple": (lambda f, y: (f, y), lambda t: key(1, t)),
    "list": (lambda f, y: [f, y], lambda t: key(-1, t)),
    "dataclass": (Output, lambda t: key("logits", t)),
    "namedtuple": (Named, lambda t: key("logits", t)),
    "namedtuple by index": (Named, lambda t: key(1, t)),
    "nested": (
        lambda f, y: {"a": (f, Output(f, y)), "b": f},
        lambda t: key("a", key(1, key("logits", t))),
    ),
}
kinds = pytest.mark.parametrize(("wrap", "keyed"), KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize(
    "target",
    [
        None,
        2,
        [[0, 1], [2, 2]],
        lambda y: y[:, 2] - y[:, 0],
        targets.probability(),
        targets.negative(),
        targets.contrast(None, 2),
        targets.contrast(1, None),
        targets.finer(similar=1),
    ],
)
def test_an_entry_is_scored_as_if_it_were_the_output(wrap: Wrap, keyed: Any, target: Any) -> None:
    inside, outside = bind(target, FIRST, 2), bind(keyed(target), wrap(torch.zeros(2), FIRST), 2)
    for logits in (FIRST, OTHER):
        assert torch.equal(outside.score(wrap(torch.zeros(2), logits)), inside.score(logits))
    assert (outside.plain_classes is None) == (inside.plain_classes is None)
    if inside.plain_classes is not None:
        assert torch.equal(
            outside.with_formula(binding.softmax)(wrap(OTHER, FIRST)).reshape(-1),
            (FIRST.softmax(1).gather(1, inside.plain_classes.reshape(2, -1)).reshape(-1)),
        )


@pytest.mark.parametrize(
    "target",
    [
        None,
        targets.probability(),
        targets.negative(),
        targets.contrast(None, 2),
        targets.contrast(1, None),
        targets.finer(similar=1),
    ],
)
@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"logits": y}], ids=["logits", "dict"])
def test_a_reported_target_explains_the_same_again(target: Any, wrap: Any) -> None:
    """The classes of the first output stay, although the other output predicts other ones."""
    given = target if wrap(0) == 0 else key("logits", target)
    first, other = wrap(FIRST), wrap(OTHER)
    bound = bind(given, first, 2)
    again = bind(bound.target, other, 2)
    assert torch.equal(again.score(other), bound.score(other))
    assert not torch.equal(again.score(other), bind(given, other, 2).score(other))
    assert bind(bound, other, 2) is bound


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"logits": y}], ids=["logits", "dict"])
@pytest.mark.parametrize(
    ("target", "about"),
    [
        (None, [1, 0]),
        ([2, 1], [2, 1]),
        (targets.probability(), [1, 0]),
        (targets.negative([[0, 1], [2, 2]]), [[0, 1], [2, 2]]),
        (targets.contrast(None, 2), [1, 0]),
        (targets.finer(2), [2, 2]),
    ],
)
def test_the_classes_that_a_target_is_about(target: Any, about: Any, wrap: Any) -> None:
    bound = bind(key("logits", target) if wrap(0) != 0 else target, wrap(FIRST), 2)
    assert bound.classes is not None
    assert bound.classes.tolist() == about


def test_a_function_is_about_no_class() -> None:
    assert bind(lambda y: y[:, 0], FIRST, 2).classes is None
    assert bind(targets.similarity(torch.ones(3)), FIRST, 2).classes is None


def test_the_key_alone_is_short_for_the_predicted_class_of_that_entry() -> None:
    values, reported = scores("logits", {"logits": FIRST}, 2)
    assert values.tolist() == [5, 7]
    assert bind(reported, {"logits": OTHER}, 2).score({"logits": OTHER}).tolist() == [0, 0]


def test_a_target_is_a_function_too() -> None:
    assert targets.finer(similar=1)(FIRST).tolist() == pytest.approx([5 - 0.6 * 2, 7 - 0.6 * 3])
    assert key("logits", 2)({"logits": FIRST, "more": 0, "most": 0}).tolist() == [2, 3]
    assert key("a", key("logits"))({"a": {"logits": FIRST}}).tolist() == [5, 7]


@pytest.mark.parametrize(
    ("target", "entry"),
    [
        (key("logits", lambda y: y[:, 0]), {"logits": FIRST}),
        (key("logits", lambda y: y[:, 0]), {"loss": torch.tensor(3.0), "logits": FIRST}),
        (key("logits", lambda y: y[:, 0]), {"more": torch.zeros(5, 2), "logits": FIRST}),
        (targets.box(A, 1), [detections((A, 1, 1.0)), detections((A, 1, 7.0))]),
    ],
)
def test_a_key_is_a_function_too_whatever_its_entry_is(target: Any, entry: Any) -> None:
    assert key("a", target)({"a": entry}).tolist() == [1, 7]


HALF_EMPTY = torch.stack([MASK, MASK & ~MASK])
CORNERS = "corners: expected (x1, y1, x2, y2) with x1 < x2 and y1 < y2, or one such per image, got "
DETECTOR = "target: expected a detector, whose output per image is a dict with boxes, labels and scores, got "
TWO = "target: expected a model with two classes or more to compare, got 1"


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (targets.finer, FIRST[:, :1], TWO),
        (lambda: targets.contrast(0, 0), FIRST[:, :1], TWO),
        (lambda: targets.contrast(0, 5), FIRST, "target: expected a class index in [0, 3), got 5"),
        (lambda: targets.negative(-1), FIRST, "target: expected a class index in [0, 3), got -1"),
        (
            lambda: targets.contrast([0, 1, 2], 0),
            FIRST,
            "target: expected one target, 2 targets or 2 x K targets for 2 images, got 3",
        ),
        (lambda: targets.finer(similar=0), None, "similar: expected a positive number, got 0"),
        (lambda: targets.finer(share=-0.1), None, "share: expected a finite number, zero or more, got -0.1"),
        (
            lambda: targets.pixels(MASK.float(), 1),
            None,
            "mask: expected bools (H, W) or (N, H, W), got torch.float32, 2 x 3",
        ),
        (
            lambda: targets.pixels(MASK[None, None], 1),
            None,
            "mask: expected bools (H, W) or (N, H, W), got torch.bool, 1 x 1 x 2 x 3",
        ),
        (
            lambda: targets.pixels(HALF_EMPTY, 1),
            None,
            "mask: expected at least one pixel per image, got an empty mask",
        ),
        (
            lambda: targets.pixels(MASK.T, 1),
            SEGMENTED,
            "mask: expected the output's size 2 x 3, for all or each of 2 images, got 3 x 2",
        ),
        (lambda: targets.pixels(MASK, 3), SEGMENTED, "category: expected a category in [0, 3), got 3"),
        (lambda: targets.pixels(MASK, -1), SEGMENTED, "category: expected a category in [0, 3), got -1"),
        (lambda: targets.box((0, 0, 0, 1), 1), None, CORNERS + "[0, 0, 0, 1]"),
        (lambda: targets.box((0, 2, 1, 1), 1), None, CORNERS + "[0, 2, 1, 1]"),
        (lambda: targets.box((0, 0, 1), 1), None, CORNERS + "[0, 0, 1]"),
        (
            lambda: targets.box(torch.tensor([A, A, A]), 1),
            [detections(), detections()],
            "corners: expected 2 boxes, got 3",
        ),
        (
            lambda: targets.similarity(torch.ones(2)),
            FIRST,
            "target: expected a model with output (N, D) for an embedding of 2, got 2 x 3",
        ),
        (
            lambda: targets.similarity(torch.ones(3)),
            [FIRST],
            "target: expected a model with output (N, D) for an embedding of 3, got list",
        ),
    ],
)
def test_values_that_targets_refuse(make: Any, output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refused(make, output)


def has_not(name: object, got: str) -> str:
    return f"target: expected an output that has {name!r}, got an output of type {got}"


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (lambda: targets.probability(1.5), FIRST, "target: expected integers, got torch.float64"),  # type: ignore[arg-type]
        (lambda: targets.finer(similar=1.0), None, "similar: expected an int, got float"),  # type: ignore[arg-type]
        (lambda: targets.similarity([1.0]), None, "embedding: expected a tensor, got list"),  # type: ignore[arg-type]
        (
            lambda: targets.pixels(MASK, 1),
            FIRST,
            "target: expected a model with output (N, classes, H, W), got 2 x 3; of a dict of outputs ",
        ),
        (
            lambda: targets.pixels(MASK, 1),
            {"out": SEGMENTED},
            "target: expected a model with output (N, classes, H, W), got dict; of a dict of outputs ",
        ),
        (lambda: targets.box(A, 1), FIRST, DETECTOR + "Tensor"),
        (lambda: targets.box(A, 1), detections(), DETECTOR + "dict"),
        (lambda: targets.box(A, 1), [detections(), {"boxes": FIRST, "scores": FIRST}], DETECTOR + "list"),
        (lambda: "x", {"a": 1, 2: FIRST}, has_not("x", "dict with 'a', 2")),
        (lambda: key("x"), Named(FIRST, FIRST), has_not("x", "Named with 'features', 'logits'")),
        (lambda: key("x"), Output(FIRST, FIRST), has_not("x", "Output with 'features', 'logits'")),
        (lambda: key(2), (FIRST, FIRST), has_not(2, "tuple with 2 entries")),
        (lambda: key("x", key("y")), {"x": {"z": FIRST}}, has_not("y", "dict with 'z'")),
        (lambda: key(0), FIRST, has_not(0, "Tensor")),
        (lambda: "T", FIRST, has_not("T", "Tensor")),
        (
            lambda: key("features", 1),
            {"features": SEGMENTED},
            "target: expected a model with logits (N, classes), got an output of 2 x 3 x 2 x 3; ",
        ),
        (
            targets.probability,
            {"logits": FIRST},
            "target: expected a model with logits (N, classes), got an output of type dict; ",
        ),
    ],
)
def test_kinds_that_targets_refuse(make: Any, output: Any, message: str) -> None:
    hint = ".+" if message.endswith(" ") else ""
    with pytest.raises(TypeError, match=f"^{re.escape(message)}{hint}$"):
        refused(make, output)


@kinds
@pytest.mark.parametrize("method", [camkit.GradCAM, camkit.ScoreCAM])
def test_models_that_wrap_their_logits(wrap: Wrap, keyed: Any, method: Any) -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    plain, wrapped = method(model), method(Wrapped(model, wrap), "inner.features")
    for target in ([1, 3], [[0, 1, 2, 3]] * 2, None):
        expected, explained = plain(x, target), wrapped(x, keyed(target))
        assert_close(explained.maps, expected.maps, rtol=1e-12, atol=0)
        assert expected.maps.amax() > 0 or target != [[0, 1, 2, 3]] * 2
    with torch.no_grad():
        model.get_parameter("fc.bias")[expected.target] -= 100  # now the model predicts another class
    again = wrapped(x, explained.target)
    assert_close(again.maps, plain(x, expected.target).maps, rtol=1e-12, atol=0)
    assert not torch.equal(plain(x).target, expected.target)


def test_the_key_alone_as_target() -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    wrapped = Wrapped(model, lambda f, y: {"logits": y, "features": f})
    assert torch.equal(camkit.GradCAM(wrapped)(x, "logits").maps, camkit.GradCAM(model)(x).maps)


def test_a_method_of_a_tuple_is_no_entry() -> None:
    with pytest.raises(
        TypeError, match="^target: expected an output that has 'count', got an output of type tuple"
    ):
        key("count")((FIRST, FIRST))
