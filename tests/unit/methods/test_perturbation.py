"""The methods that run the model on masked images or edited activations."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import maps
from helpers import reference
from helpers.families import TINY, Plain, Tiny, tiny
from helpers.papers import Case, Literal, check_formula
from helpers.registry import images, make


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


def poly(case: Case, kind: str) -> Tensor:
    return reference.poly_cam(case.model, case.image, case.c, case.stages(), kind)


FORMULAS: dict[str, tuple[Callable[..., Any], Literal]] = {
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


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_equals_its_paper_written_out(kind: Tiny, name: str) -> None:
    check_formula(kind, *FORMULAS[name])


def test_scorecam_of_the_channels_that_vary_most() -> None:
    model, x = tiny(Plain), torch.randn(3, 3, 12, 10).double()
    expected = []
    with torch.no_grad():
        for image, activation in zip(x, model.features(x), strict=True):
            spread = [float(((channel - channel.mean()) ** 2).mean()) for channel in activation]
            chosen = sorted(range(6), key=lambda k: spread[k])[-2:]
            found = torch.zeros(4, 3).double()
            for k in chosen:
                large = F.interpolate(activation[k][None, None], size=(12, 10), mode="bilinear")[0, 0]
                mask = (large - large.min()) / (large.max() - large.min())
                found += model((image * mask)[None]).softmax(1)[0, 1] * activation[k]
            expected.append(found.relu())
    found_by_two = camkit.ScoreCAM(model, channels=2)(x, 1).maps
    torch.testing.assert_close(found_by_two, torch.stack(expected), rtol=1e-9, atol=1e-12)
    everything = camkit.ScoreCAM(model)(x, 1).maps
    assert torch.equal(camkit.ScoreCAM(model, channels=6)(x, 1).maps, everything)
    assert not torch.allclose(found_by_two, everything)


@pytest.mark.parametrize("name", ["ScoreCAM", "SSCAM", "ISCAM", "AblationCAM", "PolyCAM"])
def test_the_size_of_a_chunk_bounds_a_pass_and_changes_nothing(name: str) -> None:
    model, x = tiny(Plain), images(name, 2)
    nn.init.ones_(model.get_parameter("features.4.bias"))  # so that no channel is zero
    seen: list[int] = []
    forward = model.fc.forward

    def counted(pooled: Tensor) -> Tensor:
        seen.append(len(pooled))
        return forward(pooled)

    model.fc.forward = counted  # type: ignore[method-assign, assignment]
    expected = make(name, model)(x, [0, 1]).maps
    for size in (1, 2, 5, 8, 1000):
        seen.clear()
        torch.testing.assert_close(make(name, model, chunk_size=size)(x, [0, 1]).maps, expected)
        assert max(seen) <= max(size, 4)  # the check of the replay runs two copies of the batch
        assert size != 8 or max(seen) == 8


@pytest.mark.parametrize("name", ["ScoreCAM", "AblationCAM"])
def test_progress_wraps_the_passes(name: str) -> None:
    shown: list[int] = []

    def progress(chunks: Any) -> Any:
        assert len(chunks) == 2
        for chunk in chunks:
            yield chunk
            shown.append(len(chunk))

    model = tiny(Plain)
    nn.init.ones_(model.get_parameter("features.4.bias"))  # so that no channel is zero
    make(name, model, chunk_size=8, progress=progress)(images(name, 2), 1)
    assert shown == [4, 2]  # a chunk of 8 holds four channels of two images; Plain has six


def test_ablation_of_a_linear_head_has_a_closed_form() -> None:
    """With average pooling and a linear layer, removing channel k lowers the score by w_k mean(A^k)."""
    model, x = tiny(Plain), images("AblationCAM", 3)
    classes = torch.tensor([[0, 1], [3, 2], [1, 1]])
    activation = model.features(x).detach()
    scores = model(x).detach().gather(1, classes)
    weights = model.fc.weight.detach()[classes] * activation.mean((2, 3))[:, None] / scores[:, :, None]
    expected = maps.weighted_sum(weights, activation).relu()
    torch.testing.assert_close(camkit.AblationCAM(model)(x, classes).maps, expected, rtol=1e-10, atol=1e-12)
