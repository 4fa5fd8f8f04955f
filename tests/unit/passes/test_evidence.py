"""Evidence: the result of one forward pass at a layer, and the further passes it offers."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit import Inputs
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.passes.evidence import gather
from helpers import reference
from helpers.evidence import evidence_at
from helpers.families import TINY, ChannelsLast, Plain, Residual, Tiny, Tokens, Transformer, tiny
from helpers.written import Model

LAYOUTS = {Tokens: "tokens", ChannelsLast: "NHWC"}
each_network = pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)


def batch(kind: Tiny) -> Tensor:
    return torch.randn(2, *kind.shape).double()


@each_network
def test_activation_and_gradient_are_those_of_the_layer(kind: Tiny) -> None:
    """Both have channels first for every layout of the layer, and the gradient is that of each score."""
    model, x = tiny(kind.model), batch(kind)
    evidence = evidence_at(model, x, kind.layer, [[0, 2], [1, 1]], gradient=True)
    assert evidence.gradient.shape == (2, 2, *evidence.activation.shape[1:])
    grid = (x.shape[2] // 4, x.shape[3] // 4)
    for n, classes in enumerate([[0, 2], [1, 1]]):
        for k, c in enumerate(classes):
            pair = reference.activation_and_gradient(model, kind.layer, x[n], lambda y, c=c: y[c])  # type: ignore[misc]
            own = [reference.nchw(tensor, LAYOUTS.get(kind.model, "NCHW"), grid) for tensor in pair]
            torch.testing.assert_close(evidence.activation[n], own[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(evidence.gradient[n, k], own[1], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(evidence.output.detach(), model(x).detach())
    torch.testing.assert_close(evidence.scores, evidence.output.gather(1, torch.tensor([[0, 2], [1, 1]])))


@each_network
@pytest.mark.parametrize("alone", [True, False], ids=["the rest alone", "the whole model"])
def test_rescored_activations_are_those_of_the_model_run_again(kind: Tiny, alone: bool) -> None:
    """The reference is the model with a hook that edits the output of the layer in its own layout."""
    model, x = tiny(kind.model), batch(kind)
    evidence = evidence_at(model, x, kind.layer, [[0, 2], [1, 1]])
    if alone:
        # Residual adds in place to the output of a convolution. A replay returns expanded zeros there, which
        # cannot be written to, so the whole model runs instead.
        assert (evidence._replay is None) == (kind.model is Residual)
    else:
        evidence.__dict__["_replay"] = None
    edited = torch.stack([evidence.activation] * 3)
    for k in range(3):
        edited[k, :, k] = 0
    outputs, scores = evidence.outputs(edited), evidence.rescore(edited)
    assert len(outputs) == 3
    assert scores.shape == (3, 2, 2)
    for k in range(3):
        edit = functools.partial(reference.without_channel, kind=LAYOUTS.get(kind.model, "NCHW"), k=k)
        expected = torch.stack([reference.output_with(model, kind.layer, image, edit) for image in x])
        torch.testing.assert_close(outputs[k].detach(), expected, rtol=1e-9, atol=1e-12)
        chosen = expected.gather(1, torch.tensor([[0, 2], [1, 1]]))
        torch.testing.assert_close(scores[k].detach(), chosen, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(score, evidence.scores) for score in scores)


class Loud(Plain):
    """A network that predicts the last class for bright images and the first one for dark images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3))[:, None] * torch.arange(4).to(x)


def test_other_images_are_scored_for_what_the_first_pass_settled() -> None:
    """The target stays the class predicted for the first images, although the others have another one."""
    model, x = tiny(Loud), torch.randn(2, 3, 12, 10).double() + 9
    other = torch.stack([x, x - 18])
    assert model(x).argmax(1).tolist() == [3, 3]
    assert model(x - 18).argmax(1).tolist() == [0, 0]
    evidence = evidence_at(model, x, "features", None)
    outputs = evidence.outputs_of_images(other)
    for m in range(2):
        torch.testing.assert_close(outputs[m], model(other[m]))
        scores = model(other[m])[:, 3:]
        torch.testing.assert_close(evidence.score(outputs[m]), scores)
        there = evidence.at(other[m])
        torch.testing.assert_close(there.scores, scores)
        torch.testing.assert_close(there.activation, model.features(other[m]))
        assert there.gradient.any()


