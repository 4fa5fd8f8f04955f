"""Names and modules, and the layer that a map is made at when nobody names one."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from camkit import _checks
from camkit._modules import modules_of
from camkit.dryrun import DryRun, in_order
from camkit.layouts import Layout
from camkit.positions import moved
from camkit.trace import Operation, Trace, is_compiled

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
_RESIZES = {"interpolate", "upsample"}
# What takes some of the tokens.
_PICKS = {"__getitem__", "select", "index_select", "narrow", "split", "unbind", "tensor_split", "chunk"}
_SUMS = {"add", "__add__", "__iadd__", "add_"}
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

    @cached_property
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
    model = unwrapped(model)
    _checks.lengths("input_shape", "positive lengths (C, H, W)", input_shape)
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, or itself.

    Raises:
        TypeError: if it is no module, or one of which a part does not run in Python.
        ValueError: if a part has no weights before it has run.
    """
    _checks.module("model", model)
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or is_compiled(model):
        model = next(model.children())
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            hint = "explain the module that it was made of"
            got = f"a {type(module).__name__} of torch.jit" + (f" in {name!r}" if name else "")
            raise TypeError(_checks.complaint("model", "a module that runs in Python", got, hint))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            got = f"{name!r} of a lazy module that never ran"
            raise ValueError(_checks.complaint("model", "weights", got, "a pass, model(x), makes them"))
    return model


def require_floats(model: nn.Module) -> None:
    """Raise a ``TypeError`` if a model has quantized layers, without gradients and open weights."""
    quantized = next((m for m in modules_of(model) if ".quantized" in type(m).__module__), None)
    for name, module in model.named_modules() if quantized is not None else ():
        if module is quantized:
            hint = "camkit.EigenCAM, ScoreCAM and others that look at activations and outputs only explain it"
            got = f"{type(module).__name__} {name!r} of a quantized model"
            raise TypeError(_checks.complaint("model", "layers of floats", got, hint))


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
    for wrapper in ("module.", "_orig_mod."):  # as the wrapped model calls it
        if layer not in modules:
            layer = layer.removeprefix(wrapper)
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


def locate(dry: DryRun, name: str, layout: Layout | None = None) -> Location:
    """The :class:`Location` of the layer of that name.

    Args:
        dry: the dry run.
        name: name of the layer.
        layout: how its output reads; the dry run tells if not given.

    Raises:
        ValueError: if it did not run exactly once, or if its output has no spatial size or does not read so.
    """
    values = dry.trace.outputs_of(name)
    ran_once(name, len(values))
    if values[0] is None:
        expected = "a layer whose output is one tensor"
        raise ValueError(_checks.complaint("layer", expected, f"{name!r}, whose output is not"))
    return _location(dry, name, values[0], layout=layout)


def find_before_pooling(dry: DryRun) -> Location:
    """The last spatial layer: what the model pools, flattens or picks a token from.

    Raises:
        ValueError: if there is none, or no module gives it.
    """
    return _nearest(dry, _last_spatial(dry))


def _last_spatial(dry: DryRun) -> int:
    """The last spatial value: walks back from the output to those that have a spatial size."""
    found = _met_first(dry, dry.is_spatial)
    if found:
        return _last_of_all(dry, found)
    # Perhaps of other rows than images: there are errors that say so.
    found = _met_first(dry, dry.grows)
    if not found:
        got = f"{dry.kind}, where nothing is spatial at input {_checks.shape_of(dry.trace.input_shape[1:])}"
        raise ValueError(_checks.complaint("model", "a model with a spatial layer", got))
    return max(found)


def _met_first(dry: DryRun, wanted: Callable[[int], bool]) -> list[int]:
    """The wanted values that are met first on the ways back from the output; the input's own are none."""
    trace = dry.trace
    found, seen, queue = [], set[int](), [trace.output]
    while queue:
        value = queue.pop()
        if value in seen or value == trace.input or value in trace.parameters:
            continue
        seen.add(value)
        if wanted(value) and not _is_the_input(trace, value):
            found.append(value)
        elif (operation := trace.producer(value)) is not None:
            queue.extend(operation.inputs)
    return found


def _is_the_input(trace: Trace, value: int) -> bool:
    """Whether a value is the input, scaled, padded or cut: nothing learnt is in it."""
    above = set(trace.ancestors(value))
    if trace.input not in above or not above.isdisjoint(trace.parameters):
        return False
    # Of a quantized model no weight is ever seen.
    return any(v in trace.parameters for operation in trace.operations for v in operation.inputs)


