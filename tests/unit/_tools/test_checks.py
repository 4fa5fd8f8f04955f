"""The checks of arguments and the words of their errors."""

import pytest
import torch
from torch import nn

import camkit


def test_warnings_point_to_the_callers_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(320), nn.Linear(320, 2))
    with pytest.warns(UserWarning, match="LIFTCAM") as told:
        camkit.LIFTCAM(model, "1")(torch.rand(1, 3, 12, 10), 1)
    assert told[0].filename == __file__
