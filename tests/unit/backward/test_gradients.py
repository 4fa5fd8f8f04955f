"""The gradients of several scores per image."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.backward.gradients import gradients, gradients_by_each
from helpers.families import Plain, tiny

#: Two heads of layers through which the gradients of up to 16 scores can go together in one backward pass,
#: and a head with a sigmoid, which takes one score at a time.
HEADS: dict[str, nn.Module] = {
    "linear": nn.Linear(6, 20),
    "two layers": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 20)),
    "sigmoid": nn.Sequential(nn.Linear(6, 20), nn.Sigmoid()),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@pytest.mark.parametrize(
    ("head", "count", "passes"),
    [
        ("linear", 1, 1),
        ("linear", 3, 1),
        ("linear", 20, 2),  # one pass takes 16 scores at most
        ("two layers", 3, 1),
        ("two layers", 20, 2),
        ("sigmoid", 1, 1),
        ("sigmoid", 3, 3),
        ("sigmoid", 20, 20),
    ],
)
def test_each_score_has_its_own_gradient(
    head: str, count: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = torch.randn(2, 6).requires_grad_()
    scores = HEADS[head](leaf).gather(1, torch.arange(count).expand(2, count))
    backward, calls = torch.autograd.grad, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return backward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        found = gradients(scores, leaf, keep=True)
    assert len(calls) == passes
    assert found.shape == (2, count, 6)
    assert not found.requires_grad
    for k in range(count):
        (expected,) = torch.autograd.grad(scores[:, k].sum(), leaf, retain_graph=True)
        torch.testing.assert_close(found[:, k], expected)


@heads
def test_a_gradient_can_be_derived_in_its_turn(head: nn.Module) -> None:
    leaf = torch.randn(2, 6).requires_grad_()
    found = gradients(head(leaf)[:, :2].square(), leaf, keep=True, create_graph=True)
    (second,) = torch.autograd.grad(found.square().sum(), leaf)
    assert second.any()


def test_the_graph_is_kept_if_it_is_still_needed() -> None:
    leaf = torch.randn(2, 6).requires_grad_()
    scores = leaf.sigmoid()
    first = gradients(scores, leaf, keep=True)
    torch.testing.assert_close(gradients(scores, leaf), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(scores, leaf)


@pytest.mark.parametrize(("name", "source"), [("conv", "layer 'conv'"), ("", "the input")])
def test_scores_that_do_not_depend_on_the_tensor_are_named(name: str, source: str) -> None:
    leaf, other = torch.randn(2, 6).requires_grad_(), torch.randn(2, 6).requires_grad_()
    message = f"^target: expected a score that depends on {source} through a gradient, got one that does not$"
    for scores in (other * 2, leaf.detach() * 2):
        with pytest.raises(ValueError, match=message):
            gradients(scores, leaf, name)


def test_gradients_by_several_tensors_are_zero_where_no_score_depends_on_one() -> None:
    x, bias, aside = (torch.randn(2, 6).requires_grad_() for _ in range(3))
    scores = torch.stack([(x * x).sum(1), (x * bias).sum(1)], 1)
    by_x, by_bias, by_aside = gradients_by_each(scores, [x, bias, aside])
    torch.testing.assert_close(by_x, torch.stack([2 * x, bias], 1).detach())
    torch.testing.assert_close(by_bias, torch.stack([torch.zeros_like(x), x], 1).detach())
    assert torch.equal(by_aside, torch.zeros(2, 2, 6))
    assert not any(found.requires_grad for found in (by_x, by_bias, by_aside))
    for scores in (bias[:, :1] * 1, x.detach()):
        with pytest.raises(ValueError, match="^target: expected a score that depends on the input through"):
            gradients_by_each(scores, [x, bias])


class NoGradient(torch.autograd.Function):
    """An identity whose backward pass returns None if the gradient of class 0 is zero in all images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return gradient.view(-1).view_as(gradient) if gradient[:, 0].any() else None


def test_a_score_without_a_gradient_among_others_is_named() -> None:
    class Own(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return NoGradient.apply(super().forward(x))  # type: ignore[no-any-return]

    with pytest.raises(
        ValueError, match="^target: expected a score that depends on layer 'features' through"
    ):
        camkit.GradCAM(tiny(Own))(torch.randn(2, 3, 12, 10).double(), [[0, 1], [0, 1]])


def test_nothing_is_reported_in_anomaly_mode(recwarn: pytest.WarningsRecorder) -> None:
    method, x = camkit.GradCAM(tiny(Plain)), torch.randn(2, 3, 12, 10).double()
    expected = method(x, [[0, 1], [0, 1]]).maps
    with torch.autograd.set_detect_anomaly(True):
        torch.testing.assert_close(method(x, [[0, 1], [0, 1]]).maps, expected)
    assert not [w for w in recwarn if "Error detected" in str(w.message)]


def test_a_users_hook_on_the_way_has_its_numbers() -> None:
    """The hook calls ``item()``, which fails if one backward pass computes several gradients.

    Each score then gets a backward pass of its own, so that the hook is called for each.
    """

    class Watched(Plain):
        def forward(self, x: Tensor) -> Tensor:
            features = self.features(x)
            if features.requires_grad:
                features.register_hook(lambda gradient: seen.append(gradient.sum().item()))
            return self.fc(features.mean((2, 3)))  # type: ignore[no-any-return]

    seen: list[float] = []
    x, method = torch.randn(2, 3, 12, 10).double(), camkit.GradCAM(tiny(Watched))
    found = method(x, [[0, 1, 2], [3, 0, 1]]).maps
    assert len(seen) == 3
    alone = [method(x, [[0, 1, 2][k], [3, 0, 1][k]]).maps for k in range(3)]
    torch.testing.assert_close(found, torch.stack(alone, 1))
