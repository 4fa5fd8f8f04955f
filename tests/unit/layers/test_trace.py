"""The record of a dry run: values, operations, and the modules that ran them."""

import threading

from torch import Tensor, nn
from torch.nn import functional as F

from camkit.layers.trace import record
from helpers.fingerprint import fingerprint


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.lock = threading.Lock()  # deepcopy cannot copy a lock

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x))
        F.relu_(x)
        return x.sum((2, 3))


def test_an_in_place_operation_makes_a_new_value_and_dropout_none() -> None:
    trace = record(InPlace(), (2, 3, 8, 8))
    assert [o.name for o in trace.operations] == ["conv2d", "relu", "sum"]
    (conv,) = trace.outputs_of("conv")
    (drop,) = trace.outputs_of("drop")
    assert conv == drop  # in evaluation mode dropout returns its input
    assert trace.operations[2].inputs == trace.operations[1].outputs
    assert trace.operations[1].outputs != (conv,)
    assert [trace.shapes[v] for v in (trace.input, trace.output)] == [(2, 3, 8, 8), (2, 4)]


def test_a_dry_run_leaves_the_model_alone() -> None:
    model = nn.Sequential(InPlace(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = fingerprint(model)
    record(model, (2, 3, 8, 8))
    assert fingerprint(model) == before


def test_between_and_ancestors_follow_values_and_not_time() -> None:
    class Fork(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x.relu()
            x.sigmoid()  # the output does not depend on it
            b = a.exp()
            return a + b

    trace = record(Fork(), (1, 2))
    relu = trace.operations[0].outputs[0]
    assert [o.name for o in trace.between(relu, trace.output)] == ["exp", "add"]
    assert list(trace.ancestors(trace.output))[-1] == trace.input
