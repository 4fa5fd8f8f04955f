"""Head surgery: any backbone becomes trunk -> global pooling -> one linear layer, whose CAM is exact."""

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
    """Logits ``(N, classes)``, and the class activation map of every class ``(N, classes, h, w)``."""

    logits: torch.Tensor
    maps: torch.Tensor


class CAMNet(nn.Module):
    """A CAM network: a trunk, global pooling and one linear layer. Made by :func:`attach_gap_head`.

    Attributes:
        trunk: a copy of the model, what comes after the layer cut away. Its parameters and buffers keep the
            model's names, so ``net.trunk.load_state_dict(published, strict=False)`` loads published
            weights.
        head: the new layers, a :class:`CAMHead`.
        layer: name of the trunk's last layer.
        frozen: whether the trunk stays in evaluation mode in :meth:`train`.
    """

    def __init__(self, trunk: nn.Module, head: "CAMHead", layer: str, *, frozen: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.layer = layer
        self.frozen = frozen
        self._capture = _Capture()
        # First in line: it takes what the layer gives, and not what other hooks make of that.
        trunk.get_submodule(layer).register_forward_hook(self._capture, prepend=True)
        if frozen:
            trunk.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)`` of a batch ``(N, C, H, W)``."""
        logits: torch.Tensor = self.head(self._activation(x))
        return logits

    @torch.no_grad()
    def class_maps(self, x: torch.Tensor) -> ClassMaps:
        r"""Logits and the maps of all classes, in one pass and without a gradient.

        With average pooling, the mean of map c plus the bias of class c is logit c.

        Args:
            x: inputs, ``(N, C, H, W)``.

        Returns:
            ``logits`` ``(N, classes)`` and raw signed ``maps`` ``(N, classes, h, w)``.
        """
        features = self.head.features(self._activation(x))
        maps = torch.einsum("kc,nc...->nk...", self.head.linear.weight, features)
        return ClassMaps(self.head.classify(features), maps)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but a frozen trunk stays in evaluation mode: its statistics do not drift."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def unfreeze(self) -> Self:
        """Lets all of the network train, in the mode that it is in."""
        self.frozen = False
        self.trunk.requires_grad_(True)
        return self.train(self.training)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the modules."""
        return f"layer={self.layer!r}, frozen={self.frozen}"

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        self.trunk(x)
        return _captured.activations.pop(self._capture.key)


class CAMHead(nn.Module):
    """What comes after the trunk: features -> global pooling -> linear.

    Attributes:
        features: what makes ``(N, C, *spatial)`` of the trunk's activation: its layout, an activation
            function that the model applied outside any module, the optional convolution.
        pool: global average or max pooling.
        linear: the linear layer; its weights are those of the class activation map.
    """

    def __init__(self, features: nn.Sequential, pool: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.pool = pool
        self.linear = linear

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)`` of the trunk's activation."""
        return self.classify(self.features(activation))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)`` of features ``(N, C, *spatial)``."""
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
    """Makes a CAM network of any backbone: its trunk, global pooling, and one new linear layer.

    The model stays as it is; the network has a copy of its trunk, and no copy of what came after it.
    The layer is found by a dry run of a stand-in for the model.

    Args:
        model: any module that takes images: torchvision's classifiers, transformers included, or your own.
        num_classes: number of classes of the new linear layer.
        layer: where the trunk ends, by name or as the module: its output, without a function that the model
            applies to it afterwards. By default the last spatial layer, with such a function (DenseNet's
            ReLU). An earlier one gives a finer map: VGG16's ``"features.29"`` has 14 x 14 positions.
        pooling: ``"avg"`` (Zhou et al.) or ``"max"`` (Oquab et al., CVPR 2015).
        conv_channels: if given, a new 3 x 3 convolution with so many channels and a ReLU come before the
            pooling, as in the networks that Zhou et al. released (1,024).
        input_shape: shape of one input without the batch, ``(C, H, W)``, for the dry run.
        freeze: whether only the new layers train; see :meth:`CAMNet.unfreeze`.

    Returns:
        The network, on the device and in the type and mode of the model, its new layers drawn at random.

    Raises:
        ValueError: for a layer that is not there, did not run once or has no spatial size; for a model
            without a spatial layer or that cannot take such an input; for other values out of range.
        TypeError: for arguments of another kind.

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
    head = _head(model, place, num_classes, pooling, conv_channels)
    net = CAMNet(_trunk(model, place), head, place.name, frozen=freeze)
    return net.train(model.training)


