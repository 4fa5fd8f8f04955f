"""The modules of a model: their order and names, and the models that are refused."""

from typing import Any

import pytest
import torch
from torch import nn

import camkit
from camkit.model.modules import (
    has_meta,
    is_compiled,
    layer_name,
    modules_of,
    prototype,
    require_one_run,
    unwrap,
)
from helpers.families import Plain, Transformer, tiny


def test_modules_come_once_and_in_the_order_of_torch() -> None:
    shared = nn.ReLU()
    for model in (Plain(), Transformer(), nn.Sequential(shared, nn.Linear(2, 2), nn.Sequential(shared))):
        assert modules_of(model) == list(model.modules())


def test_a_layer_can_be_the_module_itself() -> None:
    model = Plain()
    assert camkit.GradCAM(model, model.features[2]).layer == "features.2"


def test_a_layer_is_known_by_its_name_in_the_wrapped_model() -> None:
    model = Plain()
    for name in ("features.4", "module.features.4", "_orig_mod.features.4", "module._orig_mod.features.4"):
        assert layer_name(model, name) == "features.4"


def test_a_module_named_like_a_wrapper_keeps_its_name() -> None:
    assert layer_name(nn.DataParallel(nn.Sequential(nn.ReLU())), "module.0") == "module.0"


def test_wrappers_are_taken_off() -> None:
    model = Plain()
    compiled: Any = torch.compile(model, backend="eager")
    assert is_compiled(compiled)
    assert not is_compiled(model)
    for wrapped in (model, nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert unwrap(wrapped) is model


def test_a_layer_must_run_once() -> None:
    require_one_run("conv", 1)
    with pytest.raises(
        ValueError, match="^layer: expected a layer that runs in the forward pass, got 'conv', wh"
    ):
        require_one_run("conv", 0)
    with pytest.raises(
        ValueError, match="^layer: expected a layer that runs once a pass, got 'conv', which ran 3"
    ):
        require_one_run("conv", 3)


def test_the_prototype_is_the_first_parameter_of_floats() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2).half(), nn.Linear(2, 2))
    assert prototype(model) is model.get_parameter("1.weight")
    assert prototype(nn.ReLU()).dtype == torch.get_default_dtype()


def test_tensors_without_numbers_are_seen() -> None:
    model = Plain()
    assert not has_meta(modules_of(model))
    model.features[1].register_buffer("running_mean", torch.zeros(5, device="meta"))
    assert has_meta(modules_of(model))
    assert has_meta(modules_of(nn.Linear(2, 2, device="meta")))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_does_not_run_in_python() -> None:
    message = "^model: expected a module that runs in Python, got a .* of torch.jit; explain the module that"
    scripted: Any = torch.jit.script(tiny(Plain))
    traced: Any = torch.jit.trace(tiny(Plain), torch.rand(2, 3, 12, 10).double())
    for model in (scripted, traced):
        with pytest.raises(TypeError, match=message):
            camkit.GradCAM(model)
