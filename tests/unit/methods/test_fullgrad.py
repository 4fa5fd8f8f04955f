"""FullGrad against the formula of its paper, written out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from helpers.families import Branching, Plain, Skip, tiny


def bias_gradients(model: nn.Module, image: Tensor, c: int) -> tuple[Tensor, list[Tensor]]:
    """Gradient times input, and gradient times bias for each convolution and normalisation, in order."""
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
    """Scales the magnitudes of a layer to [0, 1], upsamples them to the input and sums over the channels."""
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