def _head(
    model: nn.Module, place: Location, num_classes: int, pooling: str, conv_channels: int | None
) -> CAMHead:
    dims = len(place.dry.trace.input_shape) - 2
    features = OrderedDict[str, nn.Module]()
    if place.layout != Layout():
        features["grid"] = _ChannelsFirst(place.layout)
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
    """Turns the trunk's activation into ``(N, C, *spatial)``."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return self.layout.channels_first(activation)

    def extra_repr(self) -> str:
        return str(self.layout)


class _Captured(threading.local):
    """What the trunks' layers gave in this thread's passes, by the key of their hook.

    Of a thread, so that threads can share a network, and not of the network, so that it can be copied,
    pickled and compiled.
    """

    def __init__(self) -> None:
        self.activations: dict[int, torch.Tensor] = {}


_captured = _Captured()
_keys = itertools.count()


class _Capture:
    """A hook that takes the layer's output; what is left of the trunk runs on a copy, which nobody reads."""

    def __init__(self) -> None:
        self.key = next(_keys)

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        _captured.activations[self.key] = output
        return output.detach().clone()


def _trunk(model: nn.Module, place: Location) -> nn.Module:
    """A copy of the model in which the modules that run only after the layer are identities.

    Raises:
        TypeError: if the model cannot be copied.
    """
    trace = place.dry.trace
    parts = place.name.split(".")
    ancestors = [".".join(parts[:depth]) for depth in range(len(parts))]
    # Where an identity does not fit (an attention with three inputs), the layer's own block stays whole.
    while True:
        trunk = _copy(model, _modules_after(model, place, ancestors))
        try:
            again = record(trunk, trace.input_shape, place.dry.device)
            (same,) = again.outputs_of(place.name)
        except Exception:
            same = None
        if same is not None and again.history(same) == trace.history(place.value):
            return trunk
        if not ancestors:
            expected = "a model whose copy does what it does"
            raise ValueError(checks.error_message("model", expected, place.dry.kind))
        ancestors.pop()


def _modules_after(model: nn.Module, place: Location, ancestors: Sequence[str]) -> list[nn.Module]:
    """The children of these modules that take no part in what the layer gives."""
    trace = place.dry.trace
    end = [name for name, _ in trace.calls].index(place.name)
    # What started before the layer ended, and what has a parameter in its output without ever being called.
    alive = {name for name, ended in trace.started.items() if ended <= end}
    alive |= {trace.parameters[v] for v in trace.ancestors(place.value) if v in trace.parameters}
    dead = []
    for ancestor in ancestors:
        for child, module in model.get_submodule(ancestor).named_children():
            name = f"{ancestor}.{child}" if ancestor else child
            if not any(a == name or a.startswith(f"{name}.") for a in alive):
                # A list is never called: it stays, with identities in it.
                is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
                dead += list(module.children()) if is_list else [module]
    return dead


def _copy(model: nn.Module, dead: Sequence[nn.Module]) -> nn.Module:
    """A deep copy with identities in the place of ``dead``, which is not copied."""
    try:
        return copy.deepcopy(model, memo={id(module): nn.Identity() for module in dead})
    except Exception as error:
        expected = "a model that copy.deepcopy can copy"
        got = f"{type(model).__name__} ({type(error).__name__}: {error})"
        raise TypeError(checks.error_message("model", expected, got)) from error
