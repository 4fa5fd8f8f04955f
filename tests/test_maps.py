import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import camkit
from camkit.maps import resize

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(FLOATS, min_size=2, max_size=12), st.sampled_from([torch.float32, torch.float64]))
def test_normalize_keeps_the_order_and_reaches_both_ends(values: list[float], dtype: torch.dtype) -> None:
    raw = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
    result = camkit.normalize(raw)
    assert result.dtype == dtype
    assert ((result >= 0) & (result <= 1)).all()
    if raw.max() > raw.min():
        assert result.max() > 0.99
        assert result[raw == raw.min()].max() == 0
        order = raw.flatten().argsort()
        assert (result.flatten()[order].diff() >= 0).all()
    else:
        assert (result == 0).all()


def test_normalize_is_map_by_map() -> None:
    raw = torch.tensor([[[-1.0, 1.0]], [[5.0, 5.0]], [[0.0, 1e-30]]])
    assert camkit.normalize(raw).tolist() == [[[0, 1]], [[0, 0]], [[0, 1]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalize_of_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    result = camkit.normalize(torch.tensor([[-6e4, 0, 6e4]], dtype=dtype))
    assert result.dtype == dtype
    assert result.tolist() == [[0, 0.5, 1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_normalize_refuses_what_is_no_number(bad: float) -> None:
    with pytest.raises(ValueError, match="^maps: expected finite values, got NaN or infinity$"):
        camkit.normalize(torch.tensor([[0.0, bad]]))


def test_resize_interpolates_between_centres() -> None:
    raw = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    expected = [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]]
    assert resize(raw, (4, 4)).tolist() == expected
    assert resize(raw.expand(3, 5, 2, 2), (4, 4))[2, 4].tolist() == expected
    assert resize(raw, (2, 2)).tolist() == raw.tolist()