def test_several_layers_share_one_pass() -> None:
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    runs: list[int] = []
    model.fc.register_forward_hook(lambda *args: runs.append(1))
    dry = DryRun.of(model, (2, 3, 12, 10))
    places = [locate(dry, name) for name in ("features.0", "features")]
    shallow, deep = gather(model, Inputs(x), 1, places, gradient=True)
    assert runs == [1]
    assert shallow.output is deep.output
    for name, evidence in (("features.0", shallow), ("features", deep)):
        alone = evidence_at(model, x, name, gradient=True)
        torch.testing.assert_close(evidence.activation, alone.activation)
        torch.testing.assert_close(evidence.gradient, alone.gradient)


def test_maps_are_resized_to_the_images() -> None:
    evidence = evidence_at(tiny(Plain), torch.randn(2, 3, 12, 10).double(), "features")
    assert evidence.resize(torch.rand(2, 5, 4, 3)).shape == (2, 5, 12, 10)


def test_positions_without_an_effect_are_named_where_other_tokens_have_one() -> None:
    model, x = tiny(Transformer), torch.randn(2, 3, 16, 12).double()
    with pytest.raises(
        ValueError, match="^layer: expected a layer whose positions reach the score, got 'blocks.1'"
    ):
        _ = evidence_at(model, x, "blocks.1", gradient=True).gradient
    assert evidence_at(model, x, "blocks.0", gradient=True).gradient.any()


def test_a_frozen_backbone_in_a_no_grad_of_its_own() -> None:
    def frozen(s: Any, x: Tensor) -> Any:
        with torch.no_grad():
            y = s.f(x)
        return s.fc(y.mean((2, 3)))

    model = Model(frozen)
    x = torch.rand(2, 3, 32, 24)
    plain = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    plain.load_state_dict(model.state_dict())
    for layer in (None, "f.2"):
        torch.testing.assert_close(
            camkit.GradCAM(model, layer)(x, 1).maps, camkit.GradCAM(plain, layer)(x, 1).maps
        )
    assert torch.is_grad_enabled()


def test_a_model_that_is_not_what_it_seems_runs_whole() -> None:
    """The output for an image depends on the number of images in the batch."""
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    model.fc.register_forward_hook(lambda module, args, out: out.sin() if len(out) == 2 else 2 * out)
    evidence = evidence_at(model, x, "features")
    assert evidence._replay is None
    a = evidence.activation
    torch.testing.assert_close(evidence.rescore(a[None])[0], evidence.scores)
    expected = model.fc((a / 2).mean((2, 3)))[:, 1:2]  # the call of fc runs the hook too
    torch.testing.assert_close(evidence.rescore(a[None] / 2)[0], expected)


def test_a_layer_behind_an_opaque_object_runs_whole() -> None:
    class Holder:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

    class Opaque(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.holder = Holder(self.features)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.holder.layer(x) if x.device.type == "cpu" else self.features(x)
            return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]

    model, x = tiny(Opaque), torch.randn(1, 3, 12, 10).double()
    evidence = evidence_at(model, x, "features")
    assert evidence._replay is None
    torch.testing.assert_close(evidence.rescore(0 * evidence.activation[None])[0, 0], model.fc.bias[1:2])


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_copies_are_edited_in_every_layout(kind: Tiny) -> None:
    model, x = tiny(kind.model), torch.randn(2, *kind.shape).double()
    evidence = evidence_at(model, x, kind.layer)
    rows, activations = evidence.editable_copies(3)
    torch.testing.assert_close(evidence.rescore_rows(rows), torch.stack([evidence.scores] * 3))
    activations[:, :, 0] *= torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1)
    edited = torch.stack([evidence.activation] * 3)
    edited[:, :, 0] *= torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(evidence.rescore_rows(rows), evidence.rescore(edited))
