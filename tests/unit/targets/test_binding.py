import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import camkit
from camkit import targets
from camkit._tools.nested import split
from camkit.targets import bind, binding, key
from helpers import reference
from helpers.families import Plain, tiny


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


FIRST, OTHER = LOGITS, torch.tensor([[4.0, 0.0, 1.0], [0.0, 2.0, 9.0]])  # which predict 1, 0 and 0, 2


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
    for output in (FIRST, OTHER):  # the classes that FIRST predicts, whatever OTHER does
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
    """Three similar classes, 0.6 of their mean, of the predicted class."""
    logits = torch.tensor([[1.0, 9.0, 2.0, 7.0, 6.0]])
    bound = bind(targets.finer(), logits, 1)
    assert bound.score(logits).tolist() == pytest.approx([9 - 0.6 * (7 + 6 + 2) / 3])
    assert bound.score(logits.flip(1)).tolist() == pytest.approx([7 - 0.6 * (9 + 2 + 1) / 3])


MASK = torch.tensor([[True, False, False], [False, True, True]])
SEGMENTED = torch.arange(36.0).reshape(2, 3, 2, 3)


@pytest.mark.parametrize("kind", [lambda mask: mask, lambda mask: mask.numpy()], ids=["tensor", "array"])
def test_pixels(kind: Callable[[Tensor], Any]) -> None:
    values, _ = scores(targets.pixels(kind(MASK), 1), SEGMENTED, 2)
    assert values.tolist() == [6 + 10 + 11, 24 + 28 + 29]
    values, _ = scores(targets.pixels(kind(torch.stack([MASK, ~MASK])), 2), SEGMENTED, 2)
    assert values.tolist() == [12 + 16 + 17, 31 + 32 + 33]


def detections(*found: tuple[list[float], int, float]) -> dict[str, Tensor]:
    boxes, labels, certainties = zip(*found, strict=True) if found else ((), (), ())
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(certainties).requires_grad_(),
    }


A, HALF, FAR = [0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [5.0, 3.0, 15.0, 13.0]


@pytest.mark.parametrize(
    ("found", "expected", "gradient"),
    [
        ([(A, 1, 0.25)], 0.25, [1]),
        ([(HALF, 1, 0.75)], 0.25, [1 / 3]),  # 2 x 2 of 8 + 8 - 4
        ([(HALF, 1, 0.9), (A, 1, 0.25)], 0.3, [1 / 3, 0]),
        ([(A, 2, 1.0), (HALF, 1, 0.75), (FAR, 1, 1.0)], 0.25, [0, 1 / 3, 0]),
        ([([0.0, 0.0, 4.0, 1.0], 1, 0.5), ([-4.0, -2.0, 8.0, 4.0], 1, 0.5)], 0.25, [0.5, 0]),
        ([(FAR, 1, 1.0)], 0, [0]),
        ([(A, 2, 1.0)], 0, [0]),
        ([], 0, []),
    ],
)
def test_box(found: Any, expected: float, gradient: list[float]) -> None:
    """Of the detections of its label, the best of score times overlap; the gradient reaches its score."""
    output = [detections(*found), detections((A, 1, 0.5))]
    for corners in (A, torch.tensor([A, A])):
        values, _ = scores(targets.box(corners, 1), output, 2)
        assert values.tolist() == pytest.approx([expected, 0.5])
    (gradients,) = torch.autograd.grad(values[0], [output[0]["scores"]])
    assert gradients.tolist() == pytest.approx(gradient)


def test_box_of_each_image() -> None:
    output = [detections((A, 1, 0.5)), detections((A, 1, 0.5))]
    assert scores(targets.box(torch.tensor([A, HALF]), 1), output, 2)[0].tolist() == pytest.approx(
        [0.5, 0.5 / 3]
    )


def test_similarity() -> None:
    output = torch.tensor([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0]])
    one = torch.tensor([0.0, 5.0, 0.0])
    assert scores(targets.similarity(one), output, 2)[0].tolist() == pytest.approx([0.8, -1])
    each = torch.tensor([[6, 8, 0], [1, 1, 0]])
    values = scores(targets.similarity(each), output, 2)[0]
    assert values.tolist() == pytest.approx([1, -(0.5**0.5)])


@dataclass
class Output:
    features: Any
    logits: Tensor


class Named(NamedTuple):
    features: Any
    logits: Tensor


Wrap = Callable[[Tensor, Tensor], Any]
#: How a model gives its logits beside features, and the target that is their key.
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
    """What the first output settled stays, though the other one predicts other classes."""
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


def refused(make: Any, output: Any) -> Any:
    return bind(make(), output, 2).score(output)


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


def test_pixels_of_another_number_of_images() -> None:
    with pytest.raises(ValueError, match="^mask: expected .*, got 3 x 2 x 3$"):
        refused(lambda: targets.pixels(MASK.expand(3, 2, 3), 1), SEGMENTED)


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


class Wrapped(nn.Module):
    """A tiny network, and the features that it also gives."""

    def __init__(self, inner: nn.Module, wrap: Wrap) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x.mean((2, 3)), self.inner(x))


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
        model.get_parameter("fc.bias")[expected.target] -= 100  # another class is predicted from now on
    again = wrapped(x, explained.target)
    assert_close(again.maps, plain(x, expected.target).maps, rtol=1e-12, atol=0)
    assert not torch.equal(plain(x).target, expected.target)


def test_the_key_alone_as_target() -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    wrapped = Wrapped(model, lambda f, y: {"logits": y, "features": f})
    assert torch.equal(camkit.GradCAM(wrapped)(x, "logits").maps, camkit.GradCAM(model)(x).maps)


