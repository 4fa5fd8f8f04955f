"""The layout of a layer: how it is inferred from shapes, and how an activation is read in it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from camkit.layers.layouts import Layout, infer_layout

# A layout names the dimension of the channels: the second, or the last.
NCHW, NHWC = Layout(1), Layout(-1)


@pytest.mark.parametrize(
    ("shape", "larger", "expected"),
    [
        ((2, 512, 7, 7), (2, 512, 10, 8), NCHW),
        ((2, 7, 7, 768), (2, 10, 8, 768), NHWC),
        ((2, 7, 7, 7), (2, 7, 10, 8), NCHW),  # ambiguous without the larger input
        ((2, 7, 7, 7), (2, 10, 8, 7), NHWC),
        ((2, 512, 1, 1), (2, 512, 4, 2), NCHW),
        ((2, 512, 1, 1), (2, 512, 1, 1), None),
        ((2, 512, 6, 6), (2, 512, 6, 6), NCHW),  # pooled to a fixed spatial size
        ((2, 12, 49, 49), (3, 12, 49, 49), None),  # windows: a larger input has more of them
        ((2, 1000), (2, 1000), None),
    ],
)
def test_two_sizes_tell_the_layout(
    shape: tuple[int, ...], larger: tuple[int, ...], expected: Layout | None
) -> None:
    assert infer_layout(shape, (2, 3, 224, 224), larger) == expected


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 512, 7, 7), (224, 224), NCHW),
        ((2, 7, 7, 512), (224, 224), NHWC),
        ((2, 64, 5, 3), (150, 100), NCHW),
        ((2, 5, 3, 64), (150, 100), NHWC),
        ((2, 512, 1, 1), (224, 224), None),
        ((2, 197, 768), (224, 224), None),  # tokens: their shape does not show their grid
    ],
)
def test_proportions_tell_the_layout_at_one_size(
    shape: tuple[int, ...], size: tuple[int, ...], expected: Layout | None
) -> None:
    assert infer_layout(shape, (2, 3, *size)) == expected


def test_an_ambiguous_shape_is_an_error_and_no_guess() -> None:
    with pytest.raises(ValueError, match=r"^layer: expected .* told from .*, got shape 2 x 7 x 7 x 7"):
        infer_layout((2, 7, 7, 7), (2, 3, 224, 224))
    with pytest.raises(ValueError, match="reads as NCHW and as NHWC"):
        infer_layout((2, 8, 16), (2, 3, 64))


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_tokens_and_nhwc_read_as_nchw(n: int, c: int, h: int, w: int, prefix: int, suffix: int) -> None:
    expected = torch.randn(n, c, h, w)
    nhwc = torch.empty(n, h, w, c)
    # Tokens outside the grid are NaN, so that reading one of them would show.
    tokens = torch.full((n, prefix + h * w + suffix, c), float("nan"))
    for i in range(h):
        for j in range(w):
            nhwc[:, i, j] = expected[:, :, i, j]
            tokens[:, prefix + i * w + j] = expected[:, :, i, j]
    assert torch.equal(NHWC.channels_first(nhwc), expected)
    assert torch.equal(NCHW.channels_first(expected), expected)
    assert torch.equal(Layout(-1, (h, w), prefix, suffix).channels_first(tokens), expected)


def test_another_number_of_tokens_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^tokens: expected 1 \+ 4 x 3 \+ 0, got 20; the layout was found at"
    ):
        Layout(-1, (4, 3), 1).channels_first(torch.zeros(2, 20, 8))


class ReadsTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return Layout(-1, (2, 3), prefix=1).channels_first(tokens)


def test_a_graph_reads_the_tokens_of_any_number_of_images() -> None:
    shapes = {"tokens": {0: torch.export.Dim("batch", min=1, max=9)}}
    program = torch.export.export(ReadsTokens(), (torch.rand(2, 7, 4),), dynamic_shapes=shapes, strict=False)
    tokens = torch.rand(5, 7, 4)
    assert torch.equal(program.module()(tokens), ReadsTokens()(tokens))
