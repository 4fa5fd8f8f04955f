"""The same maps in every number type, memory format and mode of the caller, up to that type's rounding."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit import maps
from helpers.families import Plain, Transformer, tiny
from helpers.fingerprint import fingerprint
from helpers.registry import FEW

# For attention and for an average without a bias there is no rule by which nothing is lost.
pytestmark = pytest.mark.filterwarnings("ignore:RelevanceCAM", "ignore:LIFTCAM")

# How far a heatmap may be off. The output of a layer is rounded by the type's eps, relative to its size. A
# few layers add up to a few of these, and a heatmap divides by the map's span, which is below its size: 8 eps. In
# single precision, in which half types are summed too, a matrix's eigenvectors lose about 30 eps more.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}
HALVES = (torch.float16, torch.bfloat16)
CLASSES = [0, 2]
ON_TOKENS = [
    "GradCAM",
    "HiResCAM",
    "ShapleyCAM",
    "EigenCAM",
    "ScoreCAM",
    "AblationCAM",
    "LIFTCAM",
    "FullGrad",
]
CASES = [
    *((name, Transformer if name == "LeGrad" else Plain) for name in camkit.METHODS),
    *((name, Transformer) for name in ON_TOKENS),
]
each_method = pytest.mark.parametrize(
    ("name", "kind"), CASES, ids=[f"{name}-{kind.__name__}" for name, kind in CASES]
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def network(kind: type[nn.Module], channels: int = 3) -> nn.Module:
    """A tiny network in float64, every class of which has channels that speak for it."""
    torch.manual_seed(0 if kind is Plain else 3)
    model = tiny(kind)
    if isinstance(model, Plain):
        model.features[0] = nn.Conv2d(channels, 5, 3, padding=1).double()
        with torch.no_grad():
            model.fc.weight.abs_()
    return model


def images(channels: int = 3, size: tuple[int, int] = (16, 12)) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0)).double()


def explain(name: str, model: nn.Module, x: Tensor) -> camkit.Explanation:
    method: Any = camkit.METHODS[name]
    explained: camkit.Explanation = method(model, **FEW.get(name, {}))(x, CLASSES)
    return explained


def state() -> tuple[object, ...]:
    """The modes of the caller."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


