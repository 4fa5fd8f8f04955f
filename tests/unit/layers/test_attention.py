"""Attention in a model, and its effect on the choice of the layer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_for_gradient
from helpers.families import Tokens
from helpers.written import Vit, find


def test_an_attention_among_parameters_alone_is_passed_by() -> None:
    class Learnt(nn.Module):
        """Adds a learnt token, attended to by itself alone, to the input and normalises the sum."""

        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + F.scaled_dot_product_attention(self.token, self.token, self.token))  # type: ignore[no-any-return]

    model = Vit(lambda y: y[:, 0])
    model.norm = Learnt()  # type: ignore[assignment]
    assert find(model, 48, 48).name == "norm1"


def test_naming_a_layer_whose_patches_reach_nothing_is_an_error() -> None:
    model = Vit(lambda y: y[:, 0])
    with pytest.raises(
        ValueError, match="^layer: expected a layer whose positions reach the score, got 'norm'"
    ):
        camkit.GradCAM(model, "norm")(torch.randn(1, 3, 64, 64))


def test_attention_from_plain_functions() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            n, length, c = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2).reshape(n, length, c)

    model = Tokens()
    model.attention = nn.MultiheadAttention(8, 2)

    class Wrapped(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.own = Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            x = x + self.own(self.norm1(x))
            return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    assert find_for_gradient(DryRun.of(Wrapped(), (2, 3, 16, 12))).name == "norm1"


def test_attention_weights_are_no_picture() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.drop, self.fc = nn.Conv2d(3, 6, 4, stride=4), nn.Dropout(), nn.Linear(6, 4)
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            f = self.norm(self.patches(x).flatten(2).transpose(1, 2))
            weights = self.drop((f[:, None] @ f[:, None].mT).softmax(-1))
            return self.fc((weights @ f[:, None]).mean((1, 2)))  # type: ignore[no-any-return]

    model, x = Weights(), torch.rand(1, 3, 16, 16)
    assert camkit.GradCAM(model)(x).layer == "norm"
    with pytest.raises(
        ValueError, match="^layer: expected a layer whose output has a spatial size, got 'drop'"
    ):
        camkit.GradCAM(model, "drop")(x)
