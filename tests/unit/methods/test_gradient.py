"""The gradient methods against the equations of their papers, and Grad-CAM against captum."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import camkit
from helpers import reference, registry
from helpers.families import (
    FAMILIES,
    TINY,
    ChannelsLast,
    Digits,
    Family,
    Plain,
    Skip,
    Tiny,
    Tokens,
    build,
    images,
    tiny,
)
from helpers.papers import Case, Literal, check_formula


def smooth(case: Case) -> Tensor:
    shape = case.image.shape
    gradients = [case.at(case.image + 0.3 * n)[1] for n in case.noise(3, shape)]
    powers = [sum(g**p for g in gradients) / 3 for p in (1, 2, 3)]
    return reference.grad_cam_plus_plus(case.pair[0], *powers)  # type: ignore[arg-type]


FORMULAS: dict[str, tuple[Callable[..., Any], Literal]] = {
    "GradCAM": (camkit.GradCAM, lambda case: reference.grad_cam(*case.pair)),
    "GradCAMPlusPlus": (
        camkit.GradCAMPlusPlus,
        lambda case: reference.grad_cam_plus_plus(case.pair[0], *(case.pair[1] ** p for p in (1, 2, 3))),
    ),
    "SmoothGradCAMPlusPlus": (functools.partial(camkit.SmoothGradCAMPlusPlus, samples=3), smooth),
    "XGradCAM": (camkit.XGradCAM, lambda case: reference.xgrad_cam(*case.pair)),
    "HiResCAM": (camkit.HiResCAM, lambda case: reference.hires_cam(*case.pair)),
    "LayerCAM": (camkit.LayerCAM, lambda case: reference.layer_cam(*case.pair)),
    "EigenGradCAM": (camkit.EigenGradCAM, lambda case: reference.eigen_cam(case.pair[0] * case.pair[1])),
    "ShapleyCAM": (camkit.ShapleyCAM, lambda case: reference.shapley_cam(*case.pair, case.hessian())),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_equals_its_paper_written_out(kind: Tiny, name: str) -> None:
    make, literal = FORMULAS[name]
    if (name, kind.model) == ("ShapleyCAM", Digits):  # piecewise linear head: the Hessian is zero
        literal = FORMULAS["GradCAM"][1]
    check_formula(kind, make, literal)


LAYOUTS = {Tokens: "tokens", ChannelsLast: "NHWC"}


def literal(kind: Tiny, model: nn.Module, image: Tensor, classes: list[int]) -> Tensor:
    maps = []
    for c in classes:
        pair = reference.activation_and_gradient(model, kind.layer, image, lambda y, c=c: y[c])  # type: ignore[misc]
        grid = (image.shape[1] // 4, image.shape[2] // 4)
        activation, gradient = (reference.nchw(t, LAYOUTS.get(kind.model, "NCHW"), grid) for t in pair)
        maps.append(reference.grad_cam(activation, gradient))
    return torch.stack(maps)


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_equals_the_papers_equations(kind: Tiny) -> None:
    model = tiny(kind.model)
    x = torch.randn(3, *kind.shape).double()
    targets = torch.tensor([[0, 1, 2], [2, 1, 1], [1, 0, 0]])
    explained = camkit.GradCAM(model)(x, targets)
    assert explained.layer == kind.layer
    assert explained.maps.abs().sum() > 0
    for n in range(3):
        expected = literal(kind, model, x[n], targets[n].tolist())
        torch.testing.assert_close(explained.maps[n], expected, rtol=1e-9, atol=1e-14)
    one = camkit.GradCAM(model, kind.layer)(x, targets[:, 0])
    torch.testing.assert_close(one.maps, explained.maps[:, 0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_equals_relu_of_cam_by_the_number_of_positions(family: Family) -> None:
    """This holds for a trunk, global average pooling and one linear layer."""
    net = camkit.attach_gap_head(build(family.name), 4).double()
    x = images(family).double()
    cam, grad_cam = camkit.CAM(net)(x, [1, 3]), camkit.GradCAM(net)(x, [1, 3])
    assert cam.layer == grad_cam.layer
    expected = cam.maps.relu() / cam.maps[0].numel()
    torch.testing.assert_close(grad_cam.maps, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(cam.maps, net.class_maps(x).maps[[0, 1], [1, 3]], rtol=1e-9, atol=1e-14)


class PatchesAsGrid(nn.Module):
    """A norm over tokens that also passes the patches through an NCHW layer.

    captum reads only NCHW layers.
    """

    def __init__(self, norm: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.norm, self.size, self.grid = norm, size, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        token, patches = self.norm(x).split([1, self.size[0] * self.size[1]], dim=1)
        patches = self.grid(patches.transpose(1, 2).unflatten(2, self.size))
        return torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_equals_captum(family: Family) -> None:
    model = build(family.name)
    x = images(family)
    # In a random network the maps of some classes are zero everywhere. Take the class with the brightest map.
    classes = camkit.GradCAM(model)(x, [list(range(20))] * 2).maps.amax((2, 3)).argmax(1)
    ours = camkit.GradCAM(model)(x, classes)
    layer = model.get_submodule(ours.layer)
    if family.name == "vit_b_32":
        parent = model.get_submodule(ours.layer.removesuffix(".ln_1"))
        parent.ln_1 = as_grid = PatchesAsGrid(layer, family.size)
        layer = as_grid.grid
    # Clone the output; otherwise in-place operations after the layer, as in DenseNet, change captum's tensor.
    layer.register_forward_hook(lambda m, a, out: out.clone())
    expected = LayerGradCam(model, layer).attribute(x, classes)[:, 0].relu().detach()
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours.maps, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(0, 2**31 - 1))
def test_an_image_is_explained_the_same_in_any_batch(order: list[int], seed: int) -> None:
    model = tiny(Plain)
    x = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(seed)).double()
    classes = torch.tensor([0, 1, 2, 3])
    together = camkit.GradCAM(model)(x, classes).maps
    torch.testing.assert_close(camkit.GradCAM(model)(x[order], classes[order]).maps, together[order])
    for n in range(4):
        torch.testing.assert_close(camkit.GradCAM(model)(x[n : n + 1], n).maps[0], together[n])


def test_a_function_of_the_output_as_target() -> None:
    model = tiny(Plain)
    x = torch.randn(2, 3, 12, 10).double()
    method = camkit.GradCAM(model)
    of_class = method(x, 2)
    of_function = method(x, lambda output: output[:, 2])
    assert torch.equal(of_function.maps, of_class.maps)
    several = method(x, lambda output: output[:, [2, 0]])
    assert several.maps.shape == (2, 2, 4, 3)
    assert torch.equal(several.maps[:, 0], of_class.maps)


def test_a_head_of_zeros_has_maps_of_zeros() -> None:
    """torchvision's untrained ViTs have such a head. The zero gradient is not an error of the layer."""
    model = tiny(Tokens)
    with torch.no_grad():
        model.head.weight.zero_()
    assert not camkit.GradCAM(model)(torch.randn(2, 3, 16, 12).double(), 1).maps.any()


def test_hirescam_sums_to_the_score_of_a_linear_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 5, bias=False)).double()
    x = registry.images("HiResCAM", 3)
    explained = camkit.HiResCAM(model)(x, [0, 4, 2])
    scores = explained.output.gather(1, torch.tensor([[0], [4], [2]]))[:, 0]
    torch.testing.assert_close(explained.maps.sum((1, 2)), scores)


def test_shapleycam_is_gradcam_where_the_head_is_piecewise_linear() -> None:
    model, x = tiny(Skip), torch.randn(2, 3, 12, 10).double()
    for layer in ("block", "pool", "last"):
        torch.testing.assert_close(
            camkit.ShapleyCAM(model, layer)(x, 1).maps, camkit.GradCAM(model, layer)(x, 1).maps
        )
