"""Unusual models, on which later forward passes and replaced backward passes could go wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from helpers.families import Skip, tiny

AGAIN = [camkit.AblationCAM, camkit.LIFTCAM, camkit.ShapleyCAM]
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM")


class Head(nn.Module):
    """A trunk ``f``, and a head that the test gives as a function."""

    def __init__(self, head: Callable[[Any, Tensor], Any], channels: int = 6) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, channels, 3), nn.ReLU())
        self.mix = nn.Linear(channels, channels)
        self.fc = nn.Linear(channels, 4)
        self.register_buffer("shift", torch.rand(1, channels, 1, 1))
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.f(x))


def plain(m: Any, f: Tensor) -> Tensor:
    return m.fc(F.relu(m.mix(f.mean((2, 3)))))  # type: ignore[no-any-return]


X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(3)).double()


def ablated(model: nn.Module, x: Tensor, target: Callable[[Any], Tensor]) -> Tensor:
    """Ablation-CAM by hooks on the whole model."""
    kept: list[Tensor] = []
    handle = model.get_submodule("f").register_forward_hook(lambda m, a, out: kept.append(out), prepend=True)
    with torch.no_grad():
        score = target(model(x))
        handle.remove()
        weights = []
        for k in range(kept[0].shape[1]):
            edited = kept[0].clone()
            edited[:, k] = 0
            handle = model.get_submodule("f").register_forward_hook(
                lambda m, a, out, edited=edited: edited, prepend=True
            )
            weights.append((score - target(model(x))) / score)
            handle.remove()
        return torch.einsum("kn,nkhw->nhw", torch.stack(weights), kept[0]).relu()


@pytest.mark.parametrize("fill", [0.0, -1e9, -torch.inf])
@pytest.mark.parametrize("always", [True, False])
def test_hooks_after_the_layer_count(fill: float, always: bool) -> None:
    """Even a hook that only changes edited activations, which the comparison without edits cannot find."""

    def masked(m: Any, f: Tensor) -> Tensor:
        return plain(m, f).masked_fill(torch.tensor([False, False, True, False]), fill)

    model = tiny_head(masked)
    most = model.mix(model.f(X).mean((2, 3))).detach().amax(0) + 1e-9
    model.mix.register_forward_hook(lambda m, a, out: out * -3 + 1 if always else out.minimum(most))
    found = camkit.AblationCAM(model, "f")(X, 1).maps
    torch.testing.assert_close(found, ablated(model, X, lambda y: y[:, 1]), rtol=1e-9, atol=1e-12)


def tiny_head(head: Callable[[Any, Tensor], Any], channels: int = 6) -> Any:
    return Head(head, channels).double().eval()


def test_a_list_of_one_tensor_per_image() -> None:
    whole, listed = tiny_head(plain), tiny_head(lambda m, f: list(plain(m, f)))
    listed.load_state_dict(whole.state_dict())
    for method in (*AGAIN, camkit.ScoreCAM, camkit.GradCAM, camkit.PolyCAM):
        expected = method(whole, "f")(X, lambda y: y[:, 1]).maps
        found = method(listed, "f")(X, lambda y: torch.stack([one[1] for one in y])).maps
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@lost
@pytest.mark.parametrize("method", [*AGAIN, camkit.RelevanceCAM, camkit.GradCAM])
def test_a_trunk_under_the_models_own_no_grad(method: type[camkit.Explainer]) -> None:
    class Frozen(Head):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                f = self.f(x)
            return self.head(self, f)

    frozen, usual = Frozen(plain).double().eval(), tiny_head(plain)
    usual.load_state_dict(frozen.state_dict())
    expected = method(usual, "f")(X, 1).maps
    torch.testing.assert_close(method(frozen, "f")(X, 1).maps, expected, rtol=1e-9, atol=1e-14)
    with pytest.raises(
        ValueError, match="^target: expected a score that depends on the input through a gradient"
    ):
        camkit.FullGrad(frozen)(X, 1)


def test_positions_before_images() -> None:
    """A head that works on (L, N, C), also of an odd length."""

    def sequence(m: Any, f: Tensor) -> Tensor:
        tokens = f.flatten(2).permute(2, 0, 1)
        return m.fc(F.relu(m.mix(tokens)).mean(0))  # type: ignore[no-any-return]

    def batch(m: Any, f: Tensor) -> Tensor:
        return m.fc(F.relu(m.mix(f.flatten(2).mT)).mean(1))  # type: ignore[no-any-return]

    one, other = tiny_head(sequence), tiny_head(batch)
    other.load_state_dict(one.state_dict())
    for x in (X, X[:, :, :11, :9]):
        for method in AGAIN:
            expected = method(other, "f")(x, [0, 1]).maps
            torch.testing.assert_close(method(one, "f")(x, [0, 1]).maps, expected, rtol=1e-9, atol=1e-12)


@lost
@pytest.mark.parametrize("change", [lambda f, b: f + b, lambda f, b: f * b, lambda f, b: (b + f) / 3])
def test_relevance_does_not_depend_on_the_batch(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A buffer (1, C, 1, 1) is no activation, in a batch of one either."""
    model = tiny_head(lambda m, f: plain(m, change(f, m.shift)))
    both = camkit.RelevanceCAM(model, "f")(X, 1).maps
    for n in range(2):
        one = camkit.RelevanceCAM(model, "f")(X[n : n + 1], 1).maps[0]
        torch.testing.assert_close(one, both[n], rtol=1e-9, atol=1e-14)


