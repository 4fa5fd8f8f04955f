"""A pass that records the attention of each block, in every way a model may compute it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.passes.attention import recorded_attention
from helpers.families import Block, Transformer, tiny
from helpers.fingerprint import hooks_of, process


def test_the_weights_of_each_block_are_leaves_of_a_graph_to_its_tokens() -> None:
    model, x = tiny(Transformer), torch.randn(2, 3, 16, 12).double()
    with torch.no_grad():
        expected = model(x)
    names = ["blocks.0", "blocks.1"]
    with recorded_attention(model, names, 2) as found:
        torch.testing.assert_close(model(x), expected)
    assert list(found) == names
    for weights, tokens in found.values():
        (leaf,) = weights
        assert leaf.is_leaf
        assert leaf.shape == (2, 2, 14, 14)  # images, heads, and 1 + 4 x 3 + 1 tokens twice
        torch.testing.assert_close(leaf.sum(3).detach(), torch.ones(2, 2, 14).double())
        (gradient,) = torch.autograd.grad(tokens.square().sum(), leaf)
        assert gradient.any()  # the tokens depend on these weights


def test_the_graph_of_a_block_does_not_reach_into_the_block_before() -> None:
    model, x = tiny(Transformer), torch.randn(2, 3, 16, 12).double()
    with recorded_attention(model, ["blocks.0", "blocks.1"], 2) as found:
        model(x)
    (first,), _ = found["blocks.0"]
    _, tokens = found["blocks.1"]
    (gradient,) = torch.autograd.grad(tokens.sum(), [first], allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_after_the_pass(fails: bool) -> None:
    model, x = tiny(Transformer), torch.randn(2, 3, 16, 12).double()

    def run() -> None:
        with recorded_attention(model, ["blocks.0"], 2):
            model(x if not fails else x[:, :, :7])

    before = process()
    if fails:
        model.patches.register_forward_hook(lambda module, args, output: output[:, :1])
        with pytest.raises(RuntimeError):
            run()
    else:
        run()
    assert hooks_of(model) == fails  # only the hook that this test registered
    assert process() == before


class Attention(nn.Module):
    """Attention in one of three spellings.

    ``"fused"`` calls torch's function, ``"open"`` writes the softmax out, and any other value writes it out
    with the heads folded into the batch dimension.
    """

    def __init__(self, like: nn.MultiheadAttention, how: str) -> None:
        super().__init__()
        self.like, self.how = like, how

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool) -> tuple[Tensor]:
        assert self.like.in_proj_weight is not None
        qkv = F.linear(x, self.like.in_proj_weight, self.like.in_proj_bias)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "open":
            y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            weights = F.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, dim=-1)
            y = torch.bmm(weights, v).unflatten(0, (len(x), -1))
        return (self.like.out_proj(y.transpose(1, 2).flatten(2)),)


@pytest.mark.parametrize("how", ["fused", "open", "in the batch"])
def test_legrad_sees_attention_however_it_is_written(how: str) -> None:
    model = tiny(Transformer)
    x = torch.randn(2, 3, 16, 12).double()
    expected = camkit.LeGrad(model)(x, [1, 2]).maps
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention = Attention(block.attention, how)  # type: ignore[assignment]
    torch.testing.assert_close(camkit.LeGrad(model)(x, [1, 2]).maps, expected, rtol=1e-9, atol=1e-14)


def test_attention_outside_the_blocks() -> None:
    class Stem(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.stem(tokens, tokens, tokens)[0]
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
            for block in self.blocks:
                tokens = block(tokens)
            return self.head(self.norm(tokens)[:, 0])  # type: ignore[no-any-return]

    model, x = tiny(Stem), torch.randn(2, 3, 16, 12).double()
    found = camkit.LeGrad(model, ["blocks.0", "blocks.1"])(x, 1)
    assert found.maps.shape == (2, 4, 3)
    assert found.maps.any()
