"""Names and modules, and the layer that a map is made at when nobody names one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from camkit import _checks
from camkit.dryrun import DryRun
from camkit.layouts import Layout
from camkit.trace import Operation, Trace

#: Element-wise functions that may stand between a module's output and the pooling, as DenseNet's ReLU does.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
#: Poolings, by what they take of each channel.
POOLINGS = {"mean": "avg", "amax": "max"} | {
    f"{adaptive}{kind}_pool{d}d": kind
    for adaptive in ("", "adaptive_")
    for kind in ("avg", "max")
    for d in (1, 2, 3)
}
#: What changes the shape only.
RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}


@dataclass(frozen=True)
class LayerInfo:
    """One layer that a map can be made at.

    Attributes:
        name: dotted name, as ``layer=`` takes it.
        kind: class of the module.
        channels: number of channels.
        size: size of its map at the input size of the dry run.
    """

    name: str
    kind: str
    channels: int
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}, {self.channels} x {_checks.shape_of(self.size)}"


@dataclass(frozen=True)
class Location:
    """Where a map is made: one layer of one model at one input size.

    Attributes:
        name: dotted name of the layer.
        layout: how its output reads as ``(N, C, *spatial)``.
        channels: number of channels.
        size: its spatial size.
        activations: names of the functions in :data:`ACTIVATIONS` that the forward pass applies to the
            layer's output before anything else, outside any module.
        value: the layer's output in the dry run.
        after: what the forward pass does with the result, up to the model's output.
        dry: the dry run that tells all this.
    """

    name: str
    layout: Layout
    channels: int
    size: tuple[int, ...]
    activations: tuple[str, ...]
    value: int
    after: tuple[Operation, ...]
    dry: DryRun

    def activation(self) -> nn.Sequential:
        """The functions named in :attr:`activations` as one module."""
        return nn.Sequential(*(ACTIVATIONS[name]() for name in self.activations))


def list_layers(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> tuple[LayerInfo, ...]:
    """Every layer of a model that a map can be made at, in the order in which they end.

    A stand-in for the model runs, on shapes where they are enough: nothing in the model changes.

    Args:
        model: any module.
        input_shape: shape of one input without the batch, ``(C, H, W)``.

    Returns:
        One :class:`LayerInfo` for each layer that runs once and whose output has a spatial size.

    Raises:
        ValueError: if the model cannot take such an input.

    Example:
        >>> import camkit, torchvision
        >>> print(camkit.list_layers(torchvision.models.alexnet())[-1])
        avgpool: AdaptiveAvgPool2d, 256 x 6 x 6
    """
    _checks.module("model", model)
    dry = DryRun.of(model, (2, *input_shape))
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name in dict.fromkeys(name for name, _ in dry.trace.calls if name):
        try:
            place = locate(dry, name)
        except ValueError:  # no map can be made here, and locate says why
            continue
        found.append(LayerInfo(name, type(modules[name]).__name__, place.channels, place.size))
    return tuple(found)


def name_of(model: nn.Module, layer: str | nn.Module) -> str:
    """The dotted name of a layer that is given by name or as the module itself.

    Raises:
        ValueError: if the model has no such layer.
        TypeError: if ``layer`` is neither a name nor a module.
    """
    kind = type(model).__name__
    modules: dict[str, nn.Module] = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name
        got = f"a {type(layer).__name__} that is not in it"
        raise ValueError(_checks.complaint("layer", f"a module of {kind}", got))
    if not isinstance(layer, str):
        raise TypeError(_checks.complaint("layer", "a name or a module", type(layer).__name__))
    if layer not in modules:
        hint = _checks.close_matches(layer, list(modules)) or "camkit.list_layers lists them"
        expected = f"the name of a layer of {kind}"
        raise ValueError(_checks.complaint("layer", expected, repr(layer), hint))
    return layer


def ran_once(name: str, calls: int) -> None:
    """Raise a ``ValueError`` unless a layer ran once."""
    if calls == 0:
        raise ValueError(
            _checks.complaint(
                "layer",
                "a layer that runs in the forward pass",
                f"{name!r}, which never ran",
                "camkit.list_layers lists those that do",
            )
        )
    if calls > 1:
        got = f"{name!r}, which ran {calls} times"
        raise ValueError(_checks.complaint("layer", "a layer that runs once a pass", got))


def locate(dry: DryRun, name: str) -> Location:
    """The :class:`Location` of the layer of that name.

    Raises:
        ValueError: if it did not run exactly once, or if its output has no spatial size.
    """
    values = dry.trace.outputs_of(name)
    ran_once(name, len(values))
    if values[0] is None:
        expected = "a layer whose output is one tensor"
        raise ValueError(_checks.complaint("layer", expected, f"{name!r}, whose output is not"))
    return _location(dry, name, values[0])


def find_before_pooling(dry: DryRun) -> Location:
    """The last spatial layer: what the model pools, flattens or picks a token from.

    Walks back from the output to the values that have a spatial size, and takes the one that was made last.

    Raises:
        ValueError: if there is none.
    """
    trace = dry.trace
    spatial, seen, queue = [], set[int](), [trace.output]
    while queue:
        value = queue.pop()
        if value in seen or value == trace.input or value in trace.parameters:
            continue
        seen.add(value)
        if dry.is_spatial(value):
            spatial.append(value)
        elif (operation := trace.producer(value)) is not None:
            queue.extend(operation.inputs)
    if not spatial:
        got = f"{dry.kind}, where nothing is spatial at input {_checks.shape_of(trace.input_shape[1:])}"
        raise ValueError(_checks.complaint("model", "a model with a spatial layer", got))
    return _nearest(dry, max(spatial))


def find_features(dry: DryRun) -> Location:
    """The last spatial layer of features.

    It is :func:`find_before_pooling`'s. But where that is class maps already, which are pooled and no more
    (SqueezeNet), it is what their convolution took in.

    Raises:
        ValueError: if there is none.
    """
    place = find_before_pooling(dry)
    trace = dry.trace
    only_pools = all(o.name in POOLINGS.keys() | RESHAPES | ACTIVATIONS.keys() for o in place.after)
    if not place.after or not only_pools:
        return place
    operation = trace.producer(place.after[0].inputs[0])
    while operation is not None and operation.name in ACTIVATIONS:
        operation = trace.producer(operation.inputs[0])
    if operation is None or operation.name not in CONVOLUTIONS:
        return place
    return _nearest(dry, operation.inputs[0])


def find_for_gradient(dry: DryRun) -> Location:
    """The last spatial layer of which every position reaches the output.

    It is :func:`find_features`'. But of models that read one token only nothing of the others reaches the
    output after the last attention; there it is what that attention takes in.

    Raises:
        ValueError: if there is none.
    """
    place = find_features(dry)
    trace = dry.trace
    if place.layout.grid is None or not place.after:
        return place
    (first, *_), shapes = place.after, trace.shapes
    value = first.inputs[0]
    if math.prod(shapes[first.outputs[0]]) != shapes[value][0] * place.channels:  # more than one token
        return place
    above = set(trace.ancestors(value))
    for operation in reversed(trace.operations):
        if above.isdisjoint(operation.outputs) or not _is_attention(trace, operation):
            continue
        sources = [set(trace.ancestors(v)) for v in operation.inputs if v in trace.from_input]
        common = set[int].intersection(*sources) if sources else set()
        for source in sorted(common, reverse=True):
            if shapes[source] == shapes[value] and trace.layer_of(source) is not None:
                return _nearest(dry, source)
    return place


def find_stages(dry: DryRun) -> list[Location]:
    """The last layer of each resolution on the way to :func:`find_for_gradient`'s, that one included.

    It is the last of the outermost modules there. What only reduces the resolution (a pooling) is left out,
    and so is a resolution that one layer alone has (a first convolution with a stride).

    Raises:
        ValueError: if there is no spatial layer.
    """
    trace, last = dry.trace, find_for_gradient(dry)
    above = set(trace.ancestors(last.value)) & trace.from_input
    stages: dict[tuple[int, ...], list[Location]] = {}
    for name, value in trace.calls:
        operation = trace.producer(value) if value in above else None
        if operation is None or operation.name in POOLINGS or trace.outputs_of(name) != [value]:
            continue
        if name and dry.layout(operation.outputs[0]) is not None:
            place = locate(dry, name)
            stages.setdefault(place.size, []).append(place)
    stages.pop(last.size, None)
    several = [stage for stage in stages.values() if len(stage) > 1]
    return [*(min(reversed(stage), key=lambda place: place.name.count(".")) for stage in several), last]


def attention_blocks(dry: DryRun) -> list[Location]:
    """The blocks of a transformer: those that give tokens, and in which there is attention; perhaps none."""
    trace = dry.trace
    paths = [o.module.split(".") for o in trace.operations if _is_attention(trace, o)]
    depth = next((d for d, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), None)
    if depth is None:
        return []
    found = []
    for name in dict.fromkeys(".".join(path[: depth + 1]) for path in paths):
        values = trace.outputs_of(name)
        layout = dry.layout(values[0]) if len(values) == 1 and values[0] is not None else None
        if layout is not None and layout.grid is not None:
            found.append(locate(dry, name))
    return found


def _is_attention(trace: Trace, operation: Operation) -> bool:
    """Whether it is attention, or the product of a softmax with the values."""
    if operation.name in _ATTENTION:
        return True
    if operation.name not in _PRODUCTS:
        return False
    for value in operation.inputs:
        maker = trace.producer(value)
        for _ in range(3):  # perhaps through a cast or a change of shape
            if maker is None or maker.name == "softmax" or len(maker.inputs) != 1:
                break
            maker = trace.producer(maker.inputs[0])
        if maker is not None and maker.name == "softmax":
            return True
    return False


def _nearest(dry: DryRun, value: int) -> Location:
    """The location from whose layer's output ``value`` is made by element-wise functions alone.

    What pools, reshapes or picks along the way (``F.max_pool2d`` between two layers, a mean over one
    side) is left to what follows the layer.
    """
    trace, start = dry.trace, value
    activations: list[str] = []
    while True:
        name = trace.layer_of(value)
        if name is not None and trace.outputs_of(name) == [value] and dry.layout(value) is not None:
            return _location(dry, name, value, tuple(reversed(activations)))
        operation = trace.producer(value)
        if operation is None or not _leads_on(operation):
            by = f"by {operation.name!r}" if operation else "before any layer"
            raise ValueError(
                _checks.complaint(
                    "model",
                    "a last spatial activation that is some module's output",
                    f"{dry.kind}, where {_checks.shape_of(trace.shapes[start][1:])} is made {by}",
                    "name a layer with layer=, or wrap that operation in a module",
                )
            )
        if operation.name in ACTIVATIONS:
            activations.append(operation.name)
        value = operation.inputs[0]


def _leads_on(operation: Operation) -> bool:
    if operation.name in ACTIVATIONS:  # without an argument that changes what it computes
        return set(operation.kwargs) <= {"input", "inplace"}
    return operation.name in POOLINGS.keys() | RESHAPES | {"__getitem__"}


def _location(dry: DryRun, name: str, value: int, activations: tuple[str, ...] = ()) -> Location:
    trace = dry.trace
    shape = trace.shapes[value]
    layout = dry.layout(value)
    if layout is None:
        raise ValueError(
            _checks.complaint(
                "layer",
                "a layer whose output has a spatial size",
                f"{name!r}, whose output is {_checks.shape_of(shape[1:])}",
                "camkit.list_layers lists those that have one",
            )
        )
    if shape[0] != trace.input_shape[0]:
        got = f"{name!r}, which gives {shape[0]} for {trace.input_shape[0]} images"
        raise ValueError(_checks.complaint("layer", "a layer with one row per image", got))
    after = trace.between(value, trace.output)
    for function in activations:
        if after and after[0].name == function:
            after = after[1:]
    size = layout.size(shape)
    return Location(name, layout, shape[layout.channel_dim], size, activations, value, tuple(after), dry)
