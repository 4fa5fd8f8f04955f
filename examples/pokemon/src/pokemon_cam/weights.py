"""The published ImageNet weights of the paper's networks, downloaded or read from a folder."""

from __future__ import annotations

import http.client
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, VGG19_Weights, WeightsEnum

StateDict = Mapping[str, Any]

PUBLISHED: dict[str, WeightsEnum] = {
    "VGG16-CAM": VGG16_Weights.DEFAULT,
    "AlexNet-CAM": AlexNet_Weights.DEFAULT,
    "VGG19-Grad-CAM": VGG19_Weights.DEFAULT,
}
"""The published weights from which each network of the paper starts."""


def download_weights(weights: WeightsEnum) -> StateDict:
    """Download published weights, or take them from PyTorch's cache.

    Args:
        weights: the weights to download, such as ``VGG16_Weights.DEFAULT``.

    Returns:
        The state dict.

    Raises:
        ValueError: if the download fails.
    """
    try:
        state: StateDict = weights.get_state_dict(progress=True, check_hash=True)
    # A RuntimeError means that the downloaded file does not have the expected hash.
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ValueError(
            f"--weights: expected to download {weights.url}, got {error!r}; "
            "give 'none' to train from scratch, or a folder that holds "
            f"{', '.join(_file_name(w) for w in PUBLISHED.values())}"
        ) from error
    return state


def read_weights(folder: Path, weights: WeightsEnum) -> StateDict:
    """Read published weights from a folder of checkpoint files.

    Args:
        folder: folder with the files under their published names.
        weights: the weights to read, such as ``VGG16_Weights.DEFAULT``.

    Returns:
        The state dict.

    Raises:
        ValueError: if the file is missing or is not a checkpoint.
    """
    path = folder / _file_name(weights)
    if not path.is_file():
        raise ValueError(
            f"--weights: expected 'default', 'none' or a folder that holds {path.name}, "
            f"got '{folder}'"
        )
    try:
        # A checkpoint is a pickle, which can run code; `weights_only` allows tensors only.
        state: StateDict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--weights: expected a checkpoint, got '{path}': {error}") from error
    return state


def build_with_weights(
    make: Callable[..., nn.Module], state: StateDict, weights: WeightsEnum
) -> nn.Module:
    """Create a torchvision model with published weights.

    Args:
        make: torchvision's function that creates the model, such as ``vgg16``.
        state: the state dict of the weights.
        weights: the weights that ``state`` should hold; the error names their file.

    Returns:
        The model; its tensors are those of ``state``.

    Raises:
        ValueError: if the state dict belongs to another model.
    """
    # Initialising random weights would cost time and memory, although the state dict replaces
    # every one of them. On the meta device tensors have a shape but no values.
    with torch.device("meta"):
        model = make()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"--weights: expected {_file_name(weights)} to fit {make.__name__}, got {error}"
        ) from error
    return model


def _file_name(weights: WeightsEnum) -> str:
    return str(weights.url).rpartition("/")[2]
