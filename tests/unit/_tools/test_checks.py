"""The checks of arguments, and the wording of their errors."""

import math
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import camkit
from camkit._tools import checks


def test_every_error_is_worded_alike() -> None:
    assert checks.error_message("x", "a tensor", "int") == "x: expected a tensor, got int"
    assert checks.error_message("k", "an int", 1.5, "round it") == "k: expected an int, got 1.5; round it"


def test_a_shape_is_written_with_crosses() -> None:
    assert checks.shape_of(torch.zeros(2, 3, 0)) == "2 x 3 x 0"
    assert checks.shape_of((224, 224)) == "224 x 224"
    assert checks.shape_of(torch.tensor(1.0)) == "a single number"


PAIR = "2 positive lengths"
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: checks.one_of("how", "c", ["a", "b"]), ValueError, "how: expected one of 'a', 'b', got 'c'"),
    (lambda: checks.tensor("x", [1.0]), TypeError, "x: expected a tensor, got list"),
    (lambda: checks.index("k", 1.0), TypeError, "k: expected an int, got float"),
    (lambda: checks.index("k", True), TypeError, "k: expected an int, got bool"),
    (lambda: checks.positive("n", 0), ValueError, "n: expected a positive number, got 0"),
    (lambda: checks.positive("n", "3"), TypeError, "n: expected an int, got str"),
    (lambda: checks.seed(-1), ValueError, "seed: expected zero or more, got -1"),
    (lambda: checks.seed(None), TypeError, "seed: expected an int, got NoneType"),
    (lambda: checks.lengths("size", PAIR, 5, 2), TypeError, "size: expected 2 positive lengths, got 5"),
    (lambda: checks.lengths("size", PAIR, "ab", 2), TypeError, "size: expected 2 positive lengths, got 'ab'"),
    (
        lambda: checks.lengths("size", PAIR, (3, 2.0), 2),
        TypeError,
        "size: expected 2 positive lengths, got (3, 2.0)",
    ),
    (lambda: checks.lengths("size", PAIR, [3], 2), ValueError, "size: expected 2 positive lengths, got [3]"),
    (
        lambda: checks.lengths("size", PAIR, (3, 0), 2),
        ValueError,
        "size: expected 2 positive lengths, got (3, 0)",
    ),
    (lambda: checks.lengths("size", "lengths", ()), ValueError, "size: expected lengths, got ()"),
    (lambda: checks.not_negative("std", True), TypeError, "std: expected a number, got bool"),
    (lambda: checks.not_negative("std", "1"), TypeError, "std: expected a number, got str"),
    *(
        (
            lambda value=value: checks.not_negative("std", value),
            ValueError,
            f"std: expected a finite number, zero or more, got {value}",
        )
        for value in (-0.5, math.inf, math.nan)
    ),
]


@pytest.mark.parametrize(("check", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_refused_value_is_named(check: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check()


def test_good_values_pass() -> None:
    checks.one_of("how", "b", ["a", "b"])
    checks.tensor("x", torch.zeros(2))
    checks.index("k", -3)
    checks.positive("n", 1)
    checks.seed(0)
    checks.lengths("size", PAIR, (1, np.int64(7)), 2)
    checks.lengths("shape", "lengths", [3, 4, 5])
    checks.not_negative("std", 0)
    checks.not_negative("std", 0.1)


def test_names_that_are_alike_are_suggested() -> None:
    names = ["layer4", "layer4.0.bn2", "layer4.1.bn2", "fc"]
    assert checks.close_matches("layer5", names).startswith("did you mean 'layer4'")
    # A name with the same last part is suggested too, even if the rest of the name is different.
    assert "'layer4.1.bn2'" in checks.close_matches("x.bn2", names)
    assert checks.close_matches("zzz", names) == ""


def test_warnings_outside_the_package_point_to_the_caller() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checks.warn("something is lost")
    assert [(str(one.message), one.filename) for one in told] == [("something is lost", __file__)]


def test_warnings_point_to_the_callers_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(320), nn.Linear(320, 2))
    with pytest.warns(UserWarning, match="LIFTCAM") as told:
        camkit.LIFTCAM(model, "1")(torch.rand(1, 3, 12, 10), 1)
    assert told[0].filename == __file__