def test_fullgrad_takes_linear_layers_for_no_maps() -> None:
    """A linear layer over the channels of NHWC, against the same without its bias's map."""

    def channels_last(m: Any, f: Tensor) -> Tensor:
        y = m.mix(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.fc(F.relu(y).mean((2, 3)))  # type: ignore[no-any-return]

    def convolution(m: Any, f: Tensor) -> Tensor:
        y = F.conv2d(f, m.mix.weight[:, :, None, None]) + m.mix.bias[:, None, None]
        return m.fc(F.relu(y).mean((2, 3)))  # type: ignore[no-any-return]

    one, other = tiny_head(channels_last), tiny_head(convolution)
    other.load_state_dict(one.state_dict())
    expected = camkit.FullGrad(other)(X, 1).maps
    torch.testing.assert_close(camkit.FullGrad(one)(X, 1).maps, expected, rtol=1e-9, atol=1e-12)
    assert camkit.FullGrad(one)(X, [1, 2]).classes is not None


def test_prelu_has_a_multiplier() -> None:
    """PReLU with a slope of zero is ReLU."""

    def prelu(m: Any, f: Tensor) -> Tensor:
        return m.fc(F.prelu(m.mix(f.mean((2, 3))), torch.zeros(1).double()))  # type: ignore[no-any-return]

    one, other = tiny_head(plain), tiny_head(prelu)
    other.load_state_dict(one.state_dict())
    expected = camkit.LIFTCAM(one, "f")(X, 1).maps
    torch.testing.assert_close(camkit.LIFTCAM(other, "f")(X, 1).maps, expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:LIFTCAM", "ignore:RelevanceCAM")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [n for n in camkit.METHODS if n not in ("LeGrad", "CAM", "FullGrad", "RandomCAM")]
)
def test_half_precision_is_explained_like_single(name: str, dtype: torch.dtype) -> None:
    """Products of gradients must not vanish; the head may work in single precision."""
    torch.manual_seed(1)
    single = tiny_head(lambda m, f: m.fc(f.mean((2, 3)).float())).float()
    method: Any = camkit.METHODS[name]
    x = torch.rand(2, 3, 48, 48) * 3  # of so many positions each has a small gradient
    if name == "SmoothGradCAMPlusPlus":
        method = lambda model: camkit.SmoothGradCAMPlusPlus(model, std=0.0)  # noqa: E731
    if name in ("SSCAM", "ISCAM"):
        method = lambda model: camkit.METHODS[name](model, samples=2)  # type: ignore[call-arg] # noqa: E731
    expected = method(single)(x, 1)
    single.f.to(dtype)
    found = method(single)(x.to(dtype), 1)
    difference = (found.heatmaps() - expected.heatmaps()).abs()
    assert found.maps.any()
    assert torch.isfinite(found.maps).all()
    assert difference.median() < 0.05, difference.median()


def test_replay_inside_a_block_of_a_shared_relu() -> None:
    model = tiny(Skip)
    x = torch.randn(2, 3, 12, 11).double()
    found = camkit.AblationCAM(model, "block.0")(x, 1).maps

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.rest = model.block[0], model

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x)  # type: ignore[no-any-return]

    expected = ablated(Named(), x, lambda y: y[:, 1])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
