"""Every method against its paper's formula, written out; and what holds for all of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit._tools import noise
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_stages
from helpers import reference
from helpers.families import TINY, ChannelsLast, Digits, Tiny, Tokens, tiny

LAYOUTS = {Tokens: "tokens", ChannelsLast: "NHWC"}
TARGETS = torch.tensor([[0, 1, 2], [2, 1, 1], [1, 0, 0]])


@dataclass
class Case:
    """One image and one class of a tiny network."""

    kind: Tiny
    model: nn.Module
    image: Tensor
    c: int

    def read(self, tensor: Tensor) -> Tensor:
        grid = (self.image.shape[1] // 4, self.image.shape[2] // 4)
        return reference.nchw(tensor, LAYOUTS.get(self.kind.model, "NCHW"), grid)

    def at(self, image: Tensor, layer: str = "") -> tuple[Tensor, Tensor]:
        pair = reference.activation_and_gradient(
            self.model, layer or self.kind.layer, image, lambda y: y[self.c]
        )
        return self.read(pair[0]), self.read(pair[1])

    @functools.cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.at(self.image)

    def noise(self, count: int, shape: torch.Size, *more: int) -> list[Tensor]:
        return [noise.normal(shape, self.image, 0, *more, m) for m in range(count)]

    def hessian(self) -> Tensor:
        activation, layer = self.pair[0], self.kind.layer
        own = reference.activation_and_gradient(self.model, layer, self.image, lambda y: y[self.c])[0]

        def score(flat: Tensor) -> Tensor:
            handle = self.model.get_submodule(layer).register_forward_hook(
                lambda module, args, output: flat.reshape(own.shape)[None].clone()
            )
            output: Tensor = self.model(self.image[None])[0, self.c]
            handle.remove()
            return output

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            whole = torch.autograd.functional.hessian(score, own.flatten())
        return _both(self, whole, own.shape, activation.shape)

    def without(self, k: int) -> float:
        layout = LAYOUTS.get(self.kind.model, "NCHW")
        edit = functools.partial(reference.without_channel, kind=layout, k=k)
        return float(reference.output_with(self.model, self.kind.layer, self.image, edit)[self.c])

    def stages(self) -> list[Tensor]:
        stages = find_stages(DryRun.of(self.model, (2, *self.image.shape)))
        return [self.at(self.image, stage.name)[0] for stage in stages]


def _both(case: Case, whole: Tensor, own: torch.Size, shape: torch.Size) -> Tensor:
    """A Hessian of the flat activation in its own layout, read as NCHW on both sides."""
    once = torch.stack([case.read(row.reshape(own)).flatten() for row in whole])
    twice = torch.stack([case.read(column.reshape(own)).flatten() for column in once.T])
    return twice.reshape(*shape, *shape)


def smooth(case: Case) -> Tensor:
    shape = case.image.shape
    gradients = [case.at(case.image + 0.3 * n)[1] for n in case.noise(3, shape)]
    powers = [sum(g**p for g in gradients) / 3 for p in (1, 2, 3)]
    return reference.grad_cam_plus_plus(case.pair[0], *powers)  # type: ignore[arg-type]


def ss(case: Case) -> Tensor:
    activation = case.pair[0]
    channels, *size = activation.shape
    flat = case.noise(2 * channels, torch.Size(size))
    noise = [torch.stack(flat[m * channels : (m + 1) * channels]) * 2 for m in range(2)]
    return reference.ss_cam(case.model, case.image, case.c, activation, noise)


def ablation(case: Case) -> Tensor:
    activation = case.pair[0]
    score = float(case.model(case.image[None])[0, case.c].detach())
    return reference.ablation_cam(activation, score, [case.without(k) for k in range(len(activation))])


def random_weights(case: Case) -> Tensor:
    weights = noise.uniform(case.pair[0].shape[:1], case.pair[0], 0)
    return reference.weighted(case.pair[0], weights.tolist())


def poly(case: Case, kind: str) -> Tensor:
    return reference.poly_cam(case.model, case.image, case.c, case.stages(), kind)


Literal = Callable[[Case], Tensor]
METHODS: dict[str, tuple[Callable[..., Any], Literal]] = {
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
    "EigenCAM": (camkit.EigenCAM, lambda case: reference.eigen_cam(case.pair[0])),
    "KPCACAM": (camkit.KPCACAM, lambda case: reference.kpca_cam(case.pair[0])),
    "FEM": (camkit.FEM, lambda case: reference.fem(case.pair[0])),
    "RandomCAM": (camkit.RandomCAM, random_weights),
    "ScoreCAM": (
        functools.partial(camkit.ScoreCAM, chunk_size=7),
        lambda case: reference.score_cam(case.model, case.image, case.c, case.pair[0]),
    ),
    "SSCAM": (functools.partial(camkit.SSCAM, samples=2, chunk_size=4), ss),
    "ISCAM": (
        functools.partial(camkit.ISCAM, samples=3),
        lambda case: reference.is_cam(case.model, case.image, case.c, case.pair[0], 3),
    ),
    "AblationCAM": (functools.partial(camkit.AblationCAM, chunk_size=5), ablation),
    **{
        f"PolyCAM{kind}": (
            functools.partial(camkit.PolyCAM, weights=kind),
            functools.partial(poly, kind=kind),
        )
        for kind in ("+", "-", "+-")
    },
}
# Whatever is asked for, these explain the same.
AGNOSTIC = ("EigenCAM", "KPCACAM", "FEM", "RandomCAM")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_equals_its_paper_written_out(kind: Tiny, name: str) -> None:
    make, literal = METHODS[name]
    if (name, kind.model) == ("ShapleyCAM", Digits):  # its head is piecewise linear: the Hessian is zero
        literal = METHODS["GradCAM"][1]
    model = tiny(kind.model)
    count = 1 if kind.model is Digits else 3
    x = torch.randn(count, *kind.shape).double()
    targets = TARGETS[:count]
    explained = make(model)(x, targets)
    assert explained.maps.abs().sum() > 0
    for n in range(count):
        for k, c in enumerate(targets[n].tolist()):
            if name in AGNOSTIC and k > 0:
                assert torch.equal(explained.maps[n, k], explained.maps[n, 0])
                continue
            expected = literal(Case(kind, model, x[n], c))
            scale = float(expected.abs().max())
            torch.testing.assert_close(explained.maps[n, k], expected, rtol=1e-9, atol=1e-11 * scale)
    one = make(model)(x, targets[:, 0])
    torch.testing.assert_close(one.maps, explained.maps[:, 0], rtol=1e-9, atol=1e-12)
