"""The methods that use only the activation and ignore the target."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import camkit
from camkit._tools import noise
from helpers import reference
from helpers.families import TINY, Tiny
from helpers.papers import Case, Literal, check_formula


def random_weights(case: Case) -> Tensor:
    weights = noise.uniform(case.pair[0].shape[:1], case.pair[0], 0)
    return reference.weighted(case.pair[0], weights.tolist())


FORMULAS: dict[str, tuple[Callable[..., Any], Literal]] = {
    "EigenCAM": (camkit.EigenCAM, lambda case: reference.eigen_cam(case.pair[0])),
    "KPCACAM": (camkit.KPCACAM, lambda case: reference.kpca_cam(case.pair[0])),
    "FEM": (camkit.FEM, lambda case: reference.fem(case.pair[0])),
    "RandomCAM": (camkit.RandomCAM, random_weights),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_equals_its_paper_written_out(kind: Tiny, name: str) -> None:
    check_formula(kind, *FORMULAS[name], ignores_target=True)