def test_maps_are_linear_in_the_score() -> None:
    """HiResCAM's of a formula is the formula's derivative of those of all classes."""
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
    assert_close(method(x, targets.probability()).maps, method(x).maps)  # Score-CAM's is that of a class


class Segmenter(nn.Module):
    """A class at each position, at the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.trunk(x))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear")


def test_pixels_of_a_segmentation() -> None:
    model, x = tiny(Segmenter), torch.randn(2, 3, 8, 12).double()
    in_dict = Wrapped(model, lambda f, y: {"aux": f, "out": y})
    masks = torch.rand(2, 8, 12) > 0.5
    for mask, each in [(masks, masks), (masks[0], masks[[0, 0]])]:
        target = targets.pixels(mask, 1)
        explained = camkit.GradCAM(model, layer="trunk")(x, target)
        for n in range(2):
            spots = each[n].nonzero().tolist()
            pair = reference.activation_and_gradient(
                model,
                "trunk",
                x[n],
                lambda y, spots=spots: torch.stack([y[1, i, j] for i, j in spots]).sum(),  # type: ignore[misc]
            )
            assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-12)
        assert explained.maps.amax() > 0
        of_entry = camkit.GradCAM(in_dict, layer="inner.trunk")(x, key("out", target))
        assert_close(of_entry.maps, explained.maps, rtol=1e-12, atol=0)


def detector(most: int = 20) -> nn.Module:
    """torchvision's SSD on a backbone of two convolutions."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
    backbone.out_channels = [6]  # type: ignore[assignment]
    anchors = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
    model: nn.Module = SSD(backbone, anchors, (32, 32), 3, nms_thresh=1, detections_per_img=most)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.get_parameter("backbone.2.bias").fill_(1)  # so that its ReLU lets something through
    return model.double().eval()


CORNERS_OF_EACH = torch.tensor([[4.0, 5.0, 21.0, 24.0], [10.0, 2.0, 30.0, 18.0]]).double()


def test_box_of_a_detector_of_torchvision() -> None:
    model, x = detector(), torch.rand(2, 3, 32, 32).double()
    explained = camkit.GradCAM(model, layer="backbone.3")(x, targets.box(CORNERS_OF_EACH, 2))
    for n in range(2):

        def score(found: Any, corners: Tensor = CORNERS_OF_EACH[n]) -> Tensor:
            overlaps = box_iou(found["boxes"], corners[None])[:, 0]
            return torch.stack(
                [
                    s * o
                    for s, o, label in zip(found["scores"], overlaps, found["labels"], strict=True)
                    if label == 2
                ]
            ).max()

        pair = reference.activation_and_gradient(model, "backbone.3", x[n], score)
        assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-15)
    assert explained.maps.amax() > 0


@pytest.mark.parametrize("most", [20, 12])  # 12: as many as there are copies of images in one pass
def test_box_while_the_input_is_masked(most: int) -> None:
    model, x = detector(most), torch.rand(2, 3, 32, 32).double()
    found = model(x)
    assert [len(one["scores"]) for one in found] == [most, most]
    target = targets.box(CORNERS_OF_EACH, found[0]["labels"][0].item())
    one_by_one = camkit.ScoreCAM(model, "backbone.3", chunk_size=1)(x, target).maps
    assert one_by_one.amax() > 0
    assert_close(camkit.ScoreCAM(model, "backbone.3", chunk_size=32)(x, target).maps, one_by_one)


def test_box_while_a_channel_is_left_out() -> None:
    model, x, found = detector(), torch.rand(2, 3, 32, 32).double(), 0.0
    label = model(x)[1]["labels"][0].item()
    for offset, sign in [(0, 1), (2, -1)]:

        def score(output: Any, corners: Tensor = CORNERS_OF_EACH, a: int = offset, b: int = sign) -> Tensor:
            return a + b * targets.box(corners, label)(output)

        explained = camkit.AblationCAM(model, "backbone.3")(x, score)
        found += explained.maps.amax().item()
        for n, corners in enumerate(CORNERS_OF_EACH):

            def one(output: Any, corners: Tensor = corners, score: Any = score) -> Tensor:
                return score([output], corners)[0]  # type: ignore[no-any-return]

            activation, _ = reference.activation_and_gradient(model, "backbone.3", x[n], one)
            edits = [functools.partial(reference.without_channel, kind="NCHW", k=k) for k in range(6)]
            outputs = [reference.output_with(model, "backbone.3", x[n], edit) for edit in edits]
            whole, without = one(model(x[n : n + 1])[0]).item(), [one(output).item() for output in outputs]
            expected = reference.ablation_cam(activation, whole, without)
            assert_close(explained.maps[n], expected, rtol=1e-9, atol=1e-12)
    assert found > 0


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (lambda found: {"found": found}, key("found", targets.box(A, 1))),
        (lambda found: (torch.zeros(3), found), key(1, targets.box(A, 1))),
        (tuple, targets.box(A, 1)),
    ],
)
def test_detections_wherever_they_lie_in_the_output(kind: Any, target: Any) -> None:
    """Cut into images where the output holds a list of one dict for each of them."""
    found = [detections((A, 1, float(n))) for n in range(6)]
    parts = split(kind(found), 2, 6)
    assert [bind(target, part, 2).score(part).tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


def test_what_is_no_number_outside_the_mask_does_not_matter() -> None:
    output = torch.full((1, 2, 2, 3), torch.nan)
    output[0, 1, 0, 0] = 3
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 0] = True
    assert targets.pixels(mask, 1)(output).tolist() == [3]


def test_a_method_of_a_tuple_is_no_entry() -> None:
    with pytest.raises(
        TypeError, match="^target: expected an output that has 'count', got an output of type tuple"
    ):
        key("count")((FIRST, FIRST))
