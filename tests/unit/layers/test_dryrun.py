"""What a dry run makes of models as people write them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.layouts import Layout
from camkit.layers.search import find_features, find_for_gradient


class Model(nn.Module):
    """A trunk of two convolutions, 4 x 4 patches, and whatever comes after."""

    def __init__(self, head: Callable[[Any, Tensor], Any], channels: int = 8) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.ReLU(), nn.Conv2d(5, channels, 1), nn.ReLU())
        self.fc = nn.Linear(channels, 4)
        self.norm = nn.LayerNorm(channels)
        self.more = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = head
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.head(self, x)


def find(model: nn.Module, *size: int) -> Any:
    return find_for_gradient(DryRun.of(model, (2, 3, *(size or (32, 24)))))


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: y.mean((2, 3)),
        lambda y: y.mean(3).mean(2),
        lambda y: y.flatten(2).mean(-1),
        lambda y: y.view(len(y), 8, -1).mean(-1),
        lambda y: F.adaptive_avg_pool2d(y, 1)[:, :, 0, 0],
        lambda y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
    ],
)
def test_every_spelling_of_global_average_pooling(pool: Callable[[Tensor], Tensor]) -> None:
    model = Model(lambda s, x: s.fc(pool(s.f(x)))).double()
    x = torch.randn(2, 3, 32, 24).double()
    assert find(model).name == "f"
    cam = camkit.CAM(model)(x, 1)
    torch.testing.assert_close(cam.maps.mean((1, 2)) + model.fc.bias[1], cam.output[:, 1])
    torch.testing.assert_close(camkit.GradCAM(model)(x, 1).maps, cam.maps.relu() / cam.maps[0].numel())
    net = camkit.attach_gap_head(model, 3, input_shape=(3, 32, 24))
    assert net.class_maps(x).maps.shape == (2, 3, 8, 6)


class Vit(nn.Module):
    """Patches, other tokens before and after them, hand-written attention, and whatever reads the tokens."""

    def __init__(
        self, read: Callable[[Tensor], Tensor], before: int = 1, after: int = 0, size: int | None = None
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, 16)
        self.before = nn.Parameter(torch.randn(1, before, 8))
        self.after = nn.Parameter(torch.randn(1, after, 8))
        length = before + after + (size // 16) ** 2 if size else 1
        self.position = nn.Parameter(torch.randn(1, length, 8))
        self.norm1 = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        self.read = read
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.before.expand(len(y), -1, -1), y, self.after.expand(len(y), -1, -1)], 1)
        y = y + self.position
        z = self.norm1(y)
        y = y + (self.q(z) @ self.k(z).mT).softmax(-1) @ self.v(z)
        return self.fc(self.read(self.norm(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("size", "grid"), [(48, (3, 3)), (50, (3, 3)), (100, (6, 6)), (160, (10, 10))])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (5, 0), (0, 1), (1, 2)])
def test_tokens_form_the_grid_they_were_cut_into(
    size: int, grid: tuple[int, int], fixed: bool, before: int, after: int
) -> None:
    index = 0 if before else -1
    model = Vit(lambda y: y[:, index], before, after, size if fixed else None)
    place = find(model, size, size)
    assert place.layout == Layout(-1, grid, before, after)
    assert place.name == "norm1"  # after the attention nothing of the patches reaches the output
    if fixed:
        return
    explained = camkit.GradCAM(model)(torch.randn(2, 3, size, size), [[0, 1, 2, 3]] * 2)
    assert (explained.maps.amax((2, 3)) > 0).any()


def test_an_attention_among_parameters_alone_is_passed_by() -> None:
    class Learnt(nn.Module):
        """A norm, of its input and what a learnt token makes of itself."""

        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + F.scaled_dot_product_attention(self.token, self.token, self.token))  # type: ignore[no-any-return]

    model = Vit(lambda y: y[:, 0])
    model.norm = Learnt()  # type: ignore[assignment]
    assert find(model, 48, 48).name == "norm1"


def test_naming_a_layer_whose_patches_reach_nothing_is_an_error() -> None:
    model = Vit(lambda y: y[:, 0])
    with pytest.raises(
        ValueError, match="^layer: expected a layer whose positions reach the score, got 'norm'"
    ):
        camkit.GradCAM(model, "norm")(torch.randn(1, 3, 64, 64))


def test_tokens_that_are_averaged() -> None:
    model = Vit(lambda y: y[:, 1:].mean(1)).double()
    x = torch.randn(2, 3, 64, 48).double()
    assert find(model, 64, 48).name == "norm"
    explained = camkit.CAM(model)(x, 2)
    torch.testing.assert_close(explained.maps.mean((1, 2)) + model.fc.bias[2], explained.output[:, 2])


def test_what_is_no_grid_of_positions_is_not_read_as_one() -> None:
    class Queries(Model):
        """16 learnt queries, as DETR has them, beside 8 x 8 positions read as (N, C, L)."""

        def __init__(self) -> None:
            super().__init__(lambda s, x: s.fc(s.decode(x)))
            self.queries = nn.Parameter(torch.randn(1, 16, 8))
            self.flat = nn.Flatten(2)
            self.out = nn.LayerNorm(8)

        def decode(self, x: Tensor) -> Tensor:
            y = self.flat(self.f(x)).transpose(1, 2)
            return self.out((self.queries @ y.mT).softmax(-1) @ y).mean(1)  # type: ignore[no-any-return]

    model = Queries()
    names = [layer.name for layer in camkit.list_layers(model, (3, 32, 32))]
    assert names == ["f.0", "f.1", "f.2", "f.3", "f"]
    for layer in ("flat", "out"):
        with pytest.raises(ValueError, match="^layer: expected a layer whose output has a spatial size"):
            camkit.GradCAM(model, layer)(torch.rand(1, 3, 32, 32))


def test_of_several_pooled_layers_it_is_the_last() -> None:
    def head(s: Any, x: Tensor) -> Tensor:
        a = s.f(x)
        return torch.cat([a.mean((2, 3)), s.more(a).mean((2, 3))], 1)

    assert find(Model(head)).name == "more"


def test_features_with_as_many_channels_as_classes_are_no_class_maps() -> None:
    model = Model(lambda s, x: torch.einsum("nc,kc->nk", s.f(x).mean((2, 3)), torch.eye(8)))
    assert find_features(DryRun.of(model, (2, 3, 32, 24))).name == "f"


def test_a_layer_with_other_rows_than_images_is_refused() -> None:
    model = Model(
        lambda s, x: s.fc(s.f(torch.cat([x, x.flip(3)])).mean((2, 3))).unflatten(0, (2, -1)).mean(0)
    )
    with pytest.raises(
        ValueError, match="^layer: expected a layer with one row per image, got 'f', which gives 4"
    ):
        camkit.GradCAM(model)(torch.rand(2, 3, 32, 24))


def branch(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x).mean((2, 3))) if x.sum() > -1e9 else None


def draw(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x).mean((2, 3))) * float(torch.rand(()) * 0 + 1)


def make(s: Any, x: Tensor) -> Any:
    return s.fc(s.f(x - torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize("head", [branch, draw, make])
@pytest.mark.parametrize("layer", [None, "f"])
def test_models_that_need_numbers_to_run(head: Callable[[Any, Tensor], Any], layer: str | None) -> None:
    model, x = Model(head).train(), torch.rand(2, 3, 32, 24)
    state = torch.get_rng_state()
    assert camkit.GradCAM(model, layer)(x).layer == "f"
    assert torch.equal(torch.get_rng_state(), state)
    assert camkit.attach_gap_head(model, 2, input_shape=(3, 32, 24))(x).shape == (2, 2)


def test_a_dry_run_with_numbers_leaves_the_buffers() -> None:
    def count(s: Any, x: Tensor) -> Any:
        s.count += 1
        return branch(s, x)

    model = Model(count)
    model.register_buffer("count", torch.zeros(()))
    assert camkit.list_layers(model, (3, 32, 24))[-1].name == "f"
    assert model.get_buffer("count") == 0


def test_a_users_hooks_fire_for_no_pass_but_the_users() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    seen: list[str] = []
    model.f.register_forward_hook(lambda m, a, out: seen.append(out.device.type))
    model.f.register_forward_pre_hook(lambda m, a: seen.append(a[0].device.type))
    camkit.GradCAM(model)(torch.rand(2, 3, 32, 24))
    assert seen == ["cpu", "cpu"]  # the explained pass
    camkit.attach_gap_head(model, 2, input_shape=(3, 32, 24))
    assert seen == ["cpu", "cpu"]


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


def test_weight_norm_and_parametrizations() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    torch.nn.utils.parametrizations.weight_norm(model.f[2])
    x = torch.rand(2, 3, 32, 24)
    cam = camkit.CAM(model)(x, 1)
    assert cam.layer == "f"
    torch.testing.assert_close(camkit.GradCAM(model)(x, 1).maps, cam.maps.relu() / 48)


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_linear_layer(parametrize: str) -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3)))).double()
    getattr(torch.nn.utils.parametrizations, parametrize)(model.fc)
    cam = camkit.CAM(model)(torch.randn(2, 3, 32, 24).double(), 1)
    torch.testing.assert_close(cam.maps.mean((1, 2)) + model.fc.bias[1], cam.output[:, 1])


def test_a_weight_that_depends_on_the_input() -> None:
    model = Model(lambda s, x: F.linear(s.f(x).mean((2, 3)), s.fc.weight * x.mean(), s.fc.bias))
    with pytest.raises(ValueError, match="got Model, where 'linear' is in the way after 'f'"):
        camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_a_weight_that_nobody_holds() -> None:
    model = Model(lambda s, x: F.linear(s.f(x).mean((2, 3)), s.fc.weight * 2))
    with pytest.raises(
        ValueError, match="^model: expected a linear layer that has its weight, got Model, where ''"
    ):
        camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_another_head_since_the_last_call() -> None:
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    method, x = camkit.CAM(model), torch.rand(2, 3, 32, 24)
    method(x)
    model.fc = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'tanh' in 'fc.1' is in the way"):
        method(x)
    model.fc = nn.Linear(8, 6)
    assert method(x).output.shape == (2, 6)


def test_grouped_and_spatial_convolutions_are_no_linear_layer() -> None:
    grouped = Model(lambda s, x: s.g(s.f(x).mean((2, 3), keepdim=True)).flatten(1))
    grouped.g = nn.Conv2d(8, 4, 1, groups=2)
    spatial = Model(lambda s, x: s.more(s.f(x).mean((2, 3), keepdim=True)).flatten(1))
    for model in (grouped, spatial):
        with pytest.raises(ValueError, match="'conv2d' in '.*' is in the way"):
            camkit.CAM(model)(torch.rand(2, 3, 32, 24))


def test_arguments_by_name_and_a_norm_without_bias() -> None:
    def head(s: Any, x: Tensor) -> Any:
        return F.linear(s.norm(s.f(x).mean((2, 3))), bias=s.fc.bias, weight=s.fc.weight)

    model = Model(head).double()
    model.norm = nn.LayerNorm(8, bias=False).double()
    nn.init.normal_(model.norm.weight)
    explained = camkit.CAM(model)(torch.randn(2, 3, 32, 24).double(), 1)
    torch.testing.assert_close(explained.maps.mean((1, 2)) + model.fc.bias[1], explained.output[:, 1])


def test_an_infinite_wait_is_none() -> None:
    """A dict attribute that holds itself, and one that two modules share."""
    model = Model(lambda s, x: s.fc(s.f(x).mean((2, 3))))
    notes: dict[str, Any] = {}
    notes["self"] = notes
    vars(model)["notes"] = notes
    assert math.isfinite(camkit.GradCAM(model)(torch.rand(1, 3, 32, 24)).maps.sum())


def test_heads_of_attention_are_no_grid() -> None:
    """Tokens of six channels as two heads of three read as a grid of 2 x 3, if one does not look twice."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, stride=4)
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            heads = self.mix(tokens).unflatten(2, (2, 3))
            return self.mix(tokens + heads.flatten(2)).mean(1)  # type: ignore[no-any-return]

    dry = DryRun.of(Heads(), (2, 3, 16, 12))
    joined = next(v for v in range(len(dry.trace.shapes)) if dry.trace.history(v)[-1:] == ["add"])
    assert dry.layout(joined) == Layout(-1, (4, 3))
