"""A pass that records the bias of each layer."""

import pytest
import torch
from torch import nn

from camkit.methods.fullgrad import gradient_times_factor
from camkit.passes.biases import BiasRecorder
from helpers.families import build


def test_each_layer_with_a_bias_is_found_with_what_it_adds() -> None:
    conv, norm, linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Linear(4, 2)
    without = nn.Conv2d(4, 4, 1, bias=False)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 3, 6, 5).requires_grad_()
    with BiasRecorder() as biases:
        output = linear(norm(without(conv(x))).mean((2, 3)))
    torch.testing.assert_close(output, linear(norm(without(conv(x))).mean((2, 3))))
    assert conv.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    factors = [factor for _, factor in biases.found]
    torch.testing.assert_close(
        factors, [conv.bias.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1), linear.bias[None]]
    )
    assert biases.are_maps == [True, True, False]  # a linear layer outputs no feature map
    for zeros, _ in biases.found:
        assert zeros.requires_grad
        assert not zeros.any()


def test_a_batch_normalisation_by_the_batch_itself_adds_its_bias_alone() -> None:
    norm, x = nn.BatchNorm2d(4, track_running_stats=False), torch.randn(2, 4, 3, 3).requires_grad_()
    nn.init.uniform_(norm.bias)
    with BiasRecorder() as biases:
        norm(x)
    ((_, factor),) = biases.found
    torch.testing.assert_close(factor.flatten(), norm.bias.detach())


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "googlenet"])
def test_gradients_by_input_and_biases_sum_to_the_score(name: str) -> None:
    """FullGrad is complete for networks that are linear except for ReLUs and max pooling."""
    model = build(name).double()
    x = torch.randn(2, 3, 64, 64).double()
    leaf = x.clone().requires_grad_()
    with BiasRecorder() as biases:
        output = model(leaf)
    scores = output[:, [3, 5]]
    found = gradient_times_factor(scores, [(leaf, x), *biases.found])
    total = sum(product.flatten(2).sum(2) for product in found)
    torch.testing.assert_close(total, scores.detach(), rtol=1e-8, atol=1e-8)
