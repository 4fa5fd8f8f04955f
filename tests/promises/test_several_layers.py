"""``layer=[a, b]``: one explanation from several layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import camkit
from camkit import maps
from helpers.families import Branching, ChannelsLast, Plain, Residual, Tokens, tiny
from helpers.fingerprint import fingerprint

METHODS = [camkit.GradCAM, camkit.LayerCAM, camkit.HiResCAM, camkit.EigenCAM, camkit.ScoreCAM]


class Case(NamedTuple):
    """A network, the shape of one input, and layers in the order in which they run."""

    model: type[nn.Module]
    shape: tuple[int, int, int]
    layers: list[str]


CASES = [
    Case(Plain, (3, 12, 10), ["features.0", "features.3", "features"]),
    Case(Residual, (3, 11, 13), ["stem", "norm", "body", "out"]),
    Case(ChannelsLast, (3, 16, 12), ["patches", "norm"]),  # NCHW and NHWC
    Case(Tokens, (3, 16, 12), ["patches", "norm1"]),  # NCHW and tokens
    Case(Branching, (1, 6, 8), ["left", "right", "mix"]),  # parallel branches
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.__name__)


def images(case: Case, count: int = 2) -> Tensor:
    return torch.randn(count, *case.shape).double()


@cases
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("target", [None, [2, 0], [[0, 1, 2], [2, 2, 0]]], ids=["None", "N", "N x K"])
def test_parts_are_the_explanations_of_one_layer(kind: Any, case: Case, target: Any) -> None:
    model, x = tiny(case.model), images(case)
    for given in (case.layers, tuple(case.layers[::-1])):  # the order of the argument does not matter
        explained = kind(model, layer=given)(x, target)
        assert explained.layer == ", ".join(case.layers)
        assert [part.layer for part in explained.parts] == case.layers
        for part in explained.parts:
            alone = kind(model, layer=part.layer)(x, target)
            assert_close(part.maps, alone.maps, rtol=0, atol=1e-12)
            assert torch.equal(part.target, alone.target)
            assert (part.input_size, part.parts, alone.parts) == (case.shape[1:], (), ())
        assert any(part.maps.abs().amax() > 1e-6 for part in explained.parts)
        assert_close(explained.output, alone.output, rtol=0, atol=1e-12)
        assert torch.equal(explained.target, alone.target)


@cases
@pytest.mark.parametrize("fuse", ["mean", "product", "hierarchical"])
@pytest.mark.parametrize("target", [[2, 0], [[0, 1, 2], [2, 2, 0]]], ids=["N", "N x K"])
def test_the_maps_are_the_parts_fused_from_the_shallowest_on(case: Case, fuse: str, target: Any) -> None:
    model, x = tiny(case.model), images(case)
    explained = camkit.HiResCAM(model, case.layers[::-1], fuse=fuse)(x, target)
    one = torch.tensor(target).ndim == 1
    parts = [part.maps[:, None] if one else part.maps for part in explained.parts]
    fused = maps.fuse(parts, fuse)
    assert_close(explained.maps, fused[:, 0] if one else fused, rtol=1e-12, atol=0)
    assert explained.maps.abs().amax() > 1e-6 or fuse == "product"
    assert explained.heatmaps().shape == (*explained.maps.shape[:-2], *case.shape[1:])


def test_the_mean_is_the_default() -> None:
    model, x = tiny(Plain), images(CASES[0])
    layers = ["features.0", "features"]
    by_default, mean = camkit.LayerCAM(model, layers)(x, 1), camkit.LayerCAM(model, layers, fuse="mean")(x, 1)
    assert torch.equal(by_default.maps, mean.maps)
    assert not torch.equal(by_default.maps, camkit.LayerCAM(model, layers, fuse="product")(x, 1).maps)


@pytest.mark.parametrize("kind", METHODS)
def test_modules_in_the_place_of_names(kind: Any) -> None:
    model, x = tiny(Residual), images(CASES[1])
    of_names = kind(model, ["stem", "out"])(x, 1)
    of_modules = kind(model, [model.out, "stem"])(x, 1)
    assert of_modules.layer == "stem, out"
    assert torch.equal(of_modules.maps, of_names.maps)


def test_a_list_of_one_layer_is_that_layer() -> None:
    model, x = tiny(Plain), images(CASES[0])
    listed, alone = camkit.GradCAM(model, ["features.3"])(x, 1), camkit.GradCAM(model, "features.3")(x, 1)
    assert torch.equal(listed.maps, alone.maps)
    assert (listed.layer, listed.parts) == ("features.3", ())


def test_one_layer_inside_another() -> None:
    model, x = tiny(Plain), images(CASES[0])
    explained = camkit.HiResCAM(model, ["features", "features.4"])(x, 1)
    assert explained.layer == "features.4, features"
    for part in explained.parts:
        assert_close(part.maps, camkit.HiResCAM(model, part.layer)(x, 1).maps, rtol=0, atol=1e-12)


@cases
def test_frozen_models(case: Case) -> None:
    model, x = tiny(case.model), images(case)
    expected = camkit.HiResCAM(model, case.layers)(x, [[0, 1]] * 2)
    explained = camkit.HiResCAM(model.requires_grad_(False), case.layers)(x, [[0, 1]] * 2)
    for part, one in zip(explained.parts, expected.parts, strict=True):
        assert_close(part.maps, one.maps, rtol=0, atol=1e-12)


def count_passes(model: nn.Module) -> dict[str, int]:
    """Counts the runs of each module from now on, except dry runs, which use no real numbers."""
    runs: dict[str, int] = {}

    def counted(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if args[0].device.type == "cpu":
                runs[name] = runs.get(name, 0) + 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(counted(name))
    return runs


@cases
@pytest.mark.parametrize("kind", [camkit.GradCAM, camkit.LayerCAM, camkit.HiResCAM, camkit.EigenCAM])
def test_one_pass_serves_all_layers(case: Case, kind: Any) -> None:
    model, x = tiny(case.model), images(case)
    method, runs = kind(model, case.layers), count_passes(model)
    method(x, [[0, 1, 2]] * 2)
    assert set(case.layers) | {""} <= runs.keys()
    assert set(runs.values()) == {1}


def test_one_first_pass_serves_score_cam() -> None:
    model, x = tiny(Plain), images(CASES[0])
    runs = count_passes(model)
    camkit.ScoreCAM(model, ["features.0", "features"], chunk_size=4)(x)
    assert runs[""] == 1 + 3 + 3  # 5 and 6 channels in chunks of two, each on two images


@pytest.mark.parametrize("kind", METHODS)
def test_the_model_is_left_as_found(kind: Any) -> None:
    model, x = tiny(Plain).train(), images(CASES[0])
    before = fingerprint(model)
    kind(model, ["features.0", "features"])(x)
    with pytest.raises(ValueError, match="^target: expected a class index"):
        kind(model, ["features.0", "features"])(x, 9)
    with pytest.raises(
        ValueError, match="^layer: expected a layer whose output has a spatial size, got 'fc'"
    ):
        kind(model, ["features.0", "fc"])(x)
    assert fingerprint(model) == before