def checked(
    name: str, model: nn.Module, x: Tensor, mode: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> camkit.Explanation:
    """An explanation that is of the right type and place, and for which nothing has changed."""
    before, numbers = fingerprint(model), x.detach().clone()
    version = None if x.is_inference() else x._version
    shape = x.requires_grad, x.is_leaf, x.stride(), x.data_ptr()
    with mode():
        modes = state()
        explained = explain(name, model, x)
        assert state() == modes
    assert fingerprint(model) == before
    assert (x.requires_grad, x.is_leaf, x.stride(), x.data_ptr()) == shape
    assert x.is_inference() or x._version == version
    assert torch.equal(x, numbers)
    assert x.grad is None if x.is_leaf else True
    modes_of_model = [module.training for module in model.modules()]
    with mode(), torch.no_grad():
        expected = model.eval()(x)
    for module, training in zip(model.modules(), modes_of_model, strict=True):
        module.training = training
    # Attention has another kernel without a gradient.
    rounding = 8 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(explained.output, expected, rtol=rounding, atol=rounding)
    assert explained.maps.device == explained.output.device == x.device
    assert explained.maps.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert not explained.maps.requires_grad
    assert not explained.output.requires_grad
    assert torch.isfinite(explained.maps).all()
    return explained


def close(name: str, found: camkit.Explanation, expected: camkit.Explanation, dtype: torch.dtype) -> None:
    heatmaps = expected.heatmaps()
    assert (heatmaps.amax((1, 2)) == 1).all()  # there is something to see of either image
    off = (found.heatmaps().double() - heatmaps).abs()
    # Where rounding turns a ReLU or the largest of a pool, the gradient by the input jumps at some pixels.
    jumps = name in ("FullGrad", "GuidedGradCAM") and dtype in HALVES
    assert off.quantile(0.95 if jumps else 1.0).item() <= TOLERANCE[dtype]


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_of_numbers(name: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = network(kind), images()
    expected = checked(name, model, x)
    found = checked(name, copy.deepcopy(model).to(dtype), x.to(dtype))
    assert found.output.dtype == dtype
    close(name, found, expected, dtype)


@each_method
def test_the_autocast_of_the_caller(name: str, kind: type[nn.Module]) -> None:
    """The model runs in half precision, and the method's own sums do not."""
    model, x = network(kind), images()
    expected = explain(name, model, x)
    found = checked(name, model.float(), x.float(), lambda: torch.autocast("cpu", torch.bfloat16))
    assert found.output.dtype == torch.bfloat16
    close(name, found, expected, torch.bfloat16)


def test_maps_are_summed_in_their_own_type_under_autocast() -> None:
    weights, activation = torch.rand(1, 1, 40), torch.rand(1, 40, 3, 2) + 100
    expected = maps.weighted_sum(weights.double(), activation.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = maps.weighted_sum(weights, activation)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def untouched(model: nn.Module) -> None:
    pass


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def only_the_head_trains(model: nn.Module) -> None:
    model.requires_grad_(False)
    [*model.children()][-1].requires_grad_(True)


def in_training(model: nn.Module) -> None:
    model.train()


def as_it_is(x: Tensor) -> Tensor:
    return x


def a_leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def in_a_graph(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() * 1


def a_slice(x: Tensor) -> Tensor:
    return torch.cat([x[:1] + 1, x, x])[1:3]


def made_in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


class Same(NamedTuple):
    """A change of the model, the images or the mode that must not change a single bit of a map."""

    about: str
    model: Callable[[nn.Module], None] = untouched
    x: Callable[[Tensor], Tensor] = as_it_is
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext


SAME = [
    Same("no_grad", mode=torch.no_grad),
    Same("inference mode", mode=torch.inference_mode),
    Same("inference mode, input of it", x=made_in_inference_mode, mode=torch.inference_mode),
    Same("input of inference mode", x=made_in_inference_mode),
    Same("training", model=in_training),
    Same("frozen", model=frozen),
    Same("only the head", model=only_the_head_trains),
    Same("an input with a gradient", x=a_leaf),
    Same("an input in a graph", x=in_a_graph),
    Same("all of it", model=frozen, x=a_leaf, mode=torch.no_grad),
    Same("a slice", x=a_slice),
]


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, *(slow(t) for t in (torch.float64, *HALVES))], ids=str)
def test_what_must_not_change_a_bit(name: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = network(kind).to(dtype), images().to(dtype)
    expected = checked(name, model, x)
    for same in SAME:
        other = copy.deepcopy(model)
        same.model(other)
        found = checked(name, other, same.x(x), same.mode)
        # torch has another kernel for attention of which no weight has a gradient.
        if kind is Plain or same.model not in (frozen, only_the_head_trains):
            assert torch.equal(found.maps, expected.maps), same.about
        else:
            close(name, found, expected, dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 3)[..., ::2]


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, *(slow(t) for t in (torch.float32, *HALVES))], ids=str)
def test_other_strides_change_rounding_only(name: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    model, x = network(kind), images()
    expected = explain(name, model, x)
    model = model.to(dtype)
    for strided in (channels_last, transposed, every_other):
        given = strided(x.to(dtype))
        assert not given.is_contiguous()
        close(name, checked(name, model, given), expected, dtype)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    close(name, checked(name, model, channels_last(x.to(dtype))), expected, dtype)


@pytest.mark.parametrize("name", [name for name in camkit.METHODS if name != "LeGrad"])
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (12, 12)), (1, (9, 23)), (13, (12, 12)), (13, (23, 9)), (3, (8, 40))]
)
def test_grey_and_many_channels_of_any_proportions(name: str, channels: int, size: tuple[int, int]) -> None:
    model, x = network(Plain, channels), images(channels, size)
    expected = checked(name, model, x)
    found = checked(name, copy.deepcopy(model).float(), x.float())
    assert found.heatmaps().shape == (2, *size)
    close(name, found, expected, torch.float32)
