"""Tap: recording the outputs of layers in a forward pass, or replacing one of them."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.passes.tap import Tap
from helpers import reference
from helpers.families import Residual, build, tiny
from helpers.fingerprint import hooks_of, process


class Chain(nn.Module):
    """Two convolutions, each followed by an in-place ReLU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(5, 2)
        self.unused = nn.Identity()

    def head(self, second: Tensor) -> Tensor:
        return self.fc(second.relu().mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.second(self.relu(self.first(x))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Chain:
    return Chain().double().eval()


X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).double()


def test_outputs_are_kept_as_they_left_their_layers(model: Chain) -> None:
    """An in-place ReLU follows each layer, and must not change the recorded outputs."""
    with torch.no_grad():
        first = model.first(X)
        second = model.second(first.relu())
        expected = model(X)
    assert first.min() < 0
    assert second.min() < 0
    with Tap(model, "first", "second") as tap:
        output = model(X)
    assert torch.equal(tap.output("first"), first)
    assert torch.equal(tap.output("second"), second)
    assert torch.equal(output, expected)
    assert not output.requires_grad  # such a tap runs the model under no_grad


def test_the_graph_begins_at_the_first_layer_to_run(model: Chain) -> None:
    with Tap(model, "second", "first", gradient=True) as tap:
        output = model(X)
    leaf, later = tap.output("first"), tap.output("second")
    assert leaf.is_leaf
    assert leaf.requires_grad
    # The part before the leaf has no graph, so its parameters get no gradient.
    gradients = torch.autograd.grad(output.sum(), [leaf, later, *model.first.parameters()], allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    own = model.first(X).detach().requires_grad_()
    second = model.second(own.relu())
    expected = torch.autograd.grad(model.head(second).sum(), [own, second])
    for found, one in zip(gradients, expected, strict=False):
        torch.testing.assert_close(found, one)


def test_an_attached_output_stays_in_the_graph_of_the_parameters(model: Chain) -> None:
    with Tap(model, "second", gradient=True, grad_mode=torch.enable_grad, attached=True) as tap:
        model(X)
    tap.output("second").square().sum().backward()
    found = model.first.weight.grad
    model.zero_grad()
    model.second(model.first(X).relu()).square().sum().backward()
    torch.testing.assert_close(found, model.first.weight.grad)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_replacement_is_seen_by_the_rest_of_the_model(model: Chain, gradient: bool) -> None:
    replacement = torch.randn(2, 5, 5, 4).double().requires_grad_()
    before = replacement.detach().clone()
    with torch.set_grad_enabled(gradient), Tap(model, "second", replacement=replacement):
        output = model(X)
    assert output.requires_grad is gradient  # the caller's grad mode applies after the layer
    torch.testing.assert_close(output, model.head(replacement), check_stride=False)
    assert torch.equal(replacement, before)


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_after_the_block(model: Chain, fails: bool) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    before = process()
    handle = model.fc.register_forward_hook(fail) if fails else None
    for gradient in (True, False):
        try:
            with Tap(model, "first", "second", gradient=gradient):
                model(X)
        except KeyboardInterrupt:
            assert fails
        assert hooks_of(model) == fails
        assert process() == before
    if handle is not None:
        handle.remove()


def test_the_pass_of_another_thread_is_not_taken(model: Chain) -> None:
    with torch.no_grad():
        expected = model.first(X)
        apart = model(X + 1)
    found: list[Tensor] = []
    with Tap(model, "first", gradient=True) as tap:
        # A hook fires for every thread that runs the model, so the tap must ignore this pass.
        with torch.no_grad():
            other = threading.Thread(target=lambda: found.append(model(X + 1).detach()))
            other.start()
            other.join()
        with pytest.raises(ValueError, match="'first', which never ran"):
            tap.output("first")
        model(X)
    assert torch.equal(tap.output("first"), expected)
    torch.testing.assert_close(found[0], apart)


def test_a_layer_that_did_not_run_once_is_named(model: Chain) -> None:
    with Tap(model, "unused", "relu") as tap:
        model(X)
    with pytest.raises(
        ValueError, match="^layer: expected a layer that runs .*, got 'unused', which never ran"
    ):
        tap.output("unused")
    with pytest.raises(
        ValueError, match="^layer: expected a layer that runs once a pass, got 'relu', which ran 2"
    ):
        tap.output("relu")


@pytest.mark.parametrize(
    ("give", "got"),
    [(lambda x: (x, x), "a tuple"), (lambda x: x.argmax(1), "torch.int64")],
    ids=["tuple", "ints"],
)
def test_a_layer_without_one_tensor_of_floats_is_named(give: Any, got: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return give(x)

    model = nn.Sequential(Odd())
    message = (
        f"^layer: expected a layer whose output is one floating-point tensor, got '0', whose output is {got}$"
    )
    with pytest.raises(TypeError, match=message), Tap(model, "0"):
        model(X)
    assert hooks_of(model) == 0


def test_an_input_made_in_inference_mode_can_be_the_leaf() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 3).double())
    with torch.inference_mode():
        x = X.clone()
    with Tap(model, "0", gradient=True) as tap:
        output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), tap.output("0"))
    assert gradient.any()


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
    """The map stays the same if every ReLU of the network works out of place."""
    model = build("vgg16").double()
    x = torch.randn(1, 3, 64, 64).double()
    maps = camkit.GradCAM(model, layer)(x, 3).maps
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    torch.testing.assert_close(maps, camkit.GradCAM(model, layer)(x, 3).maps, rtol=1e-12, atol=0)
