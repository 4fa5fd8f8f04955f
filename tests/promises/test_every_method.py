"""Properties that hold for every method of the registry."""

import gc
import inspect
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import camkit
from helpers.families import Plain, Residual, tiny
from helpers.fingerprint import bits, hooks_of, process
from helpers.registry import images, make, network

SEEDED = [name for name, method in camkit.METHODS.items() if hasattr(method, "seed")]
# The methods that explain any one layer. FullGrad, LeGrad and PolyCAM use several layers by themselves, and
# CAM explains only the layer before the pooling.
ONE_LAYER = [name for name in camkit.METHODS if name not in ("FullGrad", "LeGrad", "PolyCAM", "CAM")]


def test_the_registry_names_every_method() -> None:
    public = {name for name in camkit.__all__ if hasattr(getattr(camkit, name), "formula")}
    assert public - {"Explainer"} == set(camkit.METHODS)
    for name, method in camkit.METHODS.items():
        assert method.__name__ == name
        for text in (method.formula, method.paper, method.passes):
            assert text.strip(), name
        assert isinstance(method.needs_gradient, bool)


def test_the_readme_names_every_method() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert {name for name in camkit.METHODS if not re.search(rf"`{name}`", readme)} == set()


@pytest.mark.parametrize("name", camkit.METHODS)
def test_every_docstring_says_what_a_reader_asks(name: str) -> None:
    text = " ".join((camkit.METHODS[name].__doc__ or "").split())
    for part in ("For the shared arguments, see :class:`camkit.Explainer`.", "Departs from the paper:"):
        assert part in text, part
    assert "References:" in text or name == "RandomCAM"


@pytest.mark.parametrize("name", camkit.METHODS)
def test_every_formula_defines_the_map_and_stands_once(name: str) -> None:
    """The documentation inserts the attribute into the docstring, which does not repeat it."""
    assert camkit.METHODS[name].formula.startswith("M = ")
    assert ".. math::" not in (camkit.METHODS[name].__doc__ or "")


@pytest.mark.parametrize("name", camkit.METHODS)
def test_every_docstring_describes_the_arguments_of_its_method_alone(name: str) -> None:
    method = camkit.METHODS[name]
    # A method that redefines the field ``fuse`` does not take it as an argument.
    own = inspect.get_annotations(method).keys() - {"fuse"}
    text = (method.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"^ {8}(\w+):", text, re.MULTILINE)) == own


@pytest.mark.parametrize("name", camkit.METHODS)
@settings(deadline=None, max_examples=4)
@given(st.permutations(range(3)), st.integers(0, 2**31 - 1))
def test_an_image_is_explained_the_same_in_any_batch(name: str, order: list[int], seed: int) -> None:
    method = make(name, tiny(network(name)))
    x, classes = images(name, 3, seed), torch.tensor([0, 1, 3])
    together = method(x, classes).maps
    torch.testing.assert_close(method(x[order], classes[order]).maps, together[order])
    torch.testing.assert_close(method(x[1:2], 1).maps[0], together[1])


def permuted(model: Plain, order: list[int]) -> nn.Module:
    """The same network with the last convolution's channels in another order."""
    last, linear = model.features[4], model.fc
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        last.weight.copy_(last.weight[order].clone())
        last.bias.copy_(last.bias[order].clone())
        linear.weight.copy_(linear.weight[:, order].clone())
    return model


@pytest.mark.parametrize("name", [n for n in camkit.METHODS if n not in ("LeGrad", "RandomCAM", "SSCAM")])
@settings(deadline=None, max_examples=3)
@given(st.permutations(range(6)))
def test_the_order_of_the_channels_does_not_matter(name: str, order: list[int]) -> None:
    model, x = Plain().double().eval(), images(name, 2)
    before = make(name, model)(x, 1).maps
    torch.testing.assert_close(make(name, permuted(model, order))(x, 1).maps, before)


@pytest.mark.filterwarnings("ignore:RelevanceCAM")
@pytest.mark.parametrize("name", camkit.METHODS)
def test_nothing_stays_alive_but_the_result(name: str) -> None:
    """Ten calls and ten failing calls leave no tensor and no hook, and fewer than ten other objects."""
    model = tiny(network(name))
    method, x = make(name, model), images(name, 2)

    def alive() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(one), Tensor) for one in objects), hooks_of(model), len(objects)

    def call(times: int) -> None:
        for _ in range(times):
            method(x, [[0, 1], [2, 3]])
            with pytest.raises(ValueError, match="^target: expected a class index"):
                method(x, 99)

    call(2)
    *before, objects = alive()
    call(10)
    *after, more = alive()
    assert after == before
    assert more - objects < 10  # a leak of one object per call would make it ten


