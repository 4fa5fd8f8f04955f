"""A stand-in for a model, whose modules are new so that the user's modules stay as they are."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import camkit
from camkit.layers.trace import record
from camkit.model.standin import skeleton
from helpers.written import Model


def test_a_users_hooks_fire_for_no_pass_but_the_users() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    seen: list[str] = []
    model.f.register_forward_hook(lambda m, a, out: seen.append(out.device.type))
    model.f.register_forward_pre_hook(lambda m, a: seen.append(a[0].device.type))
    camkit.GradCAM(model)(torch.rand(2, 3, 32, 24))
    assert seen == ["cpu", "cpu"]  # the explained pass only
    camkit.attach_gap_head(model, 2, input_shape=(3, 32, 24))
    assert seen == ["cpu", "cpu"]


def test_an_infinite_wait_is_none() -> None:
    """A dict attribute that contains itself is copied without endless recursion."""
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    notes: dict[str, Any] = {}
    notes["self"] = notes
    vars(model)["notes"] = notes
    assert math.isfinite(camkit.GradCAM(model)(torch.rand(1, 3, 32, 24)).maps.sum())


def test_a_skeleton_is_new_modules_on_meta_that_share_what_they_share() -> None:
    block = nn.Linear(3, 3)
    model = nn.Sequential(block, block, nn.Linear(3, 3))
    model[2].weight = block.weight
    copy = skeleton(model)
    assert isinstance(copy, nn.Sequential)
    assert copy[0] is copy[1]
    assert copy[0] is not block
    assert copy[0].weight is copy[2].weight
    assert {p.device.type for p in copy.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_skeleton_follows_methods_and_lists_that_hold_modules() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.plain_list = [self.conv]
            self.forward = self.run

        def run(self, x: Tensor) -> Tensor:
            return self.plain_list[0](x)  # type: ignore[no-any-return]

    trace = record(Odd(), (2, 1, 5, 5))
    assert trace.shapes[trace.output] == (2, 2, 3, 3)