def _last_of_all(dry: DryRun, spatial: Sequence[int]) -> int:
    """Of several spatial values the last.

    But a detector, whose output has not a row per image, has a head for each of several resolutions, side by
    side: there it is the last that all are made of, the end of the backbone.
    """
    trace = dry.trace
    made_of = {value: set(trace.ancestors(value)) for value in spatial}
    ends = [v for v in spatial if not any(v in made_of[w] for w in spatial if w != v)]
    has_heads = trace.shapes[trace.output][:1] != trace.input_shape[:1]
    if not has_heads or len({_size(dry, v) for v in ends}) == 1:
        return max(ends)
    shared = set.intersection(*(made_of[v] for v in ends)) & trace.from_input - {trace.input}
    again = [v for v in shared if dry.is_spatial(v)]
    return _last_of_all(dry, again) if again else max(ends)


def _size(dry: DryRun, value: int) -> tuple[int, ...]:
    shape = dry.trace.shapes[value]
    try:
        layout = dry.layout(value)
    except ValueError:  # whichever way it reads
        layout = None
    return shape[2:] if layout is None else layout.size(shape)


def find_features(dry: DryRun) -> Location:
    """The last spatial layer of features.

    It is :func:`find_before_pooling`'s. But where that is class maps already, which are pooled or resized and
    no more (SqueezeNet, segmentation), it is what their convolution took in.

    Raises:
        ValueError: if there is none, or no module gives it.
    """
    return _nearest(dry, _features(dry, _last_spatial(dry)))


def _features(dry: DryRun, value: int) -> int:
    """What the convolution took in that made ``value``, if that is class maps; else ``value``."""
    trace = dry.trace
    after = {o.name for o in trace.between(value, trace.output)}
    if not after <= POOLINGS.keys() | RESHAPES | ACTIVATIONS.keys() | _RESIZES:
        return value
    operation = trace.producer(value)
    passed = set[str]()
    while operation is not None and operation.name in ACTIVATIONS.keys() | _RESIZES | _SUMS:
        if operation.name in _SUMS and passed.isdisjoint(_RESIZES):
            return value
        passed.add(operation.name)
        operation = trace.producer(max(operation.inputs))  # of a sum the way that was made last
    if operation is None or operation.name not in CONVOLUTIONS:
        return value
    # A model that ends in a convolution may be a trunk; in one that mixes channels only, it has class maps.
    if not after | passed and any(n > 1 for n in trace.shapes[operation.inputs[1]][2:]):
        return value
    return operation.inputs[0]


def find_for_gradient(dry: DryRun) -> Location:
    """The last spatial layer of which every position reaches the output.

    It is :func:`find_features`'; or, where no module gives that, the last layer before it that everything
    goes through. But of models that read one token only nothing of the others reaches the output after the
    last attention; there it is what that attention takes in.

    Raises:
        ValueError: if there is none.
    """
    last = _features(dry, _last_spatial(dry))
    try:
        place = _nearest(dry, last)
        if math.prod(place.size) == 1:  # of which a map would show nothing
            place = next(_bottlenecks(dry, last), place)
    except ValueError:
        found = next(_bottlenecks(dry, last), None)
        if found is None:
            raise
        place = found
    earlier: Iterable[Location | None]
    if attentions := _reads_by_attention(place):
        earlier = (_taken_in_by(dry, attention) for attention in attentions)
    elif _reads_beside_the_grid(place):
        above = (_taken_in_by(dry, attention) for attention in _attentions_above(place))
        pictures = (p for p in _bottlenecks(dry, place.value) if p.layout.prefix + p.layout.suffix == 0)
        earlier = itertools.chain(above, pictures)
    else:
        return place
    return next(filter(None, earlier), place)


def _bottlenecks(dry: DryRun, last: int) -> Iterator[Location]:
    """The layers up to ``last`` that everything goes through, of two positions or more, the last first."""
    for value in dry.trace.bottlenecks(last):
        if dry.is_spatial(value) and _is_layers(dry, value):
            place = _nearest(dry, value)
            if math.prod(place.size) > 1:
                yield place


def _reads_by_attention(place: Location) -> list[Operation]:
    """The attention that a layer is a part of, as the projection that its keys come from; if there is one."""
    trace = place.dry.trace
    inside = (o for o in place.after if o.module and f"{place.name}.".startswith(f"{o.module}."))
    return [operation for operation in inside if _is_attention(trace, operation)]


def _attentions_above(place: Location) -> list[Operation]:
    """The attentions above a layer, the last one first."""
    trace = place.dry.trace
    above = set(trace.ancestors(place.value))
    attentions = (o for o in reversed(trace.operations) if _is_attention(trace, o))
    return [operation for operation in attentions if not above.isdisjoint(operation.outputs)]


