"""Head surgery: turns any backbone into a network whose class activation map is exact.

The network is the trunk of the backbone, global pooling and one new linear layer.
"""

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import nn

from camkit._tools import checks
from camkit.layers.dryrun import DryRun
from camkit.layers.layouts import Layout
from camkit.layers.location import Location, locate
from camkit.layers.search import find_features
from camkit.layers.trace import record
from camkit.model.modules import layer_name, prototype, require_floats, unwrap


class ClassMaps(NamedTuple):
    """The logits of a batch, and the class activation map of every class.

    Attributes:
        logits: shape ``(N, classes)``.
        maps: raw signed maps, ``(N, classes, h, w)``.
    """

    logits: torch.Tensor
    maps: torch.Tensor


class CAMNet(nn.Module):
    """A CAM network: a trunk, global pooling and one linear layer, as :func:`attach_gap_head` makes it.

    Attributes:
        trunk: a copy of the model without the modules after the layer. Its parameters and buffers keep the
            model's names, so that ``net.trunk.load_state_dict(published, strict=False)`` loads published
            weights.
        head: the new layers, a :class:`CAMHead`.
        layer: name of the trunk's last layer.
        frozen: whether the trunk is frozen: its parameters require no gradient, and it stays in evaluation
            mode when the network trains.

    References:
        Zhou et al., *Learning Deep Features for Discriminative Localization*, CVPR 2016.
    """

    def __init__(self, trunk: nn.Module, head: "CAMHead", layer: str, *, frozen: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.layer = layer
        self.frozen = frozen
        self._capture = _Capture()
        # Put our hook first, so that we capture the output before other hooks change it.
        trunk.get_submodule(layer).register_forward_hook(self._capture, prepend=True)
        if frozen:
            trunk.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the logits ``(N, classes)`` of a batch ``(N, C, H, W)``."""
        logits: torch.Tensor = self.head(self._activation(x))
        return logits

    @torch.no_grad()
    def class_maps(self, x: torch.Tensor) -> ClassMaps:
        r"""Computes the logits and the maps of all classes in one pass, without a gradient.

        .. math::
            M_c = \sum_k w_{ck} A_k

        With average pooling, the mean of :math:`M_c` plus the bias of class c is logit c.

        Args:
            x: inputs, ``(N, C, H, W)``.

        Returns:
            The ``logits`` ``(N, classes)`` and the raw signed ``maps`` ``(N, classes, h, w)``.

        References:
            Zhou et al., CVPR 2016, equation 2.
        """
        features = self.head.features(self._activation(x))
        maps = torch.einsum("kc,nc...->nk...", self.head.linear.weight, features)
        return ClassMaps(self.head.classify(features), maps)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the network, but keeps a frozen trunk in evaluation mode.

        The running statistics of the trunk's batch normalisations therefore do not change.

        Args:
            mode: ``True`` for training mode, ``False`` for evaluation mode.

        Returns:
            The network itself.
        """
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def unfreeze(self) -> Self:
        """Makes the trunk trainable and puts it in the mode that the network is in.

        Returns:
            The network itself.
        """
        self.frozen = False
        self.trunk.requires_grad_(True)
        return self.train(self.training)

    def extra_repr(self) -> str:
        """Returns the layer and the flag, which ``print`` shows."""
        return f"layer={self.layer!r}, frozen={self.frozen}"

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        # The trunk's return value is not used: the hook on its last layer captures the activation.
        self.trunk(x)
        return _captured.activations.pop(self._capture.key)


class CAMHead(nn.Module):
    """The part of a CAM network after the trunk: features, global pooling, linear layer.

    Attributes:
        features: turns the trunk's activation into features ``(N, C, *spatial)``. It holds, where needed, a
            change of layout, an activation function that the model applied outside any module, and the
            optional convolution with its ReLU.
        pool: global average or max pooling.
        linear: the linear layer. Its weights are the weights of the class activation map.
    """

    def __init__(self, features: nn.Sequential, pool: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.pool = pool
        self.linear = linear

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Computes the logits ``(N, classes)`` from the trunk's activation."""
        return self.classify(self.features(activation))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Computes the logits ``(N, classes)`` from features ``(N, C, *spatial)``."""
        logits: torch.Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def attach_gap_head(
    model: nn.Module,
    num_classes: int,
    *,
    layer: str | nn.Module | None = None,
    pooling: Literal["avg", "max"] = "avg",
    conv_channels: int | None = None,
    input_shape: Sequence[int] = (3, 224, 224),
    freeze: bool = True,
) -> CAMNet:
    """Makes a CAM network from any backbone: its trunk, global pooling and one new linear layer.

    The model itself is not changed. The network holds a copy of its trunk, and no copy of the modules after
    the trunk. A dry run of a stand-in for the model finds the layer.

    Args:
        model: any module that takes images, such as a torchvision classifier (transformers included) or
            your own.
        num_classes: number of classes of the new linear layer.
        layer: the layer that ends the trunk, by name or as the module; its output is pooled as it is. By
            default the last spatial layer, followed by the activation function if the model applies one to
            its output outside any module (DenseNet's ReLU). An earlier layer gives a finer map: VGG16's
            ``"features.29"`` has 14 x 14 positions.
        pooling: ``"avg"`` (Zhou et al.) or ``"max"`` (Oquab et al., CVPR 2015).
        conv_channels: adds a 3 x 3 convolution with this number of channels and a ReLU before the pooling,
            as in the networks that Zhou et al. released (1,024). Not added by default.
        input_shape: shape of one input without the batch dimension, ``(C, H, W)``, for the dry run.
        freeze: whether only the new layers train. :meth:`CAMNet.unfreeze` makes the trunk trainable later.

    Returns:
        The network, with the device, dtype and mode of the model. The new layers have random weights.

    Raises:
        ValueError: if the model has no such layer, if the layer did not run exactly once or has no spatial
            size; if the model has no spatial layer, cannot take such an input, or computes something else
            once it is copied; for a value out of range.
        TypeError: for an argument of the wrong type, a quantized model, or a model that
            ``copy.deepcopy`` cannot copy.

    Example:
        >>> import camkit, torch, torchvision
        >>> net = camkit.attach_gap_head(torchvision.models.alexnet(), num_classes=7)
        >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
        1799
        >>> logits, maps = net.class_maps(torch.rand(2, 3, 224, 224))
        >>> logits.shape, maps.shape
        (torch.Size([2, 7]), torch.Size([2, 7, 6, 6]))

    References:
        Zhou et al., *Learning Deep Features for Discriminative Localization*, CVPR 2016, sections 2 and 3.
    """
    model = unwrap(model)
    require_floats(model)
    checks.one_of("pooling", pooling, ("avg", "max"))
    checks.positive("num_classes", num_classes)
    if conv_channels is not None:
        checks.positive("conv_channels", conv_channels)
    checks.lengths("input_shape", "positive lengths (C, H, W)", input_shape)
    name = None if layer is None else layer_name(model, layer)
    dry = DryRun.of(model, (2, *input_shape))
    place = find_features(dry) if name is None else locate(dry, name)
    head = _make_head(model, place, num_classes, pooling, conv_channels)
    net = CAMNet(_make_trunk(model, place), head, place.name, frozen=freeze)
    return net.train(model.training)


def _make_head(
    model: nn.Module, place: Location, num_classes: int, pooling: str, conv_channels: int | None
) -> CAMHead:
    """Makes the new layers for the activation at ``place``, with the device and dtype of the model."""
    # 1, 2 or 3 spatial dimensions, the number in the names of classes such as Conv1d, Conv2d and Conv3d.
    dims = len(place.dry.trace.input_shape) - 2
    features = OrderedDict[str, nn.Module]()
    if place.layout != Layout():
        features["grid"] = _ChannelsFirst(place.layout)
    # Only a layer that was found by default has these: a layer named by the user is pooled as it is.
    if place.activations:
        features["activation"] = place.activation
    channels = place.channels
    if conv_channels is not None:
        convolution = getattr(nn, f"Conv{dims}d")
        features["conv"] = convolution(channels, conv_channels, 3, padding=1)
        features["relu"] = nn.ReLU()
        channels = conv_channels
    pool = getattr(nn, f"Adaptive{pooling.capitalize()}Pool{dims}d")(1)
    linear = nn.Linear(channels, num_classes)
    return CAMHead(nn.Sequential(features), pool, linear).to(prototype(model))


class _ChannelsFirst(nn.Module):
    """Turns an activation of a given layout into ``(N, C, *spatial)``."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return self.layout.channels_first(activation)

    def extra_repr(self) -> str:
        return str(self.layout)


class _Captured(threading.local):
    """The activations that the passes of this thread captured, by the key of the hook.

    They are stored for each thread, so that threads can share a network. They are not stored in the network,
    so that it can be copied, pickled and compiled.
    """

    def __init__(self) -> None:
        self.activations: dict[int, torch.Tensor] = {}


_captured = _Captured()
_keys = itertools.count()


class _Capture:
    """A forward hook that captures the output of the trunk's last layer."""

    def __init__(self) -> None:
        self.key = next(_keys)

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        _captured.activations[self.key] = output
        # The rest of the trunk runs on a detached copy. Its result is not used, needs no graph, and an
        # in-place operation in it must not change the captured tensor.
        return output.detach().clone()


def _make_trunk(model: nn.Module, place: Location) -> nn.Module:
    """Copies the model with identities in place of the modules that the layer's output does not need.

    Raises:
        TypeError: if the model cannot be copied.
        ValueError: if the copy does not compute the layer's output in the same way as the model.
    """
    trace = place.dry.trace
    parts = place.name.split(".")
    # The modules around the layer, from the model itself ("") down to the layer's parent.
    ancestors = [".".join(parts[:depth]) for depth in range(len(parts))]
    # A module may not work with an identity inside: an identity takes one input, an attention takes three. If
    # the trunk fails, keep the innermost module around the layer whole, then the next one, and so on.
    while True:
        trunk = _copy_with_identities(model, _unneeded_children(model, place, ancestors))
        try:
            again = record(trunk, trace.input_shape, place.dry.device)
            (copied,) = again.outputs_of(place.name)
        except Exception:
            copied = None
        if copied is not None and again.history(copied) == trace.history(place.value):
            return trunk
        if not ancestors:
            expected = "a model whose copy does the same operations"
            raise ValueError(checks.error_message("model", expected, place.dry.kind))
        ancestors.pop()


def _unneeded_children(model: nn.Module, place: Location, ancestors: Sequence[str]) -> list[nn.Module]:
    """Returns the children of the modules named ``ancestors`` that the layer's output does not need."""
    trace = place.dry.trace
    end = [name for name, _ in trace.calls].index(place.name)
    # A module is needed if it started before the layer ended. It is also needed if the layer's output was
    # computed from one of its parameters, which may happen without a call of the module.
    needed = {name for name, ended in trace.started.items() if ended <= end}
    needed |= {trace.parameters[v] for v in trace.ancestors(place.value) if v in trace.parameters}
    unneeded = []
    for ancestor in ancestors:
        for child, module in model.get_submodule(ancestor).named_children():
            name = f"{ancestor}.{child}" if ancestor else child
            if not any(n == name or n.startswith(f"{name}.") for n in needed):
                # The model may iterate over a list or index it, so keep the list and replace its entries.
                is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
                unneeded += list(module.children()) if is_list else [module]
    return unneeded


def _copy_with_identities(model: nn.Module, replaced: Sequence[nn.Module]) -> nn.Module:
    """Makes a deep copy of the model, with an identity in place of each of the modules ``replaced``.

    Raises:
        TypeError: if the model cannot be copied.
    """
    try:
        # deepcopy looks in its memo first. It finds the identity there and never copies the module.
        return copy.deepcopy(model, memo={id(module): nn.Identity() for module in replaced})
    except Exception as error:
        expected = "a model that copy.deepcopy can copy"
        got = f"{type(model).__name__} ({type(error).__name__}: {error})"
        raise TypeError(checks.error_message("model", expected, got)) from error
