"""Running only the part of a model after a layer equals running the whole model."""

import gc
import weakref
from collections import deque

import pytest
import torch
from torch import Tensor, nn

from camkit import Evidence
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_stages
from camkit.model.modules import modules_of
from camkit.model.state import restored_on_exit
from helpers.evidence import evidence_at
from helpers.families import FAMILIES, TINY, Family, Residual, Tiny, build, images, tiny


def both(evidence: Evidence, edited: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the part after the layer run alone, and of the whole model."""
    assert evidence._replay is not None
    by_replay = evidence.rescore(edited)
    evidence.__dict__["_replay"] = None
    return by_replay, evidence.rescore(edited)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_equals_the_whole_model_on_every_family(family: Family) -> None:
    model, x = build(family.name).double(), images(family, 1).double()
    dry = DryRun.of(model, (2, *x.shape[1:]))
    with restored_on_exit(modules_of(model)), torch.no_grad():
        for place in find_stages(dry)[-2:]:
            evidence = evidence_at(model, x, place.name)
            a = evidence.activation
            replayed, whole = both(evidence, torch.stack([a / 2, a.flip(1), torch.zeros_like(a)]))
            assert len({float(score) for score in whole}) > 1
            torch.testing.assert_close(replayed, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer3.1.bn1"),  # inside a block with a skip connection around the layer
        ("resnet18", "layer3.1.bn2"),
        ("resnet18", "layer4.0.downsample"),
        ("densenet121", "features.denseblock4.denselayer7"),  # earlier outputs are concatenated later
        ("googlenet", "inception4c.branch2"),
        ("vit_b_32", "encoder.layers.encoder_layer_10.ln_2"),
        ("swin_t", "features.5.1.norm1"),
        ("shufflenet_v2_x0_5", "stage3.1.branch2.2"),
    ],
)
def test_equals_the_whole_model_inside_blocks(name: str, layer: str) -> None:
    model = build(name).double()
    size = 224 if name == "vit_b_32" else 64
    x = torch.randn(2, 3, size, size).double()
    with restored_on_exit(modules_of(model)), torch.no_grad():
        evidence = evidence_at(model, x, layer)
        a = evidence.activation
        replayed, whole = both(evidence, torch.stack([a / 2, a.flip(1)]))
        torch.testing.assert_close(replayed, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_gradients_go_through(kind: Tiny) -> None:
    model, x = tiny(kind.model), torch.randn(2, *kind.shape).double()
    evidence = evidence_at(model, x, kind.layer)
    gradients: list[Tensor] = []
    for replay in (evidence._replay, None):
        evidence.__dict__["_replay"] = replay
        leaf = evidence.activation.clone().requires_grad_()
        gradients += torch.autograd.grad(evidence.rescore(leaf[None]).sum(), leaf)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)


def test_what_is_handed_out_is_not_overwritten() -> None:
    """Residual adds in place to the output of the layer, and to earlier outputs."""
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    for layer in ("stem", "norm", "body"):
        evidence = evidence_at(model, x, layer)
        a = evidence.activation
        twice = torch.stack([evidence.rescore(a[None] / 3), evidence.rescore(a[None] / 3)])
        assert torch.equal(twice[0], twice[1])
        replayed, whole = both(evidence, a[None] / 3)
        torch.testing.assert_close(replayed, whole, rtol=1e-12, atol=0)
        assert torch.equal(evidence.activation, a)


def test_what_is_kept_goes_with_the_evidence() -> None:
    """The tensors are freed at once, without the garbage collector."""
    model, x = tiny(Residual), torch.randn(2, 3, 11, 13).double()
    gc.disable()
    try:
        evidence = evidence_at(model, x, "norm")
        evidence.rescore(evidence.activation[None])
        assert evidence._replay is not None
        replay, leaf = weakref.ref(evidence._replay), weakref.ref(evidence.layer_output)
        del evidence
        assert replay() is None
        assert leaf() is None
    finally:
        gc.enable()


class Worker(nn.Module):
    """Adds one to its features, in place if the batch has at least ``in_place_from`` rows.

    With ``traceless=True`` it writes through ``.data``, which does not change the version of the tensor.
    """

    def __init__(self, in_place_from: int, traceless: bool = False) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.in_place_from, self.traceless = in_place_from, traceless
        self.memory = deque[int]()  # a stand-in shares a deque, but copies a list

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.memory.append(y.data_ptr())
        if len(y) < self.in_place_from:
            y = y + 1
        elif self.traceless:
            y.data.add_(1)
        else:
            y.add_(1)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("in_place", "traceless"), [(False, False), (True, False), (True, True)])
def test_rows_are_copied_only_for_a_model_that_writes_to_them(in_place: bool, traceless: bool) -> None:
    model, x = Worker(0 if in_place else 99, traceless).double(), torch.randn(2, 3, 12, 10).double()
    evidence = evidence_at(model, x, "features")
    rows, activations = evidence.editable_copies(3)
    activations[1] = 0
    before = rows.clone()
    found = evidence.rescore_rows(rows)
    assert (model.memory[-1] == rows.data_ptr()) is not in_place
    assert torch.equal(rows, before)
    expected = model.fc((evidence.activation + 1).mean((2, 3)))[:, 1:2]
    torch.testing.assert_close(found[[0, 2]], torch.stack([expected] * 2))
    torch.testing.assert_close(found[1], model.fc(torch.ones(2, 4).double())[:, 1:2])


def test_a_model_that_begins_to_write_is_an_error() -> None:
    """The rows have been overwritten, so that the method must not use them any more."""
    model, x = Worker(6).double(), torch.randn(2, 3, 12, 10).double()
    evidence = evidence_at(model, x, "features")
    evidence.rescore_rows(evidence.editable_copies(2)[0])
    with pytest.raises(RuntimeError, match="^model: expected layers after 'features' that leave"):
        evidence.rescore_rows(evidence.editable_copies(3)[0])
