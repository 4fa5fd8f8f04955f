"""The gradients of several scores."""

from typing import Any

import pytest
import torch
from torch import Tensor

import camkit
from helpers.families import Plain, tiny


class NoGradient(torch.autograd.Function):
    """Hands on a gradient by none at all, where that is zero."""

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
    """Which several gradients that pass together have not."""

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
