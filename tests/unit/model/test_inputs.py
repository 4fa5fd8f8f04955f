"""The inputs of a model: which of them are the images, and which rows belong to each image."""

import pytest
import torch
from torch import Tensor, nn

from camkit import Inputs
from helpers.families import Plain


def test_the_images_are_the_first_floats_with_a_spatial_size() -> None:
    x, mask, numbers = torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), torch.rand(2, 5)
    assert Inputs.of((numbers, mask, x, x + 1)).images is x
    assert Inputs.of({"numbers": numbers, "x": x}).place == "x"
    held = Inputs.of((x, numbers, mask, None)).with_images(torch.rand(5, 3, 8, 8))
    # Five images for inputs made for two: the rows of the other inputs repeat in turn.
    assert [None if t is None else len(t) for t in held] == [5, 5, 5, None]
    assert torch.equal(held[1], numbers[[0, 1, 0, 1, 0]])
    # A mask of the size of the images becomes a mask of the new size, filled with zeros.
    larger = Inputs.of((x, mask)).with_images(torch.rand(2, 3, 9, 11))
    assert larger[1].shape == (2, 9, 11)
    assert larger[1].dtype == torch.bool


class Sum(nn.Module):
    """Adds one number per image to the mean of that image."""

    def forward(self, image: Tensor, number: Tensor) -> Tensor:
        return image.mean((1, 2, 3)) + number


def test_a_tuple_goes_in_by_position_and_a_dict_by_name() -> None:
    x, number, other = torch.rand(2, 3, 4, 4), torch.tensor([1.0, 2.0]), torch.rand(4, 3, 4, 4)
    expected = other.mean((1, 2, 3)) + torch.tensor([1.0, 2.0, 1.0, 2.0])
    for given in ((x, number), {"number": number, "image": x}):
        inputs = Inputs.of(given)
        assert inputs.size == (4, 4)
        torch.testing.assert_close(inputs.run(Sum(), x), Sum()(x, number))
        torch.testing.assert_close(inputs.run(Sum(), other), expected)
        assert given == ((x, number) if isinstance(given, tuple) else {"number": number, "image": x})


def test_the_signature_tells_other_inputs_apart_and_not_other_numbers() -> None:
    x, number = torch.rand(2, 3, 4, 4), torch.rand(2)
    signature = Inputs.of((x, number, True)).signature()
    assert Inputs.of((x + 1, number + 1, True)).signature() == signature
    for other in ((x, number, False), (x, number.double(), True), (x, number[:1], True), (x, number)):
        assert Inputs.of(other).signature() != signature
    assert Inputs.of(x).signature() == ""


def test_an_error_of_the_models_own_comes_through() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="^out of paper$"):
        Inputs(torch.rand(2, 3, 4, 4)).run(Broken(), torch.rand(2, 3, 4, 4))


def test_images_on_another_device() -> None:
    """The meta device stands for a GPU.

    The test calls ``Inputs`` itself, because a method would first refuse the weights on the meta device.
    """
    x = torch.rand(2, 3, 12, 10)
    with pytest.raises(ValueError, match=r"^x: expected images on meta, where the model is, got cpu$"):
        Inputs(x).run(Plain().eval().to("meta"), x)
