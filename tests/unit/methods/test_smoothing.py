"""Smoothed: the mean of a method's maps over views of the image, such as flips and noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import camkit
from camkit import Method, View, targets
from helpers.families import Plain, tiny
from helpers.fingerprint import fingerprint

# A view changes the images by its first function, and its second undoes the change on the maps.
FLIPPED = View(lambda x: x.flip(-1), lambda m: m.flip(-1))
SMALLER = View(lambda x: x[..., 2:, :] * 2, lambda m: m - 1)


def images() -> Tensor:
    return torch.randn(2, 3, 12, 10).double()


def mean(maps: list[Tensor]) -> Tensor:
    total = torch.zeros_like(maps[0])
    for one in maps:
        total = total + one
    return total / len(maps)


@pytest.mark.parametrize("target", [[1, 3], [[0, 1, 2], [3, 1, 0]], lambda y: y[:, 1] - y[:, 0] + 9])
@pytest.mark.parametrize("kind", [camkit.HiResCAM, camkit.LayerCAM, camkit.EigenCAM, camkit.ScoreCAM])
def test_mean_over_the_calls_on_the_views(kind: Any, target: Any) -> None:
    method, x = kind(tiny(Plain)), images()
    flipped = camkit.Smoothed(method, camkit.flip_views())(x, target)
    expected = [method(x, target).maps, method(x.flip(-1), target).maps.flip(-1)]
    assert_close(flipped.maps, mean(expected), rtol=1e-12, atol=0)
    assert not torch.equal(*expected)
    views = camkit.noise_views(3, std=0.5)
    noisy = camkit.Smoothed(method, views)(x, target)
    assert_close(noisy.maps, mean([method(view.apply(x), target).maps for view in views]), rtol=1e-12, atol=0)


def test_a_mirrored_image_has_the_mirrored_map() -> None:
    method, x = camkit.Smoothed(camkit.HiResCAM(tiny(Plain)), camkit.flip_views()), images()
    maps = method(x, 1).maps
    assert maps.abs().amax() > 0
    assert_close(method(x.flip(-1), 1).maps, maps.flip(-1), rtol=1e-12, atol=0)


def test_the_rest_of_the_explanation_is_that_of_the_image() -> None:
    method, x = camkit.GradCAM(tiny(Plain)), images()
    plain, smoothed = method(x), camkit.Smoothed(method, camkit.noise_views(2))(x)
    assert torch.equal(smoothed.output, plain.output)
    assert torch.equal(smoothed.target, plain.target)
    assert (smoothed.layer, smoothed.input_size, smoothed.parts) == ("features", (12, 10), ())
    assert not torch.equal(smoothed.maps, plain.maps)
    assert smoothed.heatmaps().shape == (2, 12, 10)


class Loud(Plain):
    """Its prediction depends on the mean of the input, so that a view can change the predicted class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3))[:, None] * torch.arange(4).to(x)


@pytest.mark.parametrize(
    ("target", "settled"),
    [
        (None, lambda y: y.argmax(1)),
        (targets.probability(), lambda y: targets.bind(targets.probability(), y, 2).target),
        (targets.finer(similar=1), lambda y: targets.bind(targets.finer(similar=1), y, 2).target),
    ],
)
def test_the_image_itself_settles_what_is_explained(target: Any, settled: Callable[[Tensor], Any]) -> None:
    model, x = tiny(Loud), images()
    method, views = camkit.HiResCAM(model), [View(lambda x, by=by: x + by, lambda m: m) for by in (-9, 9)]  # type: ignore[misc]
    now = settled(model(x).detach())
    smoothed = camkit.Smoothed(method, views)(x, target)
    expected = mean([method(view.apply(x), now).maps for view in views])
    assert_close(smoothed.maps, expected, rtol=1e-12, atol=0)
    # With the original target each view would explain the class that it predicts itself.
    each_its_own = mean([method(view.apply(x), target).maps for view in views])
    assert (each_its_own - expected).abs().amax() > 1e-3 * expected.abs().amax()


def test_one_call_more_for_each_view() -> None:
    seen: list[tuple[Tensor, Any]] = []

    class Watched(Method):
        """A method that records its calls."""

        def explain(self, inputs: camkit.Inputs, target: targets.Target) -> camkit.Explanation:
            x = inputs.images
            seen.append((x, target))
            return camkit.Explanation(x[:, 0], x, "settled", "layer", (12, 10))

    x = images()
    explained = camkit.Smoothed(Watched(tiny(Plain)), (FLIPPED, SMALLER, FLIPPED))(x, 2)
    assert [target for _, target in seen] == [2, "settled", "settled", "settled"]
    for (given, _), expected in zip(seen, [x, x.flip(-1), x[..., 2:, :] * 2, x.flip(-1)], strict=True):
        assert torch.equal(given, expected)
    assert explained.output is x


