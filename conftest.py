"""Runs every Python block of the README and the documentation, offline.

The blocks of one page share one namespace. Each block runs in a temporary folder of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser
from torchvision.models import WeightsEnum, get_model

mpl.use("Agg")


@pytest.fixture
def page() -> Iterator[None]:
    """Runs a block in a folder that holds a photo, with random weights in place of the published ones."""

    def random_weights(self: WeightsEnum, *args: Any, **kwargs: Any) -> Any:
        name = type(self).__name__.removesuffix("_Weights").lower()
        return get_model(name, weights=None).state_dict()

    torch.manual_seed(0)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", random_weights)
        Image.effect_noise((320, 240), 80).convert("RGB").save(Path(folder) / "photo.jpg")
        patch.chdir(folder)
        yield


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md", "docs/*/*.md"], fixtures=["page"]
).pytest()
