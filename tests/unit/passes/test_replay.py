"""What comes after a layer, run alone, is what the whole model makes of the same activation."""

import gc
import weakref
from collections import deque

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit import Evidence, Inputs
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.layers.search import find_stages
from camkit.model.modules import modules_of
from camkit.model.state import restored_on_exit
from camkit.passes.evidence import gather
from helpers.families import FAMILIES, TINY, Family, Plain, Residual, Tiny, Transformer, build, images, tiny


def evidence_at(model: nn.Module, x: Tensor, layer: str) -> Evidence:
    place = locate(DryRun.of(model, (2, *x.shape[1:])), layer)
    return gather(model, Inputs(x), 1, [place], gradient=False)[0]


def both(evidence: Evidence, edited: Tensor) -> tuple[Tensor, Tensor]:
    """The scores by what follows the layer, and by the whole model."""
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
        ("resnet18", "layer3.1.bn1"),  # inside a block, whose input is added later
        ("resnet18", "layer3.1.bn2"),
        ("resnet18", "layer4.0.downsample"),
        ("densenet121", "features.denseblock4.denselayer7"),  # what came before is concatenated later
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


def count_calls(model: nn.Module, name: str) -> list[int]:
    seen: list[int] = []
    forward = model.get_submodule(name).forward

    def counted(x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            seen.append(len(x))
        return forward(x)  # type: ignore[no-any-return]

    model.get_submodule(name).forward = counted
    return seen


@pytest.mark.parametrize(
    "method", [camkit.AblationCAM, camkit.LIFTCAM, camkit.RelevanceCAM, camkit.ShapleyCAM]
)
@pytest.mark.filterwarnings("ignore:RelevanceCAM")
def test_the_trunk_runs_once(method: type[camkit.Explainer]) -> None:
    model = tiny(Plain)
    seen = count_calls(model, "features.0")
    method(model)(torch.randn(2, 3, 12, 10).double(), 1)
    assert seen == [2]


def test_legrad_runs_the_trunk_twice_and_no_more() -> None:
    model = tiny(Transformer)
    seen = count_calls(model, "patches")
    for layer, passes in ((None, 2), ("blocks.0", 2), ("blocks.1", 2)):
        seen.clear()
        camkit.LeGrad(model, layer)(torch.randn(2, 3, 16, 12).double(), [[0, 1], [2, 3]])
        assert seen == [2] * passes


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


def test_what_is_handed_out_is_not_overwritten() -> None:
    """Residual adds to its layer's output in place, and to what came before it."""
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
    """Without waiting for a circle to be collected."""
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
    """Shifts its features, in place from the given number of rows on, and perhaps without a trace."""

    def __init__(self, in_place_from: int, traceless: bool = False) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.in_place_from, self.traceless = in_place_from, traceless
        self.memory = deque[int]()  # shared with every stand-in, as a list is not

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
    """Its rows are spoilt, and whoever gave them must not go on with them."""
    model, x = Worker(6).double(), torch.randn(2, 3, 12, 10).double()
    evidence = evidence_at(model, x, "features")
    evidence.rescore_rows(evidence.editable_copies(2)[0])
    with pytest.raises(RuntimeError, match="^what follows 'features' wrote to its output, as it had not"):
        evidence.rescore_rows(evidence.editable_copies(3)[0])


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