def test_noise_is_the_same_for_the_same_seed_only() -> None:
    x = torch.rand(3, 2, 100, 90)
    before = torch.get_rng_state()
    first, again, other = ([v.apply(x) for v in camkit.noise_views(2, std=0.5, seed=s)] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    independent = [*first, *other]
    for i, one in enumerate(independent):
        noise = one - x
        assert_close(noise[1:], noise[:1].expand(2, -1, -1, -1))  # all images get the same noise
        assert noise.mean().item() == pytest.approx(0, abs=0.02)
        assert noise.std().item() == pytest.approx(0.5, rel=0.02)
        assert (noise[0, 0] - noise[0, 1]).std() > 0.6
        assert all((one - another).std() > 0.6 for another in independent[:i])


def test_noise_by_default() -> None:
    views = camkit.noise_views()
    zeros = torch.zeros(1, 1, 100, 100, dtype=torch.float16)
    noise = [view.apply(zeros) for view in views]
    assert len(noise) == 16
    assert all(one.dtype == torch.float16 for one in noise)
    assert torch.stack(noise).float().std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noise[3], camkit.noise_views(seed=0)[3].apply(zeros))
    assert torch.equal(camkit.noise_views(1, std=0)[0].apply(zeros), zeros)
    maps = torch.rand(2, 3, 3)
    assert torch.equal(views[0].undo(maps), maps)


def test_the_same_seed_explains_the_same_and_leaves_all_else() -> None:
    model, x = tiny(Plain).train(), images()
    found, before = fingerprint(model), torch.get_rng_state()
    one, same, other = (
        camkit.Smoothed(camkit.GradCAM(model), camkit.noise_views(2, seed=seed))(x, [[0, 1, 2, 3]] * 2)
        for seed in (5, 5, 6)
    )
    assert torch.equal(one.maps, same.maps)
    assert not torch.equal(one.maps, other.maps)
    assert fingerprint(model) == found
    assert torch.equal(torch.get_rng_state(), before)


def test_around_a_method_with_several_layers() -> None:
    method = camkit.LayerCAM(tiny(Plain), ["features.1", "features"], fuse="hierarchical")
    x = images()
    smoothed = camkit.Smoothed(method, camkit.flip_views())(x, 1)
    expected = (method(x, 1).maps + method(x.flip(-1), 1).maps.flip(-1)) / 2
    assert_close(smoothed.maps, expected, rtol=1e-12, atol=0)
    assert smoothed.maps.shape == (2, 12, 10)
    assert (smoothed.layer, smoothed.parts) == ("features.1, features", ())


def test_smoothed_is_a_method_to_be_smoothed() -> None:
    method, x = camkit.HiResCAM(tiny(Plain)), images()
    once = camkit.Smoothed(method, [FLIPPED])
    twice = camkit.Smoothed(once, [FLIPPED])
    assert_close(twice(x, 1).maps, method(x, 1).maps, rtol=1e-12, atol=0)
    assert not torch.equal(once(x, 1).maps, method(x, 1).maps)


@pytest.mark.parametrize("target", [1, [[0, 1], [2, 3]]])
def test_views_at_another_resolution(target: Any) -> None:
    """A view is undone at the resolution of its own map, and the result is resized to the image's map."""

    def larger(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    method, x = camkit.HiResCAM(tiny(Plain)), images()
    views = [View(lambda x: larger(x).flip(-1), lambda m: m.flip(-1)[..., 2:, :]), SMALLER]
    explained = camkit.Smoothed(method, views)(x, target)
    parts = [
        method(larger(x).flip(-1), target).maps.flip(-1)[..., 2:, :],
        method(x[..., 2:, :] * 2, target).maps - 1,
    ]
    assert [part.shape[-2:] for part in parts] == [(8, 8), (3, 3)]
    grown = [
        F.interpolate(part.reshape(2, -1, *part.shape[-2:]), size=(4, 3), mode="bilinear").reshape(
            explained.maps.shape
        )
        for part in parts
    ]
    assert_close(explained.maps, mean(grown), rtol=1e-12, atol=1e-15)