@pytest.mark.filterwarnings("ignore:RelevanceCAM")
@pytest.mark.parametrize("name", camkit.METHODS)
def test_a_call_leaves_no_circles_to_collect(name: str) -> None:
    """Otherwise its tensors and other objects would stay in memory until the garbage collector runs."""
    method, x = make(name, tiny(network(name))), images(name, 2)
    method(x, 1)  # this first call makes the dry run
    gc.collect()
    gc.disable()
    try:
        method(x, 1)
        assert gc.collect() == 0
    finally:
        gc.enable()


# Two warnings are expected. With only six channels a class may have no positive weight, and then its
# relevance is lost. DeepLIFT has no rule for the softmax in a target.
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM", "ignore:LIFTCAM")


@lost
@pytest.mark.parametrize("name", camkit.METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_of_the_caller_and_a_frozen_model(name: str, mode: Any) -> None:
    model, x = tiny(network(name)), images(name, 2)
    expected = make(name, model)(x, 1)
    model.requires_grad_(False)
    with mode():
        explained = make(name, model)(x.clone(), 1)
    torch.testing.assert_close(explained.maps, expected.maps, rtol=1e-12, atol=1e-14)
    assert not explained.maps.requires_grad
    assert not explained.output.requires_grad


@lost
@pytest.mark.parametrize("name", [n for n in camkit.METHODS if n != "CAM"])
def test_any_function_of_the_output_and_any_kind_of_it(name: str) -> None:
    class Wrapped(network(name)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return {"more": [x], "logits": super().forward(x)}

    model, x = tiny(Wrapped), images(name, 2)
    method = make(name, model)
    of_class = method(x, camkit.targets.key("logits", [2, 0]))
    assert torch.equal(of_class.maps, method(x, camkit.targets.key("logits", [[2, 1], [0, 1]])).maps[:, 0])
    of_predicted = method(x, "logits")
    predicted = of_predicted.output["logits"].argmax(1)
    torch.testing.assert_close(of_predicted.maps, method(x, camkit.targets.key("logits", predicted)).maps)
    of_function = method(x, lambda output: output["logits"].softmax(1)[:, [2, 0]])
    assert of_function.maps.shape == (2, 2, *of_class.maps.shape[1:])
    # This target reads another column for each image. An image must not get the column of another image, even
    # if the passes are split into chunks.
    own = torch.tensor([2, 0])
    each = method(x, lambda output: output["logits"].softmax(1)[torch.arange(2), own])
    torch.testing.assert_close(each.maps[0], of_function.maps[0, 0])
    torch.testing.assert_close(each.maps[1], of_function.maps[1, 1])


@lost
@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_constant_activation_has_an_empty_heatmap(name: str, dtype: torch.dtype, value: float) -> None:
    model, x = Plain().eval().to(dtype), images(name, 2).to(dtype)
    last = model.features[4]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, value)
    explained = make(name, model)(x, 1)
    if value == 0:
        assert torch.equal(explained.maps, torch.zeros_like(explained.maps))
    assert torch.isfinite(explained.maps).all()
    if name != "GuidedGradCAM":
        assert not explained.heatmaps().any()


@pytest.mark.parametrize("name", [n for n in camkit.METHODS if camkit.METHODS[n].needs_gradient])
def test_a_score_without_a_gradient_is_named(name: str) -> None:
    method = make(name, tiny(network(name)))
    with pytest.raises(
        ValueError, match=r"^target: expected a score that depends on .* through a gradient, got one"
    ):
        method(images(name, 2), lambda output: output.detach()[:, 0])


@pytest.mark.parametrize("name", [n for n in ONE_LAYER if not camkit.METHODS[n].needs_gradient])
def test_what_needs_no_gradient_makes_no_graph(name: str) -> None:
    model, seen = tiny(Plain), []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    make(name, model)(images(name, 2), 1)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_layer_without_a_grid_is_named(name: str) -> None:
    message = (
        "^layer: expected a layer whose output has a spatial size, got 'fc', whose output is 4; camkit.list"
    )
    with pytest.raises(ValueError, match=message):
        make(name, Plain(), "fc")(images(name, 1).float())


@lost
@pytest.mark.parametrize("name", camkit.METHODS)
def test_the_same_call_gives_the_same_bytes(name: str) -> None:
    """They depend on the ``seed`` of the method, if it has one, but not on the global random states."""
    # With a linear head the gradient would be the same for any noise; Residual has a nonlinear head.
    model, x = tiny(Residual if name in SEEDED else network(name)), images(name, 2)
    before = process()
    first = make(name, model)(x, 1).maps
    assert process() == before
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert bits(make(name, model)(x, 1).maps) == bits(first)
    if name in SEEDED:
        before = process()
        assert bits(make(name, model, seed=1)(x, 1).maps) != bits(first)
        assert process() == before