def _reads_beside_the_grid(place: Location) -> bool:
    """Whether the model goes on with tokens beside the grid only, or ends there with some beside it."""
    layout, trace = place.layout, place.dry.trace
    if layout.grid is None or layout.prefix + layout.suffix == 0:
        return False
    if not place.after:
        return True
    first, *rest = place.after
    value, shape = first.inputs[0], trace.shapes[first.inputs[0]]
    if first.name not in _PICKS or any(
        value in operation.inputs and operation.name not in _PICKS for operation in rest
    ):
        return False
    numbers = torch.arange(shape[1], dtype=torch.int32)[None, :, None].expand(shape)
    picks, used = [o for o in place.after if value in o.inputs], set(trace.ancestors(trace.output))
    try:
        parts = [zip(o.outputs, moved(o, {value: numbers}, trace), strict=True) for o in picks]
        read = torch.cat([t.flatten() for pairs in parts for output, t in pairs if output in used])
    except Exception:  # picked by numbers that are not known here
        return False
    return not ((read >= layout.prefix) & (read < layout.prefix + math.prod(layout.grid))).any()


def _taken_in_by(dry: DryRun, attention: Operation) -> Location | None:
    """The last layer that all inputs of an attention are made of, outside the module that attends."""
    trace = dry.trace
    sources = [set(trace.ancestors(v)) for v in attention.inputs if v in trace.from_input]
    for value in sorted(set.intersection(*sources) if sources else set(), reverse=True):
        name = trace.layer_of(value) or ""
        outside = not f"{name}.".startswith(f"{attention.module}.") or not attention.module
        if name and outside and dry.is_spatial(value) and _is_layers(dry, value):
            return _nearest(dry, value)
    return None


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
        try:
            place = locate(dry, name)
        except ValueError:  # no map can be made here
            continue
        stages.setdefault(place.size, []).append(place)
    stages.pop(last.size, None)
    several = [stage for stage in stages.values() if len(stage) > 1]
    return [*(min(reversed(stage), key=lambda place: place.name.count(".")) for stage in several), last]


def attention_blocks(dry: DryRun) -> list[Location]:
    """The blocks of a transformer: those that give tokens, and in which there is attention; perhaps none."""
    trace = dry.trace
    paths = [o.module.split(".") for o in trace.operations if _is_attention(trace, o)]
    above = [[".".join(path[:depth]) for depth in range(1, len(path) + 1)] for path in paths]
    count = Counter(name for names in above for name in names)
    found = []
    for names in above:
        # The outermost module that has this attention and no other.
        name = next((name for name in names if count[name] == 1), None)
        values = trace.outputs_of(name) if name else []
        layout = dry.layout(values[0]) if len(values) == 1 and values[0] is not None else None
        if name and layout is not None and layout.grid is not None:
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
        if name is not None and _is_layers(dry, value):
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


def _is_layers(dry: DryRun, value: int) -> bool:
    """Whether a map can be made at a layer that gives ``value``, and nothing else."""
    name = dry.trace.layer_of(value)
    is_one = name is not None and dry.trace.outputs_of(name) == [value]
    return is_one and dry.layout(value) is not None


def _leads_on(operation: Operation) -> bool:
    if operation.name in ACTIVATIONS:  # without an argument that changes what it computes
        return set(operation.kwargs) <= {"input", "inplace"}
    return operation.name in POOLINGS.keys() | RESHAPES | _RESIZES | {"__getitem__"}


def _location(
    dry: DryRun,
    name: str,
    value: int,
    activations: tuple[str, ...] = (),
    layout: Layout | None = None,
) -> Location:
    trace = dry.trace
    shape = trace.shapes[value]
    if layout is not None:
        _require_reads(layout, name, shape, len(trace.input_shape) - 2)
    else:
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
    if layout.grid is not None and not in_order(trace, value, layout):
        got = f"{name!r}, where they stand in another order"
        raise ValueError(_checks.complaint("layer", "a layer whose tokens stand row by row", got))
    if shape[0] != trace.input_shape[0]:
        got = f"{name!r}, which gives {shape[0]} for {trace.input_shape[0]} images"
        raise ValueError(_checks.complaint("layer", "a layer with one row per image", got))
    after = trace.between(value, trace.output)
    for function in activations:
        if after and after[0].name == function:
            after = after[1:]
    size = layout.size(shape)
    return Location(name, layout, shape[layout.channel_dim], size, activations, value, tuple(after), dry)


def _require_reads(layout: Layout, name: str, shape: tuple[int, ...], dims: int) -> None:
    """Raise a ``ValueError`` unless an output of ``shape`` reads so, with ``dims`` spatial dimensions."""
    tokens = None if layout.grid is None else layout.prefix + math.prod(layout.grid) + layout.suffix
    if tokens is None:
        expected, fits = f"an output with {dims + 2} dimensions", len(shape) == dims + 2
    else:
        expected = f"an output (N, {tokens}, C), and a grid of {dims} dimensions"
        fits = len(shape) == 3 and shape[1] == tokens and len(layout.grid or ()) == dims
    if not fits:
        got = f"{name!r}, whose output is {_checks.shape_of(shape)}"
        raise ValueError(_checks.complaint("layout", f"{expected} for {layout}", got))
