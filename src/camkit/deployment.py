"""Exporting a CAM network together with its explanation: one graph from images to logits and maps."""

import copy
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from camkit._tools import checks
from camkit.layers.dryrun import DryRun
from camkit.model.modules import prototype
from camkit.model.standin import skeleton
from camkit.surgery import CAMNet

_OUTPUTS = ("logits", "maps")
_MAX_POOLINGS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
# Stands for "any number of images". Without an upper bound, torch 2.6 rejects the range for a transformer.
_MOST_IMAGES = 2**31 - 1


def export(net: CAMNet, input_shape: Sequence[int] = (3, 224, 224)) -> ExportedProgram:
    """Exports a CAM network and its explanation as one ``torch.export`` program.

    The program takes ``images`` ``(batch, *input_shape)`` with any number of images. It returns the result of
    :meth:`CAMNet.class_maps` as a dict: ``"logits"`` ``(batch, classes)`` and the raw signed ``"maps"``
    ``(batch, classes, *spatial)``. The program runs without camkit. It holds copies of the weights, which
    require no gradient, so that later changes to the network do not reach it.

    The network itself is not changed and keeps its mode. The program computes the network in evaluation mode,
    with the forward hooks that are registered on it. For the export these hooks run once, on a stand-in for
    the network and on tensors without numbers.

    Args:
        net: a network from :func:`attach_gap_head`.
        input_shape: shape of one input without the batch dimension, ``(C, H, W)``. The program accepts only
            this shape.

    Returns:
        The program, on the device and in the dtype of the network. Its ``module()`` runs it, and
        ``torch.export.save`` writes it to a file.

    Raises:
        TypeError: if ``net`` is not a :class:`CAMNet`.
        ValueError: if the network cannot take such an input, or if ``torch.export`` cannot trace it for any
            number of images.

    Example:
        >>> import camkit, torch, torchvision
        >>> net = camkit.attach_gap_head(torchvision.models.alexnet(), num_classes=7)
        >>> program = camkit.export(net)
        >>> {name: tuple(y.shape) for name, y in program.module()(torch.rand(3, 3, 224, 224)).items()}
        {'logits': (3, 7), 'maps': (3, 7, 6, 6)}
    """
    _require_cam_net(net)
    DryRun.of(net, (2, *input_shape))  # raises a clear error for an input that the network cannot take
    # Leave the caller's inference mode. Copies made in that mode could not take part in a graph, so that the
    # program would have no gradient with respect to its input.
    with torch.inference_mode(False), torch.no_grad():
        stand_in = _WithMaps(_copy_in_evaluation_mode(net))
        # Two images: torch.export would take a dimension of length one for a constant.
        images = torch.zeros(2, *input_shape).to(prototype(net))
        shapes = {"images": {0: Dim("batch", min=1, max=_MOST_IMAGES)}}
        try:
            return torch.export.export(stand_in, (images,), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ValueError(_tracing_error_message(error)) from error


def export_onnx(
    net: CAMNet, path: str | os.PathLike[str], input_shape: Sequence[int] = (3, 224, 224)
) -> None:
    """Writes a CAM network and its explanation to one ONNX file; needs ``pip install camkit[onnx]``.

    The graph is the one of :func:`export`, with the same names. Its input is ``images``, whose first
    dimension ``batch`` is any number of images; its outputs are ``logits`` and ``maps``. With average
    pooling, the mean of map c plus the bias of class c is logit c.

    An existing file is replaced only when the new one is complete. An ONNX file cannot hold 2 GB, so that
    weights of more than 1.5 GB go into a second file beside it, named ``path`` with ``.data`` appended. Ship
    both files.

    Args:
        net: a network from :func:`attach_gap_head`. It is not changed.
        path: the file to write, in an existing folder.
        input_shape: shape of one input without the batch dimension, ``(C, H, W)``. The graph accepts only
            this shape.

    Raises:
        TypeError: if ``net`` is not a :class:`CAMNet`.
        ImportError: if the package onnx or onnxscript is missing.
        ValueError: for the reasons of :func:`export`; if ``path`` is a folder, or its folder does not exist.
        torch.onnx.OnnxExporterError: if ONNX has no operator for an operation of the network.
    """
    _require_cam_net(net)
    _require_packages("onnx", "onnxscript")
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(checks.error_message("path", "a file in a folder that exists", repr(str(path))))
    program = torch.onnx.export(
        export(net, input_shape),
        dynamo=True,
        input_names=["images"],
        output_names=list(_OUTPUTS),
        dynamic_shapes={"images": {0: "batch"}},  # the name; the program says that it is dynamic
        verbose=False,
    )
    assert program is not None  # torch returns None only with dynamo=False
    # Write to a folder beside the target and move the files when they are complete. They need their final
    # names from the start, because the ONNX file refers to the file of its weights by name.
    with TemporaryDirectory(dir=target.parent) as folder:
        program.save(Path(folder, target.name), external_data=False)
        # Move the weights (".data") first, so that the new ONNX file never stands beside old weights.
        for file in sorted(Path(folder).iterdir(), reverse=True):
            file.replace(target.parent / file.name)


class _WithMaps(nn.Module):
    """A CAM network whose forward pass returns the maps too; its parameters keep the network's names."""

    def __init__(self, net: CAMNet) -> None:
        super().__init__()
        self.trunk = net.trunk
        self.head = net.head
        # Keep the bound method: the network as a submodule would prefix the names of all parameters.
        self._class_maps = net.class_maps

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(_OUTPUTS, self._class_maps(images), strict=True))


class _GlobalMax(nn.Module):
    """Global max pooling by an operation that ONNX has: features ``(N, C, *spatial)`` to ``(N, C)``."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(2).amax(2)


def _copy_in_evaluation_mode(net: CAMNet) -> CAMNet:
    """Copies the network in evaluation mode, with its hooks and with copies of its parameters."""
    stand_in = skeleton(net, device=None, hooks=True)
    assert isinstance(stand_in, CAMNet)
    # One memo for all parameters, so that a parameter shared by two modules is copied once and stays shared.
    memo: dict[int, object] = {}
    for module in stand_in.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, copy.deepcopy(parameter, memo))
    # torch 2.11 cannot translate adaptive max pooling to ONNX, but it can translate the maximum.
    if isinstance(stand_in.head.pool, _MAX_POOLINGS):
        stand_in.head.pool = _GlobalMax()
    return stand_in.requires_grad_(False)


def _require_cam_net(net: object) -> None:
    if not isinstance(net, CAMNet):
        hint = "camkit.attach_gap_head makes one of any model"
        raise TypeError(checks.error_message("net", "a CAMNet", type(net).__name__, hint))


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        expected = f"{' and '.join(names)} to be installed"
        hint = "pip install camkit[onnx]"
        raise ImportError(checks.error_message("packages", expected, f"no {' and no '.join(missing)}", hint))


def _tracing_error_message(error: Exception) -> str:
    # torch's messages span many lines; keep the start, on one line.
    reason = " ".join(str(error).split())
    expected = "a network that torch.export can trace with any number of images"
    hint = "x.shape[0] leaves that number open, len(x) does not"
    return checks.error_message("net", expected, f"{type(error).__name__}: {reason[:200]}", hint)
