"""LIFT-CAM's weights against the exact Shapley values of the channels, by enumeration of all coalitions.

A channel outside the coalition is zero at the layer, and the worth of a coalition is its score.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import Explainer, maps
from camkit.methods import gradient, relevance

CLASSES = 5


def worths(head: Callable[[Tensor], Tensor], activation: Tensor, classes: Tensor) -> Tensor:
    """The scores ``(2^C, N)`` of all coalitions; channel k is in those whose number has bit k."""
    channels = activation.shape[1]
    inside = torch.tensor([[s >> k & 1 for k in range(channels)] for s in range(2**channels)]).bool()
    with torch.no_grad():
        scores = [
            head(torch.where(inside[:, :, None, None], image, 0))[:, c]
            for image, c in zip(activation, classes.tolist(), strict=True)
        ]
    return torch.stack(scores, 1)


def shapley(worth: Tensor) -> Tensor:
    """The Shapley values ``(N, C)`` by their definition, of worths ``(2^C, N)``."""
    channels = len(worth).bit_length() - 1
    values = torch.zeros(worth.shape[1], channels, dtype=worth.dtype)
    for k in range(channels):
        for s in range(len(worth)):
            if not s >> k & 1:
                size = s.bit_count()
                share = math.factorial(size) * math.factorial(channels - size - 1) / math.factorial(channels)
                values[:, k] += share * (worth[s | 1 << k] - worth[s])
    return values


def weights(method: Callable[..., Explainer], model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """The weights of the channels of a method, ``(N, C)``."""
    kept: list[Tensor] = []
    its_own = maps.weighted_sum

    def weighted_sum(weights: Tensor, activation: Tensor) -> Tensor:
        kept.append(weights)
        return its_own(weights, activation)

    with ExitStack() as stack:
        for module in (maps, gradient, relevance):
            stack.enter_context(mock.patch.object(module, "weighted_sum", weighted_sum))
        method(model, "0")(x, classes)
    (found,) = kept
    return found[:, 0]


def network(*head: nn.Module, channels: int = 8) -> nn.Sequential:
    """Two convolutions with ReLUs, then the head."""
    features = nn.Sequential(
        nn.Conv2d(1, channels, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(features, nn.Sequential(*head)).double().eval()


def perceptron(function: Callable[[], nn.Module] = nn.ReLU, channels: int = 8) -> list[nn.Module]:
    """Global pooling, and two hidden layers."""
    hidden = [nn.Linear(channels, 24), function(), nn.Linear(24, 24), function(), nn.Linear(24, CLASSES)]
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *hidden]


def gratings(count: int) -> tuple[Tensor, Tensor]:
    """Noisy waves, and which of the directions theirs is."""
    classes, phase = torch.randint(CLASSES, (count,)), 2 * math.pi * torch.rand(count, 1, 1)
    angle = (classes * math.pi / CLASSES)[:, None, None]
    at = torch.arange(16) - 7.5
    along = at[:, None] * angle.sin() + at * angle.cos()
    return ((1.2 * along + phase).cos() + 0.7 * torch.randn(count, 16, 16))[:, None].double(), classes


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        x, classes = gratings(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the channels, of each image."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def test_the_reference_on_a_game_with_known_values() -> None:
    """One left glove and two right ones: who has the left one gets two thirds of a pair's worth."""
    worth = torch.tensor([[float(s & 1 and s > 1)] for s in range(8)])
    torch.testing.assert_close(shapley(worth), torch.tensor([[2 / 3, 1 / 6, 1 / 6]]))


@pytest.mark.parametrize("function", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_shares_sum_to_the_whole(function: type[nn.Module]) -> None:
    """Efficiency: both the exact values and LIFT-CAM's weights sum to the score less the score of zeros."""
    model = network(*perceptron(function))
    x, classes = gratings(10)
    worth = worths(model[1], model[0](x), classes)
    chosen = model(x)[range(10), classes].detach()
    nothing = model[1](torch.zeros(1, 8, 8, 8).double())[0, classes].detach()
    assert (chosen - nothing).abs().min() > 1e-6
    torch.testing.assert_close(shapley(worth).sum(1), chosen - nothing, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        weights(camkit.LIFTCAM, model, x, classes).sum(1), chosen - nothing, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "function",
    [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus],
)
def test_exact_where_channels_do_not_meet(function: type[nn.Module]) -> None:
    """Each channel has a nonlinear way of its own to the score: DeepLIFT gives its Shapley value."""
    apart = (
        nn.Conv2d(8, 8, 3, groups=8),
        function(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 2, groups=8),
        function(),
    )
    model = network(nn.MaxPool2d(2, 1), *apart, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    x, classes = gratings(10)
    exact = shapley(worths(model[1], model[0](x).detach(), classes))
    assert exact.abs().amax(1).min() > 1e-4
    torch.testing.assert_close(weights(camkit.LIFTCAM, model, x, classes), exact, rtol=0, atol=1e-12)
    assert similarity(weights(camkit.GradCAM, model, x, classes), exact).mean() < 0.9


def test_one_channel_has_the_whole() -> None:
    model = network(*perceptron(channels=1), channels=1)
    x, classes = gratings(10)
    exact = shapley(worths(model[1], model[0](x).detach(), classes))
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(weights(camkit.LIFTCAM, model, x, classes), exact, rtol=0, atol=1e-12)


def test_a_channel_that_is_zero_has_no_share() -> None:
    """Grad-CAM, in contrast, gives it a share."""
    model = network(*perceptron())
    model.get_parameter("0.3.bias").data[2] = -100
    x, classes = gratings(10)
    assert not shapley(worths(model[1], model[0](x).detach(), classes))[:, 2].any()
    assert not weights(camkit.LIFTCAM, model, x, classes)[:, 2].any()
    assert weights(camkit.GradCAM, model, x, classes)[:, 2].any()


def test_ablation_cams_weights_are_what_the_last_to_come_brings() -> None:
    """So the passes with other activations at the layer are passes of the head."""
    model = network(*perceptron())
    x, classes = gratings(10)
    worth = worths(model[1], model[0](x).detach(), classes)
    without = torch.stack([worth[255 - 2**k] for k in range(8)], 1)
    expected = (worth[255, :, None] - without) / worth[255, :, None]
    torch.testing.assert_close(
        weights(camkit.AblationCAM, model, x, classes), expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("steps", [0, 100], ids=["random", "trained"])
@pytest.mark.parametrize("function", [nn.ReLU, nn.SiLU])
def test_lift_cam_is_nearer_to_the_shapley_values_than_grad_cam(
    function: type[nn.Module], steps: int
) -> None:
    lift, grad = [], []
    for _ in range(4):
        model = network(*perceptron(function))
        train(model, steps)
        x, _ = gratings(12)
        classes = model(x).argmax(1)
        exact = shapley(worths(model[1], model[0](x).detach(), classes))
        lift.append(similarity(weights(camkit.LIFTCAM, model, x, classes), exact))
        grad.append(similarity(weights(camkit.GradCAM, model, x, classes), exact))
        assert lift[-1].mean() > grad[-1].mean()
    nearer = torch.cat(lift) > torch.cat(grad)
    assert torch.cat(lift).mean() > 0.95
    assert torch.cat(grad).mean() < 0.9
    assert nearer.double().mean() > 0.9
