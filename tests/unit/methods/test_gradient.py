import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import camkit
from helpers import reference
from helpers.families import (
    FAMILIES,
    TINY,
    ChannelsLast,
    Family,
    Plain,
    Residual,
    Tiny,
    Tokens,
    build,
    images,
    tiny,
)

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
    """On trunk, global average pooling, linear."""
    net = camkit.attach_gap_head(build(family.name), 4).double()
    x = images(family).double()
    cam, grad_cam = camkit.CAM(net)(x, [1, 3]), camkit.GradCAM(net)(x, [1, 3])
    assert cam.layer == grad_cam.layer
    expected = cam.maps.relu() / cam.maps[0].numel()
    torch.testing.assert_close(grad_cam.maps, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(cam.maps, net.class_maps(x).maps[[0, 1], [1, 3]], rtol=1e-9, atol=1e-14)


class PatchesAsGrid(nn.Module):
    """A norm over tokens that passes the patches through a layer in NCHW, all that captum reads."""

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
    # Random networks have classes whose map is zero everywhere: take those with the brightest.
    classes = camkit.GradCAM(model)(x, [list(range(20))] * 2).maps.amax((2, 3)).argmax(1)
    ours = camkit.GradCAM(model)(x, classes)
    layer = model.get_submodule(ours.layer)
    if family.name == "vit_b_32":
        parent = model.get_submodule(ours.layer.removesuffix(".ln_1"))
        parent.ln_1 = as_grid = PatchesAsGrid(layer, family.size)
        layer = as_grid.grid
    # captum sees what an in-place operation after the layer makes of its output, as in DenseNet.
    layer.register_forward_hook(lambda m, a, out: out.clone())
    expected = LayerGradCam(model, layer).attribute(x, classes)[:, 0].relu().detach()
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours.maps, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("layer", ["stem", "norm", "body"])
def test_an_in_place_operation_after_the_layer_does_not_reach_the_map(layer: str) -> None:
    model = tiny(Residual)
    x = torch.randn(2, 3, 11, 13).double()
    explained = camkit.GradCAM(model, layer)(x, 1)
    for n in range(2):
        pair = reference.activation_and_gradient(model, layer, x[n], lambda y: y[1])
        torch.testing.assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("layer", ["features.0", "features.28", "features.29"])
def test_in_place_relus_of_vgg16(layer: str) -> None:
    """With every ReLU out of place the same network gives the same map."""
    model = build("vgg16").double()
    x = torch.randn(1, 3, 64, 64).double()
    maps = camkit.GradCAM(model, layer)(x, 3).maps
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    torch.testing.assert_close(maps, camkit.GradCAM(model, layer)(x, 3).maps, rtol=1e-12, atol=0)


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
    """As torchvision's untrained ViTs have one: no layer is to blame."""
    model = tiny(Tokens)
    with torch.no_grad():
        model.head.weight.zero_()
    assert not camkit.GradCAM(model)(torch.randn(2, 3, 16, 12).double(), 1).maps.any()
