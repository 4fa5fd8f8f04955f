"""The colours of heatmaps."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

import camkit

COLORMAPS = ["jet", "turbo", "viridis", "inferno", "magma", "plasma", "coolwarm", "gray"]


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_colours_are_matplotlibs(colormap: str) -> None:
    values = torch.linspace(0, 1, 1001).reshape(7, 11, 13)
    ours = camkit.colorize(values, colormap)
    assert ours.shape == (7, 3, 11, 13)
    theirs = mpl.colormaps[colormap](values.numpy(), bytes=True)[..., :3]
    assert np.array_equal((ours * 255).round().byte().permute(0, 2, 3, 1).numpy(), theirs)
