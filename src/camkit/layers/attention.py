"""Attention in a dry run: the blocks of a transformer, and layers that are read through attention."""

import math
from collections import Counter

import torch

from camkit.functions import ATTENTION, PICKS, PRODUCTS
from camkit.layers.dryrun import DryRun
from camkit.layers.location import Location, is_only_output_of_a_layer, locate, nearest_location
from camkit.layers.tokens import apply_to_numbers
from camkit.layers.trace import Operation, Trace


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
    if operation.name in ATTENTION:
        return True
    if operation.name not in PRODUCTS:
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


def attentions_inside(place: Location) -> list[Operation]:
    """The attention that a layer is a part of, as the projection that its keys come from; if there is one."""
    trace = place.dry.trace
    inside = (o for o in place.after if o.module and f"{place.name}.".startswith(f"{o.module}."))
    return [operation for operation in inside if _is_attention(trace, operation)]


def attentions_above(place: Location) -> list[Operation]:
    """The attentions above a layer, the last one first."""
    trace = place.dry.trace
    above = set(trace.ancestors(place.value))
    attentions = (o for o in reversed(trace.operations) if _is_attention(trace, o))
    return [operation for operation in attentions if not above.isdisjoint(operation.outputs)]


def reads_only_beside_grid(place: Location) -> bool:
    """Whether the model goes on with tokens beside the grid only, or ends there with some beside it."""
    layout, trace = place.layout, place.dry.trace
    if layout.grid is None or layout.prefix + layout.suffix == 0:
        return False
    if not place.after:
        return True
    first, *rest = place.after
    value, shape = first.inputs[0], trace.shapes[first.inputs[0]]
    if first.name not in PICKS or any(
        value in operation.inputs and operation.name not in PICKS for operation in rest
    ):
        return False
    numbers = torch.arange(shape[1], dtype=torch.int32)[None, :, None].expand(shape)
    picks, used = [o for o in place.after if value in o.inputs], set(trace.ancestors(trace.output))
    try:
        parts = [zip(o.outputs, apply_to_numbers(o, {value: numbers}, trace), strict=True) for o in picks]
        read = torch.cat([t.flatten() for pairs in parts for output, t in pairs if output in used])
    except Exception:  # picked by numbers that are not known here
        return False
    return not ((read >= layout.prefix) & (read < layout.prefix + math.prod(layout.grid))).any()


def input_layer_of(dry: DryRun, attention: Operation) -> Location | None:
    """The last layer that all inputs of an attention are made of, outside the module that attends."""
    trace = dry.trace
    sources = [set(trace.ancestors(v)) for v in attention.inputs if v in trace.from_input]
    for value in sorted(set.intersection(*sources) if sources else set(), reverse=True):
        name = trace.layer_of(value) or ""
        outside = not f"{name}.".startswith(f"{attention.module}.") or not attention.module
        if name and outside and dry.is_spatial(value) and is_only_output_of_a_layer(dry, value):
            return nearest_location(dry, value)
    return None
