"""The methods that are more than one formula at one layer: LeGrad, FullGrad and Guided Grad-CAM."""

import math
from typing import Any

import pytest
import torch
from captum.attr import GuidedBackprop
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.methods.fullgrad import products
from camkit.passes.biases import BiasRecorder
from helpers import reference
from helpers.families import Block, Branching, Plain, Residual, Skip, Tokens, Transformer, build, tiny


def attention_by_heads(layer: nn.MultiheadAttention, tokens: Tensor, weights: list[Tensor]) -> Tensor:
    """Self-attention of tokens ``(L, E)``, head by head; each head's ``(L, L)`` goes to ``weights``."""
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
    """Bousselham et al. 2024 of one image: only the attention of the block in question is in the graph."""
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


class Attention(nn.Module):
    """Attention as people write it: softmax in the open, over heads in the batch, or torch's function."""

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


def bias_gradients(model: nn.Module, image: Tensor, c: int) -> tuple[Tensor, list[Tensor]]:
    """Gradient times input, and gradient times bias of each convolution and normalisation in order."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output.retain_grad()
        outputs.append((module, output))
        return output.clone()

    kinds = nn.Conv2d | nn.BatchNorm2d
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    leaf = image[None].clone().requires_grad_()
    model(leaf)[0, c].backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    products = []
    bias: Any
    for module, output in outputs:
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            bias = (
                module.bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
            )
        elif module.bias is None:
            continue
        else:
            bias = module.bias
        assert output.grad is not None
        products.append(torch.stack([g * b for g, b in zip(output.grad[0], bias.detach(), strict=True)]))
    assert leaf.grad is not None
    return leaf.grad[0] * image, products


def psi(product: Tensor, size: torch.Size) -> Tensor:
    """The magnitudes from 0 to 1 over the whole layer, at the input's size, summed over the channels."""
    magnitude = product.abs()
    scaled = (magnitude - magnitude.min()) / (magnitude.max() - magnitude.min())
    up = F.interpolate(scaled[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    return sum(up, torch.zeros(size, dtype=product.dtype))


@pytest.mark.parametrize(
    ("kind", "shape"), [(Plain, (3, 12, 10)), (Branching, (1, 6, 8)), (Skip, (3, 11, 12))]
)
def test_fullgrad_equals_its_paper_written_out(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = tiny(kind)
    x = torch.randn(2, *shape).double()
    explained = camkit.FullGrad(model)(x, [[0, 2], [1, 1]])
    assert explained.layer == ""
    for n in range(2):
        for k, c in enumerate([[0, 2], [1, 1]][n]):
            of_input, of_biases = bias_gradients(model, x[n], c)
            expected = sum(psi(product, x.shape[2:]) for product in (of_input, *of_biases))
            torch.testing.assert_close(explained.maps[n, k], expected, rtol=1e-9, atol=1e-12)
    one = camkit.FullGrad(model)(x, [0, 1])
    torch.testing.assert_close(one.maps, explained.maps[:, 0])


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "googlenet"])
def test_gradients_by_input_and_biases_sum_to_the_score(name: str) -> None:
    """FullGrad's completeness, where a network is linear but for ReLUs and max pooling."""
    model = build(name).double()
    x = torch.randn(2, 3, 64, 64).double()
    leaf = x.clone().requires_grad_()
    with BiasRecorder() as biases:
        output = model(leaf)
    scores = output[:, [3, 5]]
    found = products(scores, [(leaf, x), *biases.found])
    total = sum(product.flatten(2).sum(2) for product in found)
    torch.testing.assert_close(total, scores.detach(), rtol=1e-8, atol=1e-8)


def test_guided_backprop_written_out() -> None:
    """Each ReLU of Plain by hand: what arrives positive, where the input was."""
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    leaf = x.clone().requires_grad_()
    below = model.features[:2](leaf)
    lower = below.detach().relu().requires_grad_()
    above = model.features[3:5](lower)
    upper = above.detach().relu().requires_grad_()
    score = model.fc(upper.mean((2, 3)))[torch.arange(2), [1, 3]].sum()
    (arriving,) = torch.autograd.grad(score, upper)
    (arriving,) = torch.autograd.grad(above, lower, arriving.clamp(min=0) * (above > 0))
    (expected,) = torch.autograd.grad(below, leaf, arriving.clamp(min=0) * (below > 0))
    guided = camkit.guided_backprop(model, x, [1, 3])
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-15)
    several = camkit.guided_backprop(model, x, [[1, 0], [3, 3]])
    torch.testing.assert_close(several[:, 0], expected, rtol=1e-9, atol=1e-15)
    assert several.shape == (2, 2, 3, 12, 10)
    explained = camkit.GuidedGradCAM(model)(x, [1, 3])
    up = F.interpolate(camkit.GradCAM(model)(x, [1, 3]).maps[:, None], (12, 10), mode="bilinear")[:, 0]
    torch.testing.assert_close(explained.maps, up * expected.sum(1), rtol=1e-9, atol=1e-15)


def test_guided_backprop_equals_captum() -> None:
    model = build("vgg11").double()
    x = torch.randn(1, 3, 64, 64).double()
    found = camkit.guided_backprop(model, x, 5)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU activations"):
        expected = GuidedBackprop(model).attribute(x.requires_grad_(), 5)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-15)


def test_guided_backprop_of_functions_out_of_modules_leaves_no_trace() -> None:
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    gradient = reference.activation_and_gradient(model, "stem", x[0], lambda y: y[1])[1]
    camkit.guided_backprop(model, x, 1)
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    after = reference.activation_and_gradient(model, "stem", x[0], lambda y: y[1])[1]
    assert torch.equal(after, gradient)


def test_scorecam_of_the_channels_that_vary_most() -> None:
    model, x = tiny(Plain), torch.randn(3, 3, 12, 10).double()
    expected = []
    with torch.no_grad():
        for image, activation in zip(x, model.features(x), strict=True):
            spread = [float(((channel - channel.mean()) ** 2).mean()) for channel in activation]
            chosen = sorted(range(6), key=lambda k: spread[k])[-2:]
            found = torch.zeros(4, 3).double()
            for k in chosen:
                large = F.interpolate(activation[k][None, None], size=(12, 10), mode="bilinear")[0, 0]
                mask = (large - large.min()) / (large.max() - large.min())
                found += model((image * mask)[None]).softmax(1)[0, 1] * activation[k]
            expected.append(found.relu())
    found_by_two = camkit.ScoreCAM(model, channels=2)(x, 1).maps
    torch.testing.assert_close(found_by_two, torch.stack(expected), rtol=1e-9, atol=1e-12)
    everything = camkit.ScoreCAM(model)(x, 1).maps
    assert torch.equal(camkit.ScoreCAM(model, channels=6)(x, 1).maps, everything)
    assert not torch.allclose(found_by_two, everything)
