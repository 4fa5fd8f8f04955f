"""The location of a layer: its name, its channels, its spatial size and its layout."""

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import Plain, Residual
from helpers.written import Model


def test_a_layer_with_other_rows_than_images_is_refused() -> None:
    model = Model(
        lambda s, x: s.fc(s.f(torch.cat([x, x.flip(3)])).mean((2, 3))).unflatten(0, (2, -1)).mean(0)
    )
    with pytest.raises(
        ValueError, match="^layer: expected a layer with one row per image, got 'f', which gives 4"
    ):
        camkit.GradCAM(model)(torch.rand(2, 3, 32, 24))


def test_list_layers_gives_names_sizes_and_text() -> None:
    layers = camkit.list_layers(Plain(), (3, 12, 10))
    assert [layer.name for layer in layers] == [*(f"features.{i}" for i in range(6)), "features"]
    assert layers[3] == camkit.LayerInfo("features.3", "MaxPool2d", 5, (6, 5))
    assert str(layers[3]) == "features.3: MaxPool2d, 5 x 6 x 5"


def test_list_layers_leaves_out_what_cannot_be_tapped() -> None:
    names = [layer.name for layer in camkit.list_layers(Residual(), (3, 11, 13))]
    assert names == ["stem", "norm", "body", "out"]


def test_the_user_says_how_a_layer_reads() -> None:
    class Open(nn.Module):
        """Takes one input size only, and its feature map has as many channels as rows."""

        def __init__(self, last: bool) -> None:
            super().__init__()
            self.conv, self.mix, self.fc = nn.Conv2d(3, 6, 4, stride=4), nn.Identity(), nn.Linear(216, 4)
            self.last = last

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2:] != (24, 24):
                raise RuntimeError("another size")
            f = self.conv(x)
            f = f.permute(0, 2, 3, 1).contiguous() if self.last else f.flip(1)
            return self.fc(self.mix(f).flatten(1))  # type: ignore[no-any-return]

    x = torch.rand(2, 3, 24, 24)
    for last, layout in ((True, "channels_last"), (False, "channels_first")):
        model = Open(last)
        message = (
            r"^layer: expected an output whose channels can be told .* NCHW and as NHWC; layout= says which$"
        )
        with pytest.raises(ValueError, match=message):
            camkit.GradCAM(model, "mix")(x)
        found = camkit.EigenCAM(model, "mix", layout=layout)(x)
        expected = camkit.EigenCAM(model, "conv")(x)  # the order of channels does not matter here
        torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-4)
        tokens = camkit.Layout(-1, grid=(6, 6))
        with pytest.raises(
            ValueError, match=r"^layout: expected an output \(N, 36, C\), and a grid of 2 dimensions"
        ):
            camkit.GradCAM(model, "mix", layout=tokens)(x)
