"""A layer of a model as the place at which a map is made."""

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
    """A layer at which a map can be made, as :func:`camkit.list_layers` lists it.

    Attributes:
        name: dotted name, which a method takes as ``layer=``.
        kind: class name of the module.
        channels: number of channels of its output.
        size: spatial size of its output, ``(h, w)``, for the input shape that was given.
    """

    name: str
    kind: str
    channels: int
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}, {self.channels} x {checks.shape_of(self.size)}"


@dataclass(frozen=True)
class Location:
    """The place at which a map is made: one layer of one model at one input size.

    Attributes:
        name: dotted name of the layer.
        layout: the layout of its output.
        channels: number of channels of its output.
        size: spatial size of its output.
        activations: the activation functions between the layer's output and the value that was searched for,
            in order. No module outputs their results: DenseNet's last ReLU is a plain function, for example.
            Empty if the user named the layer.
        value: the layer's output, as a value of the dry run.
        after: the operations from there to the model's output, in order, without those of ``activations``
            that follow the layer directly.
        dry: the dry run.
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
        """The functions in :attr:`activations` as one module, an identity if there is none."""
        return nn.Sequential(*map(_as_module, self.activations))


def _as_module(operation: Operation) -> Activation:
    args, kwargs, _ = without_in_place_flag(operation.args, operation.kwargs)
    # The only tensor among the arguments is the input. All others are settings, such as a slope.
    others = {name: value for name, value in kwargs.items() if not isinstance(value, ValueRef)}
    return Activation(operation.name, [a for a in args if not isinstance(a, ValueRef)], others)


def list_layers(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> tuple[LayerInfo, ...]:
    """Lists the layers of a model at which a map can be made, in the order in which they finish.

    A stand-in for the model runs, usually without computing anything. The model itself does not change.

    Args:
        model: any module.
        input_shape: shape of one input without the batch, ``(C, H, W)``.

    Returns:
        One :class:`LayerInfo` for each layer that runs exactly once and whose output has a spatial size.

    Raises:
        ValueError: if the model cannot take such an input, or if ``input_shape`` holds a number below one.
        TypeError: if ``model`` is not a module, or ``input_shape`` not a tuple or list of ints.

    Example:
        >>> import camkit, torchvision
        >>> print(camkit.list_layers(torchvision.models.alexnet())[-1])
        avgpool: AdaptiveAvgPool2d, 256 x 6 x 6
    """
    model = unwrap(model)
    checks.lengths("input_shape", "positive lengths (C, H, W)", input_shape)
    # Two images, so that the batch cannot be mistaken for a dimension of length one.
    dry = DryRun.of(model, (2, *input_shape))
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name in dict.fromkeys(name for name, _ in dry.trace.calls if name):
        try:
            place = locate(dry, name)
        except ValueError:  # no map can be made at this layer
            continue
        found.append(LayerInfo(name, type(modules[name]).__name__, place.channels, place.size))
    return tuple(found)


def locate(dry: DryRun, name: str, layout: Layout | None = None) -> Location:
    """Returns the location of the layer with this name.

    Args:
        dry: the dry run.
        name: dotted name of the layer.
        layout: layout of its output; taken from the dry run if not given.

    Raises:
        ValueError: if the layer did not run exactly once, if its output is not one tensor with a row for each
            image and a spatial size, if it can be read in two ways, if its tokens do not stand row by row, or
            if it does not fit ``layout``.
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
    """Returns the location of a layer whose output is ``value``; raises the errors of :func:`locate`."""
    trace = dry.trace
    shape = trace.shapes[value]
    if layout is not None:
        _require_fit(layout, name, shape, len(trace.input_shape) - 2)
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
    # Activation functions right after the layer belong to the location, not to the head that follows it.
    for operation in activations:
        if after and after[0] is operation:
            after = after[1:]
    size = layout.size(shape)
    return Location(name, layout, shape[layout.channel_dim], size, activations, value, tuple(after), dry)


def _require_fit(layout: Layout, name: str, shape: tuple[int, ...], dims: int) -> None:
    """Raises a ``ValueError`` unless the layout fits an output of ``shape``.

    ``name`` is the name of the layer, for the message; ``dims`` is the number of spatial dimensions.
    """
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
    """Returns the location of the layer that outputs ``value``, or of the nearest layer before it.

    Some values are not the output of any module, such as the result of DenseNet's last ReLU. From such a
    value the search walks back to a layer through activation functions, poolings, reshapes, resizes and
    indexing. The activation functions on the way become :attr:`Location.activations`; the other functions are
    left to :attr:`Location.after`.

    Args:
        dry: the dry run.
        value: the value to start from.

    Raises:
        ValueError: if another function, such as a sum, is met before a layer, or if no map can be made at the
            layer.
    """
    trace, start = dry.trace, value
    activations: list[Operation] = []
    while True:
        name = trace.layer_of(value)
        # No map can be made at a layer that runs twice, so the search continues past such a layer.
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
    """Whether ``value`` has a layout and is the output of a layer that ran once.

    Raises:
        ValueError: if the value can be read in two ways.
    """
    name = dry.trace.layer_of(value)
    ran_once = name is not None and dry.trace.outputs_of(name) == [value]
    return ran_once and dry.layout(value) is not None


def _can_be_walked_through(operation: Operation) -> bool:
    """Whether :func:`nearest_location` may go on to the input of an operation."""
    if operation.name in ACTIVATIONS:
        # camkit applies the function again by itself, and would not have a weight such as PReLU's.
        return len(operation.inputs) == 1
    return operation.name in POOLINGS | RESHAPES | RESIZES | {"getitem"}
