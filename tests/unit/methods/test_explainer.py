"""The call of a method that explains by layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.layers.dryrun import DryRun
from helpers.families import Digits, Plain, tiny
from helpers.registry import images

Method = type[camkit.CAM] | type[camkit.GradCAM]
METHODS = [camkit.CAM, camkit.GradCAM]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_of_the_caller(method: Method, mode: Callable[[], Any]) -> None:
    model = tiny(Plain)
    x = torch.randn(2, 3, 12, 10).double()
    expected = method(model)(x, 1)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        explained = method(model)(x.clone(), 1)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(explained.maps, expected.maps)
    assert not explained.maps.requires_grad
    assert not explained.output.requires_grad


def test_frozen_models_and_inputs_with_a_gradient() -> None:
    model = tiny(Plain)
    x = torch.randn(2, 3, 12, 10).double()
    expected = camkit.GradCAM(model)(x, 1).maps
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    assert torch.equal(camkit.GradCAM(model)(leaf, 1).maps, expected)
    assert leaf.grad is None


def test_the_trunk_runs_once_and_without_a_graph() -> None:
    model = Plain().eval()
    seen: list[tuple[str, bool]] = []
    for name in ("features.0", "features.4", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: (
                seen.append((name, out.requires_grad)) if out.device.type == "cpu" else None
            )
        )
    camkit.GradCAM(model)(torch.rand(1, 3, 12, 10), [[0, 1, 2]])
    assert seen == [("features.0", False), ("features.4", False), ("fc", True)]
    seen.clear()
    camkit.CAM(model)(torch.rand(1, 3, 12, 10))
    assert seen == [("features.0", False), ("features.4", False), ("fc", False)]


def test_the_dry_run_is_made_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    run = DryRun.of

    def count(model: nn.Module, shape: tuple[int, ...], *others: Any) -> DryRun:
        made.append(shape)
        return run(model, shape, *others)

    monkeypatch.setattr(DryRun, "of", count)
    method = camkit.GradCAM(Plain())
    for n in (1, 2, 5):
        method(torch.rand(n, 3, 12, 10))
    assert made == [(2, 3, 12, 10)]
    method(torch.rand(1, 3, 20, 10))
    assert made == [(2, 3, 12, 10), (2, 3, 20, 10)]
    for side in range(12, 112):
        method(torch.rand(1, 3, side, 10))
    assert len(method._locations) <= 16  # many sizes do not fill the memory


def test_models_with_other_outputs_need_a_function() -> None:
    class Two(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return {"logits": super().forward(x), "more": [x]}  # type: ignore[return-value]

    model, x = Two(), torch.rand(2, 3, 12, 10)
    explained = camkit.GradCAM(model)(x, lambda output: output["logits"][:, 1])
    assert set(explained.output) == {"logits", "more"}
    assert not explained.output["logits"].requires_grad
    assert explained.maps.shape == (2, 4, 3)


def first_column(unwrap: Callable[[Any], Tensor], output: Any) -> Tensor:
    return unwrap(output)[:, 0]


def test_outputs_of_any_kind_come_back_without_their_graph() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        name: str

    class Strict(dict[str, Any]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError

    kinds: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = [
        (lambda y: Output(y, "a"), lambda o: o.logits),
        (lambda y: Strict(logits=y), lambda o: o["logits"]),
        (lambda y: [(y,), "a"], lambda o: o[0][0]),
        (lambda y: camkit.ClassMaps(y, y), lambda o: o.logits),
        (lambda y: torch.max(y, 1, keepdim=True), lambda o: o.values),
    ]
    for wrap, unwrap in kinds:

        class Wrapped(Plain):
            def forward(self, x: Tensor, wrap: Any = wrap) -> Any:
                return wrap(super().forward(x))

        output = camkit.GradCAM(Wrapped())(
            torch.rand(2, 3, 12, 10), functools.partial(first_column, unwrap)
        ).output
        assert type(output) is type(wrap(torch.zeros(2, 4)))
        assert not unwrap(output).requires_grad


def test_one_input_size_only() -> None:
    assert camkit.GradCAM(Digits())(torch.rand(2, 1, 28, 28)).maps.shape == (2, 24, 24)


def test_settings_are_keywords_and_show() -> None:
    method = camkit.SSCAM(Plain(), "features", samples=3)
    assert repr(method).startswith("SSCAM(layer='features', fuse='mean', layout=None, differentiable=False, ")
    assert "samples=3" in repr(method)
    with pytest.raises(TypeError):
        camkit.SSCAM(Plain(), "features", 3)  # type: ignore[call-arg, arg-type]


class Own(camkit.Explainer):
    """A method that a user wrote: the gradient, summed over the channels."""

    def map(self, evidence: Any) -> Tensor:
        return evidence.gradient.sum(2)  # type: ignore[no-any-return]


def test_a_method_of_ones_own() -> None:
    model, x = tiny(Plain), images("Own", 2)
    explained = Own(model)(x, [0, 1])
    assert explained.maps.shape == (2, 4, 3)

    class Flat(Own):
        def map(self, evidence: Any) -> Tensor:
            return evidence.activation.sum(1)  # type: ignore[no-any-return]

    with pytest.raises(
        ValueError, match="^map: expected maps 2 x 1 x 2 spatial dimensions, got 2 x 4 x 3 from Flat$"
    ):
        Flat(model)(x)

    class Without(Own):
        needs_gradient = False

    with pytest.raises(ValueError, match="^map: expected a method with needs_gradient = True to look at the"):
        Without(model)(x)
