"""Which tokens form a grid of positions, and in which order they must be."""

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.layouts import Layout
from helpers.written import Model, Vit, find


@pytest.mark.parametrize(("size", "grid"), [(48, (3, 3)), (50, (3, 3)), (100, (6, 6)), (160, (10, 10))])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (5, 0), (0, 1), (1, 2)])
def test_tokens_form_the_grid_they_were_cut_into(
    size: int, grid: tuple[int, int], fixed: bool, before: int, after: int
) -> None:
    index = 0 if before else -1
    model = Vit(lambda y: y[:, index], before, after, size if fixed else None)
    place = find(model, size, size)
    assert place.layout == Layout(-1, grid, before, after)
    assert place.name == "norm1"  # at later layers the patches do not reach the output
    if fixed:
        return
    explained = camkit.GradCAM(model)(torch.randn(2, 3, size, size), [[0, 1, 2, 3]] * 2)
    assert (explained.maps.amax((2, 3)) > 0).any()


def test_tokens_that_are_averaged() -> None:
    model = Vit(lambda y: y[:, 1:].mean(1)).double()
    x = torch.randn(2, 3, 64, 48).double()
    assert find(model, 64, 48).name == "norm"
    explained = camkit.CAM(model)(x, 2)
    torch.testing.assert_close(explained.maps.mean((1, 2)) + model.fc.bias[2], explained.output[:, 2])


def test_what_is_no_grid_of_positions_is_not_read_as_one() -> None:
    class Queries(Model):
        """Has 16 learnt queries, as in DETR, and a layer that outputs 8 x 8 positions as (N, C, L)."""

        def __init__(self) -> None:
            super().__init__(lambda s, x: s.fc(s.decode(x)))
            self.queries = nn.Parameter(torch.randn(1, 16, 8))
            self.flat = nn.Flatten(2)
            self.out = nn.LayerNorm(8)

        def decode(self, x: Tensor) -> Tensor:
            y = self.flat(self.f(x)).transpose(1, 2)
            return self.out((self.queries @ y.mT).softmax(-1) @ y).mean(1)  # type: ignore[no-any-return]

    model = Queries()
    names = [layer.name for layer in camkit.list_layers(model, (3, 32, 32))]
    assert names == ["f.0", "f.1", "f.2", "f.3", "f"]
    for layer in ("flat", "out"):
        with pytest.raises(ValueError, match="^layer: expected a layer whose output has a spatial size"):
            camkit.GradCAM(model, layer)(torch.rand(1, 3, 32, 32))


def test_heads_of_attention_are_no_grid() -> None:
    """Six channels, split into two heads of three, could be mistaken for a grid of 2 x 3."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, stride=4)
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            heads = self.mix(tokens).unflatten(2, (2, 3))
            return self.mix(tokens + heads.flatten(2)).mean(1)  # type: ignore[no-any-return]

    dry = DryRun.of(Heads(), (2, 3, 16, 12))
    joined = next(v for v in range(len(dry.trace.shapes)) if dry.trace.history(v)[-1:] == ["add"])
    assert dry.layout(joined) == Layout(-1, (4, 3))


class Windows(nn.Module):
    """A norm over tokens, which are ordered window by window if ``unrolled`` and row by row otherwise."""

    def __init__(self, unrolled: bool) -> None:
        super().__init__()
        self.patches, self.norm, self.fc = nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6), nn.Linear(6, 4)
        self.unrolled = unrolled

    def forward(self, x: Tensor) -> Tensor:
        f = self.patches(x)
        if self.unrolled:
            n, c, h, w = f.shape
            f = f.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, c)
        else:
            f = f.flatten(2).transpose(1, 2)
        return self.fc(self.norm(f + 1).mean(1))  # type: ignore[no-any-return]


def test_tokens_in_another_order_are_refused() -> None:
    x = torch.rand(1, 3, 32, 48)
    assert camkit.GradCAM(Windows(False), "norm")(x).maps.shape == (1, 8, 12)
    message = (
        "^layer: expected a layer whose tokens stand row by row, got 'norm', where they stand in another"
    )
    with pytest.raises(ValueError, match=message):
        camkit.GradCAM(Windows(True), "norm")(x)
