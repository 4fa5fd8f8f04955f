"""Guided backpropagation against its rule written out, and against captum."""

import pytest
import torch
from captum.attr import GuidedBackprop
from torch import nn
from torch.nn import functional as F

import camkit
from helpers import reference
from helpers.families import Plain, Residual, build, tiny


def test_guided_backprop_written_out() -> None:
    """Each ReLU of Plain by hand: positive gradients pass where the input is positive."""
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    leaf = x.clone().requires_grad_()
    below = model.features[:2](leaf)
    lower = below.detach().relu().requires_grad_()
    above = model.features[3:5](lower)
    upper = above.detach().relu().requires_grad_()
    score = model.fc(upper.mean((2, 3)))[torch.arange(2), [1, 3]].sum()
    (arriving,) = torch.autograd.grad(score, upper)
    (arriving,) = torch.autograd.grad(above, lower, arriving.clamp(min=0) * (above > 0))
    (expected,) = torch.autograd.grad(below, leaf, arriving.clamp(min=0) * (below > 0))
    guided = camkit.guided_backprop(model, x, [1, 3])
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-15)
    several = camkit.guided_backprop(model, x, [[1, 0], [3, 3]])
    torch.testing.assert_close(several[:, 0], expected, rtol=1e-9, atol=1e-15)
    assert several.shape == (2, 2, 3, 12, 10)
    explained = camkit.GuidedGradCAM(model)(x, [1, 3])
    up = F.interpolate(camkit.GradCAM(model)(x, [1, 3]).maps[:, None], (12, 10), mode="bilinear")[:, 0]
    torch.testing.assert_close(explained.maps, up * expected.sum(1), rtol=1e-9, atol=1e-15)


def test_guided_backprop_equals_captum() -> None:
    model = build("vgg11").double()
    x = torch.randn(1, 3, 64, 64).double()
    found = camkit.guided_backprop(model, x, 5)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU activations"):
        expected = GuidedBackprop(model).attribute(x.requires_grad_(), 5)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-15)


def test_guided_backprop_of_functions_out_of_modules_leaves_no_trace() -> None:
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    gradient = reference.activation_and_gradient(model, "stem", x[0], lambda y: y[1])[1]
    camkit.guided_backprop(model, x, 1)
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    after = reference.activation_and_gradient(model, "stem", x[0], lambda y: y[1])[1]
    assert torch.equal(after, gradient)
