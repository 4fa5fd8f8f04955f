"""Maps that you can backpropagate through."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import TINY, Plain, Skip, Tiny, Transformer, tiny
from helpers.fingerprint import fingerprint

METHODS = [name for name, method in camkit.METHODS.items() if getattr(method, "keeps_graph", False)]


def explain(name: str, model: nn.Module, x: Tensor, target: Any, **settings: Any) -> camkit.Explanation:
    method: Any = camkit.METHODS[name]
    result: camkit.Explanation = method(model, **settings)(x, target)
    return result


def slope(loss: Any, model: nn.Module, direction: list[Tensor], step: float = 1e-8) -> float:
    """The change of a loss along a direction of the parameters, by differences."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(loss()))
            for p, d in zip(model.parameters(), direction, strict=True):
                p.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)


def test_which_methods_can() -> None:
    assert METHODS == ["CAM", "GradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM"]
    for name, method in camkit.METHODS.items():
        if name not in (*METHODS, "FullGrad"):
            with pytest.raises(
                ValueError, match=f"^differentiable: expected False for {name}, got True; methods"
            ):
                method(Plain(), differentiable=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [*TINY, Tiny(Skip, (3, 12, 10), "relu")], ids=lambda t: t.model.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_the_map(name: str, kind: Tiny) -> None:
    """Against differences: by the activation, the gradient, and all that is before and after the layer."""
    torch.manual_seed(0)
    model = tiny(kind.model)
    x = torch.randn(2, *kind.shape).double()
    if name == "CAM":
        if kind.model not in (Plain, Skip):
            return
        settings: dict[str, Any] = {}
    else:
        settings = {"layer": "last" if kind.model is Skip else kind.layer}
    plain = explain(name, model, x, [0, 2], **settings)
    kept = explain(name, model, x, [0, 2], differentiable=True, **settings)
    assert not plain.maps.requires_grad
    assert not plain.output.requires_grad
    torch.testing.assert_close(kept.maps.detach(), plain.maps, rtol=1e-9, atol=1e-14)
    weights = torch.randn_like(plain.maps)

    def loss() -> Tensor:
        return (explain(name, model, x, [0, 2], differentiable=True, **settings).maps * weights).sum()

    found = torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True)
    direction = [torch.randn_like(p) for p in model.parameters()]
    products = [(g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None]  # type: ignore[redundant-expr]
    along = float(sum(products))
    expected = slope(loss, model, direction)
    assert abs(along - expected) <= 1e-5 * max(abs(expected), 1e-3), (along, expected)


def test_a_loss_on_heatmaps_moves_them() -> None:
    torch.manual_seed(0)
    model = tiny(Plain)
    x, mask = torch.rand(4, 3, 12, 10).double(), torch.zeros(12, 10).double()
    mask[:, :5] = 1
    method = camkit.HiResCAM(model, differentiable=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def outside() -> Tensor:
        return (method(x, 1).heatmaps() * (1 - mask)).mean()

    before = float(outside().detach())
    for _ in range(30):
        optimizer.zero_grad()
        outside().backward()
        optimizer.step()
    assert float(outside().detach()) < before / 2


def test_it_is_the_forward_pass_of_a_training_step() -> None:
    """The output, the statistics and the random state are those of a plain pass in the model's own mode."""

    class Drops(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model, same = tiny(Drops).train(), tiny(Drops).train()
    same.load_state_dict(model.state_dict())
    x = torch.rand(4, 3, 12, 10).double()
    method = camkit.GradCAM(model, "features", differentiable=True)
    method._find_locations(camkit.Inputs(x))  # the dry run draws nothing
    torch.manual_seed(3)
    found = method(x, 1)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = same(x)
    assert torch.equal(found.output, expected)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(model.buffers(), same.buffers(), strict=True):
        assert torch.equal(one, other)
    assert model.training
    loss = nn.functional.cross_entropy(found.output, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 3])).backward()
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_frozen_trunks_and_several_layers() -> None:
    model, x = tiny(Plain), torch.rand(2, 3, 12, 10).double()
    model.features.requires_grad_(False)
    explain("HiResCAM", model, x, 1, differentiable=True).maps.sum().backward()
    assert model.fc.weight.grad is not None
    assert model.fc.weight.grad.any()
    assert all(p.grad is None for p in model.features.parameters())
    skip = tiny(Skip)
    several = explain("LayerCAM", skip, x, 1, layer=["block", "last"], differentiable=True)
    several.maps.sum().backward()
    assert skip.stem.weight.grad is not None
    assert skip.stem.weight.grad.any()


def test_attention_has_a_second_derivative() -> None:
    model, x = tiny(Transformer), torch.randn(2, 3, 16, 12).double()
    explain("HiResCAM", model, x, 1, differentiable=True).maps.square().sum().backward()
    (weight,) = (p for name, p in model.named_parameters() if name == "blocks.1.attention.in_proj_weight")
    assert weight.grad is not None
    assert weight.grad.any()


def test_nothing_is_left_behind() -> None:
    model, x = tiny(Plain), torch.rand(2, 3, 12, 10).double()
    before = fingerprint(model)
    explained = explain("GradCAM", model, x, 1, differentiable=True)
    assert fingerprint(model) == before
    assert explained.maps.requires_grad
    assert explained.output.requires_grad
