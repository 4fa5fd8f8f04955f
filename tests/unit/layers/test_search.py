import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_features, find_for_gradient
from helpers.families import FAMILIES, TINY, Family, Plain, Residual, Tiny, Tokens, build, tiny


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_layer_found_on_every_family(family: Family) -> None:
    dry = DryRun.of(build(family.name), (2, 3, 224, 224))
    place = find_features(dry)
    (value,) = dry.trace.outputs_of(place.name)
    assert value is not None
    size = place.layout.size(dry.trace.shapes[value])
    assert (place.name, place.channels, size) == (family.layer, family.channels, family.size)
    assert place.activations == (("relu",) if family.name == "densenet121" else ())
    expected = "encoder.layers.encoder_layer_11.ln_1" if family.name == "vit_b_32" else family.layer
    assert find_for_gradient(dry).name == expected


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_the_layer_found_on_hand_made_models(kind: Tiny) -> None:
    assert find_for_gradient(DryRun.of(tiny(kind.model), (2, *kind.shape))).name == kind.layer


def test_a_headless_trunk_ends_in_its_last_layer() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    assert find_features(DryRun.of(trunk, (2, 3, 16, 16))).name == "2"


def test_attention_from_plain_functions() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            n, length, c = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2).reshape(n, length, c)

    model = Tokens()
    model.attention = nn.MultiheadAttention(8, 2)

    class Wrapped(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.own = Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            x = x + self.own(self.norm1(x))
            return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    assert find_for_gradient(DryRun.of(Wrapped(), (2, 3, 16, 12))).name == "norm1"


def test_list_layers_gives_names_sizes_and_text() -> None:
    layers = camkit.list_layers(Plain(), (3, 12, 10))
    assert [layer.name for layer in layers] == [*(f"features.{i}" for i in range(6)), "features"]
    assert layers[3] == camkit.LayerInfo("features.3", "MaxPool2d", 5, (6, 5))
    assert str(layers[3]) == "features.3: MaxPool2d, 5 x 6 x 5"


def test_list_layers_leaves_out_what_cannot_be_tapped() -> None:
    names = [layer.name for layer in camkit.list_layers(Residual(), (3, 11, 13))]
    assert names == ["stem", "norm", "body", "out"]


def test_a_layer_can_be_the_module_itself() -> None:
    model = Plain()
    assert camkit.GradCAM(model, model.features[2]).layer == "features.2"


def test_a_last_activation_outside_any_module_is_not_replaced_by_another() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + x).mean((2, 3))  # type: ignore[no-any-return]

    message = r"^model: expected a last .* some module's output, got Sum, where 3 x 8 x 8 is made by 'add'"
    with pytest.raises(ValueError, match=message):
        camkit.attach_gap_head(Sum(), 2, input_shape=(3, 8, 8))


def test_a_too_small_input_is_told_a_size_that_fits() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)) for _ in range(3)))
    assert model(torch.rand(1, 3, 22, 22)).shape[-1] == 1  # the smallest that fits
    with pytest.raises(
        ValueError,
        match=r"^x: expected larger images for Sequential, got 3 x 16 x 16 .*; 32 x 32 is large enough$",
    ):
        camkit.GradCAM(model)(torch.rand(1, 3, 16, 16))
    with pytest.raises(
        ValueError,
        match=r"^input_shape: expected larger images for Sequential, got 3 x 16 x 16 .*; 32 x 32 is large",
    ):
        camkit.list_layers(model, (3, 16, 16))
