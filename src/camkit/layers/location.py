"""One layer of a model as the place of a map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from camkit._tools import checks
from camkit.functions import ACTIVATIONS, POOLINGS, RESHAPES, RESIZES, Activation, without_in_place_flag
from camkit.layers.dryrun import DryRun
from camkit.layers.layouts import Layout
from camkit.layers.tokens import tokens_in_row_order
from camkit.layers.trace import Operation, ValueRef
from camkit.model.modules import require_one_run, unwrap


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
        return f"{self.name}: {self.kind}, {self.channels} x {checks.shape_of(self.size)}"


@dataclass(frozen=True)
class Location:
    """Where a map is made: one layer of one model at one input size.

    Attributes:
        name: dotted name of the layer.
        layout: how its output reads as ``(N, C, *spatial)``.
        channels: number of channels.
        size: its spatial size.
        activations: the activation functions that the forward pass applies to the layer's output outside
            any module, in order.
        value: the layer's output in the dry run.
        after: what the forward pass does with the result, up to the model's output.
        dry: the dry run that tells all this.
    """

    name: str
    layout: Layout
    channels: int
    size: tuple[int, ...]
    activations: tuple[Operation, ...]
    value: int
    after: tuple[Operation, ...]
    dry: DryRun

    @cached_property
    def activation(self) -> nn.Sequential:
        """The functions in :attr:`activations` as one module."""
        return nn.Sequential(*map(_as_module, self.activations))


def _as_module(operation: Operation) -> Activation:
    args, kwargs, _ = without_in_place_flag(operation.args, operation.kwargs)
    # The input is the first argument, by position or by name.
    others = {name: value for name, value in kwargs.items() if not isinstance(value, ValueRef)}
    return Activation(operation.name, [a for a in args if not isinstance(a, ValueRef)], others)


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
    model = unwrap(model)
    checks.lengths("input_shape", "positive lengths (C, H, W)", input_shape)
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
    require_one_run(name, len(values))
    if values[0] is None:
        expected = "a layer whose output is one tensor"
        raise ValueError(checks.error_message("layer", expected, f"{name!r}, whose output is not"))
    return _make_location(dry, name, values[0], layout=layout)


def _make_location(
    dry: DryRun,
    name: str,
    value: int,
    activations: tuple[Operation, ...] = (),
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
            checks.error_message(
                "layer",
                "a layer whose output has a spatial size",
                f"{name!r}, whose output is {checks.shape_of(shape[1:])}",
                "camkit.list_layers lists those that have one",
            )
        )
    if layout.grid is not None and not tokens_in_row_order(trace, value, layout):
        got = f"{name!r}, where they stand in another order"
        raise ValueError(checks.error_message("layer", "a layer whose tokens stand row by row", got))
    if shape[0] != trace.input_shape[0]:
        got = f"{name!r}, which gives {shape[0]} for {trace.input_shape[0]} images"
        raise ValueError(checks.error_message("layer", "a layer with one row per image", got))
    after = trace.between(value, trace.output)
    for operation in activations:
        if after and after[0] is operation:
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
        got = f"{name!r}, whose output is {checks.shape_of(shape)}"
        raise ValueError(checks.error_message("layout", f"{expected} for {layout}", got))


def nearest_location(dry: DryRun, value: int) -> Location:
    """The location from whose layer's output ``value`` is made by element-wise functions alone.

    What pools, reshapes or picks along the way (``F.max_pool2d`` between two layers, a mean over one
    side) is left to what follows the layer.
    """
    trace, start = dry.trace, value
    activations: list[Operation] = []
    while True:
        name = trace.layer_of(value)
        if name is not None and is_only_output_of_a_layer(dry, value):
            return _make_location(dry, name, value, tuple(reversed(activations)))
        operation = trace.producer(value)
        if operation is None or not _can_be_walked_through(operation):
            by = f"by {operation.name!r}" if operation else "before any layer"
            raise ValueError(
                checks.error_message(
                    "model",
                    "a last spatial activation that is some module's output",
                    f"{dry.kind}, where {checks.shape_of(trace.shapes[start][1:])} is made {by}",
                    "name a layer with layer=, or wrap that operation in a module",
                )
            )
        if operation.name in ACTIVATIONS:
            activations.append(operation)
        value = operation.inputs[0]


def is_only_output_of_a_layer(dry: DryRun, value: int) -> bool:
    """Whether a map can be made at a layer that gives ``value``, and nothing else."""
    name = dry.trace.layer_of(value)
    is_one = name is not None and dry.trace.outputs_of(name) == [value]
    return is_one and dry.layout(value) is not None


def _can_be_walked_through(operation: Operation) -> bool:
    if operation.name in ACTIVATIONS:
        return len(operation.inputs) == 1  # a weight of its own, as PReLU's, would be lost
    return operation.name in POOLINGS | RESHAPES | RESIZES | {"getitem"}
