"""Operations on raw maps: normalising, resizing, fusing layers and summing channels."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import camkit
from camkit.maps import fuse, resize, weighted_sum

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(FLOATS, min_size=2, max_size=12), st.sampled_from([torch.float32, torch.float64]))
def test_normalize_keeps_the_order_and_reaches_both_ends(values: list[float], dtype: torch.dtype) -> None:
    raw = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
    result = camkit.normalize(raw)
    assert result.dtype == dtype
    assert ((result >= 0) & (result <= 1)).all()
    eps, span = torch.finfo(dtype).eps, raw.max() - raw.min()
    # A span of a few rounding errors is noise and becomes zero; a clearly larger span is stretched to [0, 1].
    if span > 64 * eps * raw.abs().max():
        assert result.max() > 0.99
        assert result[raw == raw.min()].max() == 0
        order = raw.flatten().argsort()
        assert (result.flatten()[order].diff() >= 0).all()
    elif span <= 4 * eps * raw.abs().max():
        assert (result == 0).all()


def test_normalize_is_map_by_map() -> None:
    raw = torch.tensor([[[-1.0, 1.0]], [[5.0, 5.0]], [[0.0, 1e-30]]])
    assert camkit.normalize(raw).tolist() == [[[0, 1]], [[0, 0]], [[0, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_does_not_blow_up_rounding(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    raw = torch.tensor([[[1.0, 1 + 4 * eps]], [[1.0, 1 + 64 * eps]], [[0.0, eps]]], dtype=dtype)
    assert camkit.normalize(raw).tolist() == [[[0, 0]], [[0, 1]], [[0, 1]]]
    assert camkit.normalize(-raw).tolist() == [[[0, 0]], [[1, 0]], [[1, 0]]]


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


FUSIONS = ["mean", "product", "hierarchical"]


@pytest.mark.parametrize(
    ("how", "shallow", "deep", "expected"),
    [
        ("mean", [2, -4, 0], [0, 3, -1.5], [0.25, 0, -0.25]),
        ("product", [2, -4, 2], [0, -3, 1.5], [0, 0, 0.25]),
        ("hierarchical", [2, -4, -4], [0, 3, -1.5], [math.tanh(1), 1, -0.5]),
    ],
)
def test_fuse_by_hand(how: str, shallow: list[float], deep: list[float], expected: list[float]) -> None:
    parts = [torch.tensor(part).reshape(1, 1, 1, 3) for part in (shallow, deep)]
    assert fuse(parts, how).flatten().tolist() == pytest.approx(expected)


def fused_by_loops(parts: list[Tensor], how: str, size: tuple[int, int]) -> Tensor:
    """Fuses maps ``(N, K, h, w)`` in loops over images, scores and positions."""
    count, several = parts[0].shape[:2]
    result = torch.zeros(count, several, *size, dtype=parts[0].dtype)
    for n, k in itertools.product(range(count), range(several)):
        grown = []
        for part in parts:
            largest = max(abs(value) for value in part[n, k].flatten().tolist())
            scaled = part[n, k] / largest if largest else part[n, k]
            grown.append(F.interpolate(scaled[None, None], size=size, mode="bilinear")[0, 0].tolist())
        for i, j in itertools.product(range(size[0]), range(size[1])):
            *shallower, deepest = [one[i][j] for one in grown]
            if how == "mean":
                fused = (sum(shallower) + deepest) / len(parts)
            elif how == "product":
                fused = math.prod(max(value, 0) for value in (*shallower, deepest))
            else:
                fused = max(*(math.tanh(2 * value) for value in shallower), deepest)
            result[n, k, i, j] = fused
    return result


@pytest.mark.parametrize("how", FUSIONS)
@pytest.mark.parametrize(
    ("sizes", "finest"),
    [([(4, 3), (4, 3)], (4, 3)), ([(6, 7), (3, 4), (2, 2)], (6, 7)), ([(4, 4), (2, 9), (8, 1)], (2, 9))],
)
def test_fuse_is_image_by_image_at_the_finest_resolution(
    how: str, sizes: list[tuple[int, int]], finest: tuple[int, int]
) -> None:
    parts = [(2 * torch.rand(2, 3, *size).double() - 0.5) * 10.0**n for n, size in enumerate(sizes)]
    parts[1][1, 0] = 0  # one map is zero everywhere
    expected = fused_by_loops(parts, how, finest)
    assert expected.abs().amax() > 0.1
    assert_close(fuse(parts, how), expected, rtol=1e-9, atol=1e-12)
    # Only the hierarchical fusion treats the deepest layer differently.
    order_matters = not torch.allclose(fuse(parts[::-1], how), expected)
    assert order_matters == (how == "hierarchical")


@given(st.sampled_from(FUSIONS), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=30)
def test_every_layer_counts_the_same_whatever_its_scale(how: str, first: float, second: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 1, 4, 4, generator=generator), torch.randn(2, 1, 2, 3, generator=generator)]
    scaled = [parts[0] * first, parts[1] * second]
    assert_close(fuse(scaled, how), fuse(parts, how), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", FUSIONS)
def test_fuse_of_nothing_is_nothing(how: str) -> None:
    assert fuse([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 3)], how).tolist() == [[[[0.0] * 3] * 4]]


@pytest.mark.parametrize("how", FUSIONS)
def test_fuse_of_one_is_that_one(how: str) -> None:
    part = torch.randn(2, 1, 3, 3)
    assert fuse([part], how) is part


@pytest.mark.parametrize(("shallow", "deep"), [((8,), (4,)), ((2, 4, 3), (1, 2, 2))])
def test_fuse_of_other_numbers_of_dimensions(shallow: tuple[int, ...], deep: tuple[int, ...]) -> None:
    parts = [torch.rand(2, 3, *shallow), torch.rand(2, 3, *deep)]
    first, second = (part / part.flatten(2).amax(2).reshape(2, 3, *[1] * len(deep)) for part in parts)
    assert_close(fuse(parts), (first + resize(second, shallow)) / 2)


@pytest.mark.parametrize("size", [(5,), (2, 3), (2, 1, 3)])
def test_weighted_sum(size: tuple[int, ...]) -> None:
    weights, activation = torch.randn(2, 4, 3).double(), torch.randn(2, 3, *size).double()
    result = weighted_sum(weights, activation)
    assert result.shape == (2, 4, *size)
    for n, k in itertools.product(range(2), range(4)):
        expected = sum(weights[n, k, c] * activation[n, c] for c in range(3))
        assert_close(result[n, k], expected)
