"""A CAM network that ships with its explanation: one graph, from images to logits and maps."""

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
# Any number of images; with no end to it, torch 2.6 finds the range too wide for a transformer.
_MOST_IMAGES = 2**31 - 1


def export(net: CAMNet, input_shape: Sequence[int] = (3, 224, 224)) -> ExportedProgram:
    """Exports a CAM network and its explanation as one program of ``torch.export``.

    The program's input is ``images`` ``(batch, *input_shape)``, with any number of images. Its output is a
    dict of what :meth:`CAMNet.class_maps` gives: ``"logits"`` ``(batch, classes)`` and raw signed ``"maps"``
    ``(batch, classes, *spatial)``. It needs no camkit to run, and does not follow the network: its numbers
    are copies, and ask for no gradient.

    The network stays exactly as it is, in whatever mode that is; what is exported is in evaluation mode,
    with the hooks on it. These run once, on a stand-in for the network and on a stand-in for numbers.

    Args:
        net: the network, from :func:`attach_gap_head`.
        input_shape: shape of one input without the batch, ``(C, H, W)``. The program takes no other.

    Returns:
        The program, on the device and in the type of the network. ``torch.export.save`` writes it to a
        file, and its ``module()`` runs it.

    Raises:
        TypeError: if ``net`` is no CAM network.
        ValueError: if the network cannot take such an input, or cannot be traced with any number of images.

    Example:
        >>> import camkit, torch, torchvision
        >>> net = camkit.attach_gap_head(torchvision.models.alexnet(), num_classes=7)
        >>> program = camkit.export(net)
        >>> {name: tuple(y.shape) for name, y in program.module()(torch.rand(3, 3, 224, 224)).items()}
        {'logits': (3, 7), 'maps': (3, 7, 6, 6)}
    """
    _check_net(net)
    DryRun.of(net, (2, *input_shape))  # complains about an input that the network cannot take
    # Out of the caller's inference mode: no gradient, of the input say, can pass through its tensors.
    with torch.inference_mode(False), torch.no_grad():
        stand_in = _Explained(_copy(net))
        # Two, as torch takes a dimension of one for a constant.
        images = torch.zeros(2, *input_shape).to(prototype(net))
        shapes = {"images": {0: Dim("batch", min=1, max=_MOST_IMAGES)}}
        try:
            return torch.export.export(stand_in, (images,), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ValueError(_cannot_trace(error)) from error


def export_onnx(
    net: CAMNet, path: str | os.PathLike[str], input_shape: Sequence[int] = (3, 224, 224)
) -> None:
    """Writes a CAM network and its explanation to one ONNX file; needs ``pip install camkit[onnx]``.

    The graph is that of :func:`export`, with the same names: the input ``images``, whose first dimension
    ``batch`` is any number of images, and the outputs ``logits`` and ``maps``. With average pooling, the mean
    of map c plus the bias of class c is logit c.

    A file that is there is replaced once the new one is whole. Weights of more than 1.5 GB go into a second
    file beside it, ``path`` with ``.data`` at its end, as no ONNX file can hold 2 GB; ship both.

    Args:
        net: the network, from :func:`attach_gap_head`. It stays exactly as it is.
        path: the file, in a folder that exists.
        input_shape: shape of one input without the batch, ``(C, H, W)``. The graph takes no other.

    Raises:
        TypeError: if ``net`` is no CAM network.
        ImportError: without the packages onnx and onnxscript.
        ValueError: as :func:`export`, and for a path in a folder that does not exist.
        torch.onnx.OnnxExporterError: if the network does something that ONNX has no operator for.
    """
    _check_net(net)
    _check_packages("onnx", "onnxscript")
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(checks.error_message("path", "a file in a folder that exists", repr(str(path))))
    program = torch.onnx.export(
        export(net, input_shape),
        dynamo=True,
        input_names=["images"],
        output_names=list(_OUTPUTS),
        dynamic_shapes={"images": {0: "batch"}},  # only the name: the dimension is the program's
        verbose=False,
    )
    assert program is not None  # it is, unless dynamo=False
    # The file names the one with its weights, so that both are written under their own names, elsewhere.
    with TemporaryDirectory(dir=target.parent) as folder:
        program.save(Path(folder, target.name), external_data=False)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            file.replace(target.parent / file.name)


class _Explained(nn.Module):
    """A CAM network whose forward pass gives the maps too; its parameters keep the network's names."""

    def __init__(self, net: CAMNet) -> None:
        super().__init__()
        self.trunk = net.trunk
        self.head = net.head
        self._class_maps = net.class_maps  # the method, and not the network, which would be in the names

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(_OUTPUTS, self._class_maps(images), strict=True))


class _GlobalMax(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(2).amax(2)


def _copy(net: CAMNet) -> CAMNet:
    """The network anew, in evaluation mode, with its hooks and with numbers of its own."""
    stand_in = skeleton(net, device=None, hooks=True)
    assert isinstance(stand_in, CAMNet)
    memo: dict[int, object] = {}  # so that what is shared stays shared
    for module in stand_in.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, copy.deepcopy(parameter, memo))
    # torch 2.11 has no ONNX for these, and for the largest number of each channel it has.
    if isinstance(stand_in.head.pool, _MAX_POOLINGS):
        stand_in.head.pool = _GlobalMax()
    return stand_in.requires_grad_(False)


def _check_net(net: object) -> None:
    if not isinstance(net, CAMNet):
        hint = "camkit.attach_gap_head makes one of any model"
        raise TypeError(checks.error_message("net", "a CAMNet", type(net).__name__, hint))


def _check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        expected = f"{' and '.join(names)} to be installed"
        hint = "pip install camkit[onnx]"
        raise ImportError(checks.error_message("packages", expected, f"no {' and no '.join(missing)}", hint))


def _cannot_trace(error: Exception) -> str:
    reason = " ".join(str(error).split())
    expected = "a network that torch.export can trace with any number of images"
    hint = "x.shape[0] leaves that number open, len(x) does not"
    return checks.error_message("net", expected, f"{type(error).__name__}: {reason[:200]}", hint)
