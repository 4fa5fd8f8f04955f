"""The modules of a model: their order, their names, and models that are refused."""

from typing import Any

import pytest
import torch

import camkit
from helpers.families import Plain, tiny


def test_a_layer_can_be_the_module_itself() -> None:
    model = Plain()
    assert camkit.GradCAM(model, model.features[2]).layer == "features.2"


X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_does_not_run_in_python() -> None:
    message = "^model: expected a module that runs in Python, got a .* of torch.jit; explain the module that"
    scripted: Any = torch.jit.script(tiny(Plain))
    traced: Any = torch.jit.trace(tiny(Plain), X)
    for model in (scripted, traced):
        with pytest.raises(TypeError, match=message):
            camkit.GradCAM(model)
