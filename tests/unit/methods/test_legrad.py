"""LeGrad against the formula of its paper, written out, and the models that it refuses."""

import math

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import Block, Tokens, Transformer, build, tiny


def attention_by_heads(layer: nn.MultiheadAttention, tokens: Tensor, weights: list[Tensor]) -> Tensor:
    """Self-attention of tokens ``(L, E)``, head by head; appends each head's ``(L, L)`` to ``weights``."""
    width = tokens.shape[1]
    size = width // layer.num_heads
    assert layer.in_proj_weight is not None
    q, k, v = (tokens @ layer.in_proj_weight.T + layer.in_proj_bias).split(width, dim=1)
    outputs = []
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        attention = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), 1).detach().requires_grad_()
        weights.append(attention)
        outputs.append(attention @ v[:, part])
    return layer.out_proj(torch.cat(outputs, 1))  # type: ignore[no-any-return]


def legrad(model: Transformer, image: Tensor, c: int, chosen: list[int]) -> Tensor:
    """Bousselham et al. 2024 for one image. The graph of a block has only the attention of that block."""
    rows, columns = image.shape[1] // 4, image.shape[2] // 4
    patches = model.patches(image[None])[0].flatten(1).T
    tokens = torch.cat([model.token[0], patches, model.register[0]]).detach()
    total = torch.zeros(rows, columns, dtype=image.dtype)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        heads: list[Tensor] = []
        y = block.norm1(tokens)
        after = tokens + attention_by_heads(block.attention, y, heads)
        after = after + block.mlp(block.norm2(after))
        if index in chosen:
            mean = sum(after) / len(after)
            score = model.head(model.norm(mean))[c]
            gradients = torch.autograd.grad(score, heads)
            for i in range(rows):
                for j in range(columns):
                    token = 1 + i * columns + j
                    sensitive = [max(float(g[query, token]), 0) for g in gradients for query in range(len(g))]
                    total[i, j] += sum(sensitive) / len(sensitive) / len(chosen)
        tokens = after.detach()
    return total


def test_legrad_equals_its_paper_written_out() -> None:
    model = tiny(Transformer)
    x = torch.randn(2, 3, 16, 12).double()
    classes = torch.tensor([[0, 3], [2, 2]])
    explained = camkit.LeGrad(model)(x, classes)
    assert explained.layer == "blocks.0, blocks.1"
    second = camkit.LeGrad(model, "blocks.1")(x, classes)
    first = camkit.LeGrad(model, model.blocks[0])(x, classes)
    assert explained.maps.abs().sum() > 0
    for n in range(2):
        for k, c in enumerate(classes[n].tolist()):
            for found, chosen in ((explained, [0, 1]), (first, [0]), (second, [1])):
                expected = legrad(model, x[n], c, chosen)
                torch.testing.assert_close(found.maps[n, k], expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(explained.parts[0].maps, first.maps)
    torch.testing.assert_close(explained.parts[1].maps, second.maps)


def test_legrad_of_the_family() -> None:
    model = build("vit_b_32")
    explained = camkit.LeGrad(model)(torch.randn(1, 3, 224, 224), [[3, 8]])
    assert len(explained.parts) == 12
    assert explained.maps.shape == (1, 2, 7, 7)
    torch.testing.assert_close(explained.maps, sum(p.maps for p in explained.parts) / 12)
    assert not torch.allclose(explained.maps[0, 0], explained.maps[0, 1])


def test_legrad_refuses_a_layer_without_attention_and_windows() -> None:
    x = torch.randn(1, 3, 16, 12).double()
    with pytest.raises(
        ValueError,
        match=r"^layer: expected a block with one attention over its 14 tokens, got 'blocks.1.mlp' with none",
    ):
        camkit.LeGrad(tiny(Transformer), "blocks.1.mlp")(x)
    with pytest.raises(
        ValueError, match="^model: expected a transformer of blocks with one attention over all"
    ):
        camkit.LeGrad(build("swin_t"))(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="^model: expected a transformer of blocks"):
        camkit.LeGrad(tiny(Tokens))(x)
