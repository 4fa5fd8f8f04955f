"""DeepLIFT's rescale rule against the rule written out by hand, and its completeness.

Complete means that the contributions sum to the difference of the scores.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import Inputs
from camkit.backward.deeplift import Recorded, multipliers
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.methods.relevance import contributions
from camkit.passes.evidence import gather
from helpers import reference
from helpers.families import Branching, Digits, Plain, Residual, tiny


def multiplier_of(function: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> Tensor:
    """The multiplier of a function at ``x`` for a given reference input."""
    with Recorded(reference) as recorded:
        function(reference)
    start = x.clone().requires_grad_()
    with multipliers(start, recorded):
        output = function(start)
    torch.testing.assert_close(output.detach(), function(x.clone()))
    (found,) = torch.autograd.grad(output.sum(), start)
    return found


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, F.relu, F.gelu], ids=lambda f: f.__name__)
def test_the_multiplier_of_a_function_is_its_quotient_of_differences(
    function: Callable[[Tensor], Tensor],
) -> None:
    x, reference = torch.randn(2, 6).double(), torch.randn(2, 6).double()
    expected = (function(x) - function(reference)) / (x - reference)
    torch.testing.assert_close(multiplier_of(function, x, reference), expected)


def test_where_both_inputs_are_equal_the_multiplier_is_the_derivative() -> None:
    x = torch.randn(2, 6).double()
    torch.testing.assert_close(multiplier_of(torch.tanh, x, x.clone()), 1 - x.tanh() ** 2)


def test_max_pooling_gives_its_difference_to_the_position_that_made_it() -> None:
    x = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]])
    reference = torch.tensor([[[2.0, 0.0, 6.0, 5.0]]])
    found = multiplier_of(lambda t: F.max_pool1d(t, 2), x, reference)
    # The maximum of the first window rises from 2 to 4, and that of the second falls from 6 to 3. Each change
    # goes to the position of the larger maximum: that of x in the first window, that of the reference in the
    # second.
    assert (found * (x - reference)).tolist() == [[[0, 2, -3, 0]]]


def test_lift_cam_of_two_linear_layers_with_tanh() -> None:
    """The rescale rule by hand, on the head of Residual."""
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    first, _, second = model.head
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    w1, b1, w2 = first.weight.detach(), first.bias.detach(), second.weight.detach()
    explained = camkit.LIFTCAM(model)(x, [4, 1])
    for n, c in enumerate([4, 1]):
        a = reference.activation_at(model, "out", x[n])
        mean = a.mean((1, 2))
        weights = []
        for k in range(len(a)):
            contribution = 0.0
            for j in range(len(w1)):
                hidden, base = w1[j] @ mean + b1[j], b1[j]
                contribution += float(
                    w2[c, j] * (hidden.tanh() - base.tanh()) / (hidden - base) * w1[j, k] * mean[k]
                )
            weights.append(contribution)
        torch.testing.assert_close(explained.maps[n], reference.weighted(a, weights), rtol=1e-9, atol=1e-13)


def test_lift_cam_through_relu_max_pooling_and_two_linear_layers() -> None:
    model, x = tiny(Digits), torch.randn(1, 1, 28, 28).double()
    w1, b1, w2 = model.fc1.weight.detach(), model.fc1.bias.detach(), model.fc2.weight.detach()
    a = reference.activation_at(model, "conv2", x[0])
    small = F.max_pool2d(a.relu(), 2)
    hidden = w1 @ small.flatten() + b1
    slopes = (hidden.relu() - b1.relu()) / (hidden - b1)
    contributions = ((w2[7] * slopes) @ w1 * small.flatten()).reshape(small.shape)
    weights = [
        float(channel.sum()) for channel in contributions
    ]  # max pooling keeps a contribution within its channel
    expected = reference.weighted(a, weights)
    torch.testing.assert_close(camkit.LIFTCAM(model)(x, 7).maps[0], expected, rtol=1e-9, atol=1e-12)


def test_lift_cam_through_a_relu_over_positions() -> None:
    model, x = tiny(Branching), torch.randn(1, 1, 6, 8).double()
    a = reference.activation_at(model, "mix", x[0])
    weights = (model.classifier.weight[2] * a.relu().mean((1, 2))).tolist()
    torch.testing.assert_close(
        camkit.LIFTCAM(model)(x, 2).maps[0], reference.weighted(a, weights), rtol=1e-9, atol=0
    )


class Mixed(nn.Module):
    """Uses every kind of function that DeepLIFT has a rule for, both in place and out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(80, 6), nn.Sigmoid(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.stem(x)), inplace=True)
        y = self.conv(x)
        y += x
        y = F.silu(F.max_pool2d(F.relu_(y), 2)) + F.avg_pool2d(torch.tanh(x), 2)
        return self.fc(y)  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["stem", "norm", "conv"]))
def test_contributions_sum_to_the_difference_of_the_scores(seed: int, layer: str) -> None:
    torch.manual_seed(seed)
    model, x = tiny(Mixed), torch.randn(2, 3, 12, 10).double()
    place = locate(DryRun.of(model, (2, 3, 12, 10)), layer)
    (evidence,) = gather(model, Inputs(x), [[0, 1], [2, 0]], [place], gradient=False)
    weights, differences = contributions(evidence)
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: torch.zeros_like(output)
    )
    without = model(x).detach()
    handle.remove()
    expected = (model(x).detach() - without).gather(1, torch.tensor([[0, 1], [2, 0]]))
    torch.testing.assert_close(differences, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.sum(2), expected, rtol=1e-8, atol=1e-11)


def test_liftcam_refuses_what_chooses_by_numbers() -> None:
    """The model selects channels by their values, as a detector selects boxes.

    Its run on an activation of zeros therefore does other operations.
    """

    class Chooses(Plain):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x).mean((2, 3))
            chosen = F.relu(f[:, f[0] > 0])
            return torch.stack([chosen.sum(1), f.sum(1)], 1)

    message = (
        "^model: expected one that does the same with an activation of zeros, .* got one that chooses by"
    )
    with pytest.raises(ValueError, match=message):
        camkit.LIFTCAM(tiny(Chooses), "features")(torch.rand(2, 3, 12, 10).double(), 0)
