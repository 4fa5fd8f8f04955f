"""The evidence of one forward pass at a layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.evidence import evidence_at
from helpers.families import TINY, Plain, Tiny, tiny
from helpers.written import Model


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
    """Its output depends on how many images there are."""
    model, x = tiny(Plain), torch.randn(2, 3, 12, 10).double()
    model.fc.register_forward_hook(lambda module, args, out: out.sin() if len(out) == 2 else 2 * out)
    evidence = evidence_at(model, x, "features")
    assert evidence._replay is None
    a = evidence.activation
    torch.testing.assert_close(evidence.rescore(a[None])[0], evidence.scores)
    expected = model.fc((a / 2).mean((2, 3)))[:, 1:2]  # with the hook
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
