"""A context that replaces the backward pass of functions by rules."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from helpers.families import Plain, tiny


@pytest.mark.parametrize("method", [camkit.LIFTCAM, camkit.GuidedGradCAM])
def test_a_number_made_of_a_tensor_is_no_operation_in_place(method: Any) -> None:
    class Counts(Plain):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            steps = int(f.sum()) * 0 + 1
            return self.fc(F.relu(f.mean((2, 3)))) / steps  # type: ignore[no-any-return]

    model, x = tiny(Counts), torch.rand(2, 3, 12, 10).double()
    plain = nn.Sequential(
        OrderedDict(features=model.features, mean=Mean(), relu=nn.ReLU(), fc=model.fc)
    ).eval()
    torch.testing.assert_close(method(model, "features")(x, 1).maps, method(plain, "features")(x, 1).maps)


class Mean(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return f.mean((2, 3))
