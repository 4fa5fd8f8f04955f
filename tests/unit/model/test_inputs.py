"""The inputs of a model: where the images are, and what belongs to each of them."""

import pytest
import torch

from camkit import Inputs
from helpers.families import Plain


def test_the_images_are_the_first_floats_with_a_spatial_size() -> None:
    x, mask, numbers = torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), torch.rand(2, 5)
    assert Inputs.of((numbers, mask, x, x + 1)).images is x
    assert Inputs.of({"numbers": numbers, "x": x}).place == "x"
    held = Inputs.of((x, numbers, mask, None)).with_images(torch.rand(5, 3, 8, 8))
    assert [None if t is None else len(t) for t in held] == [5, 5, 5, None]
    assert torch.equal(held[1], numbers[[0, 1, 0, 1, 0]])
    larger = Inputs.of((x, mask)).with_images(torch.rand(2, 3, 9, 11))
    assert larger[1].shape == (2, 9, 11)
    assert larger[1].dtype == torch.bool


X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def test_images_on_another_device() -> None:
    """The meta device in the place of a GPU, below the calls, which refuse weights without numbers."""
    with pytest.raises(ValueError, match=r"^x: expected images on meta, where the model is, got cpu$"):
        Inputs(X).run(Plain().eval().to("meta"), X)
