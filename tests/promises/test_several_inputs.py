"""Models that take several inputs."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from helpers.families import Plain, Transformer, tiny
from helpers.registry import FEW

# FullGrad and LeGrad have tests of their own below. CAM does not explain the head of these networks.
NAMES = [name for name in camkit.METHODS if name not in ("CAM", "LeGrad", "FullGrad")]
lost = pytest.mark.filterwarnings("ignore:RelevanceCAM")


class Two(nn.Module):
    """Takes images, a row of numbers for each image, and a scale and a shift for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Plain().features
        self.numbers = nn.Linear(3, 6)
        self.fc = nn.Linear(6, 4)

    def forward(
        self, image: Tensor, numbers: Tensor, scale: float = 1.0, shift: Tensor | None = None
    ) -> Tensor:
        pooled = self.features(image).mean((2, 3))
        if shift is not None:
            pooled = pooled + shift
        return self.fc(F.relu(scale * pooled + self.numbers(numbers)))  # type: ignore[no-any-return]


class Closed(nn.Module):
    """A model with fixed values for all inputs except the images."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.args, self.kwargs = model, args, kwargs

    def forward(self, x: Tensor) -> Any:
        return self.model(x, *self.args, **self.kwargs)


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 12, 10, generator=generator).double(), torch.randn(
        count, 3, generator=generator
    ).double()


@lost
@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_explained_with_what_belongs_to_it(name: str) -> None:
    torch.manual_seed(0)
    model, (x, numbers) = tiny(Two), batch()
    method: Any = camkit.METHODS[name]
    settings = FEW.get(name, {})
    shift = torch.rand(6).double()  # the same for all images
    found = method(model, "features", **settings)((x, numbers, 2.0, shift), [0, 1, 3])
    named = {"numbers": numbers, "image": x, "shift": shift, "scale": 2.0}
    by_name = method(model, "features", **settings)(UserDict(named), [0, 1, 3])
    assert torch.equal(found.maps, by_name.maps)
    torch.testing.assert_close(found.output, model(x, numbers, 2.0, shift).detach())
    for n, target in enumerate([0, 1, 3]):
        rows = slice(n, n + 1)
        alone = method(model, "features", **settings)((x[rows], numbers[rows], 2.0, shift), target)
        torch.testing.assert_close(found.maps[n], alone.maps[0], rtol=1e-8, atol=1e-12)
        if name != "RelevanceCAM":  # its rules treat a tensor with one row for all images as a constant
            one = Closed(model, numbers[rows], 2.0, shift)
            alone = method(one, "model.features", **settings)(x[rows], target)
            torch.testing.assert_close(found.maps[n], alone.maps[0], rtol=1e-8, atol=1e-12)


def test_methods_with_calls_of_their_own() -> None:
    model, (x, numbers) = tiny(Two), batch(2)
    closed = Closed(model, numbers)
    assert torch.equal(camkit.FullGrad(model)((x, numbers), 1).maps, camkit.FullGrad(closed)(x, 1).maps)
    found = camkit.guided_backprop(model, {"image": x, "numbers": numbers}, 1)
    assert torch.equal(found, camkit.guided_backprop(closed, x, 1))
    for views in (camkit.flip_views(), camkit.noise_views(2)):
        smooth = camkit.Smoothed(camkit.GradCAM(model), views)((x, numbers), 1)
        expected = camkit.Smoothed(camkit.GradCAM(closed), views)(x, 1)
        assert torch.equal(smooth.maps, expected.maps)


def test_legrad_with_a_mask() -> None:
    class Masked(Transformer):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * mask)

    model, x = tiny(Masked), torch.rand(2, 3, 16, 12).double()
    mask = (torch.rand(2, 1, 16, 12) > 0.5).double()
    plain = Transformer().double().eval()
    plain.load_state_dict(model.state_dict())
    for method in (camkit.LeGrad, camkit.GradCAM):
        torch.testing.assert_close(method(model)((x, mask), 1).maps, method(plain)(x * mask, 1).maps)


def test_other_inputs_change_the_way() -> None:
    """A dry run is cached for its inputs only; other inputs may take another path through the model."""

    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 5), nn.Linear(6, 4)

        def forward(self, x: Tensor, deep: bool) -> Tensor:
            return self.fc((self.other if deep else self.one)(x).mean((2, 3)))  # type: ignore[no-any-return]

    method, x = camkit.GradCAM(Forks()), torch.rand(1, 3, 12, 10)
    assert [method((x, deep)).layer for deep in (False, True, False)] == ["one", "other", "one"]
