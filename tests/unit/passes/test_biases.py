"""A pass that keeps the bias of each layer."""

import pytest
import torch

from camkit.methods.fullgrad import gradient_times_factor
from camkit.passes.biases import BiasRecorder
from helpers.families import build


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "googlenet"])
def test_gradients_by_input_and_biases_sum_to_the_score(name: str) -> None:
    """FullGrad's completeness, where a network is linear but for ReLUs and max pooling."""
    model = build(name).double()
    x = torch.randn(2, 3, 64, 64).double()
    leaf = x.clone().requires_grad_()
    with BiasRecorder() as biases:
        output = model(leaf)
    scores = output[:, [3, 5]]
    found = gradient_times_factor(scores, [(leaf, x), *biases.found])
    total = sum(product.flatten(2).sum(2) for product in found)
    torch.testing.assert_close(total, scores.detach(), rtol=1e-8, atol=1e-8)
