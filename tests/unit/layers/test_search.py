"""The layer that is chosen if the user names none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from camkit.layers.dryrun import DryRun
from camkit.layers.search import find_features, find_for_gradient
from helpers.families import FAMILIES, TINY, Family, Tiny, build, tiny
from helpers.written import Model, find


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_layer_found_on_every_family(family: Family) -> None:
    dry = DryRun.of(build(family.name), (2, 3, 224, 224))
    place = find_features(dry)
    (value,) = dry.trace.outputs_of(place.name)
    assert value is not None
    size = place.layout.size(dry.trace.shapes[value])
    assert (place.name, place.channels, size) == (family.layer, family.channels, family.size)
    names = [operation.name for operation in place.activations]
    assert names == (["relu"] if family.name == "densenet121" else [])
    expected = "encoder.layers.encoder_layer_11.ln_1" if family.name == "vit_b_32" else family.layer
    assert find_for_gradient(dry).name == expected


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_the_layer_found_on_hand_made_models(kind: Tiny) -> None:
    assert find_for_gradient(DryRun.of(tiny(kind.model), (2, *kind.shape))).name == kind.layer


def test_a_headless_trunk_ends_in_its_last_layer() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    assert find_features(DryRun.of(trunk, (2, 3, 16, 16))).name == "2"


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


def test_of_several_pooled_layers_it_is_the_last() -> None:
    def head(s: Any, x: Tensor) -> Tensor:
        a = s.f(x)
        return torch.cat([a.mean((2, 3)), s.more(a).mean((2, 3))], 1)

    assert find(Model(head)).name == "more"


def test_features_with_as_many_channels_as_classes_are_no_class_maps() -> None:
    model = Model(lambda s, x: torch.einsum("nc,kc->nk", s.f(x).mean((2, 3)), torch.eye(8)))
    assert find_features(DryRun.of(model, (2, 3, 32, 24))).name == "f"
