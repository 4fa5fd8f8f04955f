"""Results on a GPU equal those on the CPU, and the model and the process are left as they were found."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import camkit
from helpers.families import NARROW, Plain, Residual, Transformer, build, narrow, tiny
from helpers.fingerprint import fingerprint
from helpers.registry import explainer, make

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # With few channels relevance may go nowhere, and DeepLIFT has no rule for everything.
    pytest.mark.filterwarnings("ignore:RelevanceCAM", "ignore:LIFTCAM"),
]

# Several classes: of one the map may be zero everywhere.
ALL = [[0, 1, 2, 3]] * 2


def same(on_gpu: Tensor, on_cpu: Tensor, tolerance: float = 1e-8) -> None:
    assert on_gpu.is_cuda
    largest = on_cpu.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("name", camkit.METHODS)
def test_every_method(name: str) -> None:
    model = tiny(Transformer if name == "LeGrad" else Plain)
    x = torch.randn(2, 3, 16, 12).double()
    expected = make(name, model)(x, ALL)
    there = deepcopy(model).cuda()
    torch.cuda.manual_seed(7)
    before = fingerprint(there)
    explained = make(name, there)(x.cuda(), ALL)
    assert fingerprint(there) == before
    same(explained.maps, expected.maps)
    same(explained.heatmaps(), expected.heatmaps(), 1e-6)
    same(explained.output, expected.output)


@pytest.mark.parametrize("name", camkit.METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_method_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model = tiny(Transformer if name == "LeGrad" else Plain).to("cuda", dtype)
    explained = make(name, model)(torch.randn(2, 3, 16, 12).to("cuda", dtype), ALL)
    assert torch.isfinite(explained.maps).all()
    assert explained.maps.any()
    assert explained.heatmaps().amax() <= 1


@pytest.mark.parametrize("name", ["GradCAM", "AblationCAM"])
@pytest.mark.parametrize("family", NARROW)
def test_every_family(name: str, family: str) -> None:
    model = narrow(family).double().eval()
    x = torch.randn(2, *NARROW[family].shape).double()
    expected = explainer(name, family, model)(x, ALL)
    there = deepcopy(model).cuda()
    before = fingerprint(there)
    explained = explainer(name, family, there)(x.cuda(), ALL)
    assert fingerprint(there) == before
    # torch's hardswish and hardsigmoid divide by six in single precision there.
    same(explained.maps, expected.maps, 1e-4 if family == "mobilenet_v3_small" else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model, x = tiny(Residual).float(), torch.randn(2, 3, 11, 13)
    expected = camkit.GradCAM(model)(x, 1).heatmaps()
    with torch.autocast("cuda", dtype):
        found = camkit.GradCAM(deepcopy(model).cuda())(x.cuda(), 1).heatmaps()
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0.05)


USES: dict[str, Callable[[Tensor], Any]] = {
    "blend": lambda x: camkit.blend(x, x[:, 0], alpha=0.3),
    "colorize": lambda x: camkit.colorize(x[:, 0]),
    "normalize": camkit.normalize,
    "denormalize": lambda x: camkit.denormalize(x, mean=[0.5] * 3, std=[0.2] * 3),
}


@pytest.mark.parametrize("use", USES)
def test_pictures(use: str) -> None:
    x = torch.rand(2, 3, 12, 10)
    same(USES[use](x.cuda()), USES[use](x), 1e-6)


def test_overlays_are_the_same_pictures() -> None:
    x, heatmap = torch.rand(3, 12, 10), torch.rand(12, 10)
    on_gpu, on_cpu = camkit.overlay(x.cuda(), heatmap.cuda()), camkit.overlay(x, heatmap)
    assert on_gpu.tobytes() == on_cpu.tobytes()


def test_a_new_head_and_its_maps() -> None:
    net = camkit.attach_gap_head(build("resnet18"), 5).double()
    x = torch.randn(2, 3, 64, 48).double()
    expected = net.class_maps(x)
    there = net.cuda()
    same(there.class_maps(x.cuda()).maps, expected.maps)
    same(camkit.CAM(there)(x.cuda(), 3).maps, expected.maps[:, 3])


def test_views_and_guided_backpropagation() -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    there = deepcopy(model).cuda()
    same(camkit.guided_backprop(there, x.cuda(), ALL), camkit.guided_backprop(model, x, ALL))
    views = camkit.noise_views(samples=3)
    expected = camkit.Smoothed(camkit.GradCAM(model), views)(x, ALL).maps
    same(camkit.Smoothed(camkit.GradCAM(there), views)(x.cuda(), ALL).maps, expected)


def test_maps_to_train_through() -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    there = deepcopy(model).cuda()
    for net, images in ((model, x), (there, x.cuda())):
        camkit.GradCAM(net, differentiable=True)(images, ALL).maps.square().sum().backward()
    for parameter, expected in zip(there.parameters(), model.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if parameter.grad is not None and expected.grad is not None:
            same(parameter.grad, expected.grad)


def test_targets_may_be_on_either_device() -> None:
    model, x = tiny(Plain).cuda(), torch.randn(2, 3, 12, 10).double().cuda()
    classes = torch.tensor([1, 2])
    method = camkit.GradCAM(model)
    assert torch.equal(method(x, classes).maps, method(x, classes.cuda()).maps)
