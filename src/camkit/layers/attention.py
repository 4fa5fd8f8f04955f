"""Attention in a dry run: the blocks of a transformer, and layers that the model reads through attention."""

import math
from collections import Counter

import torch

from camkit.functions import ATTENTION, PICKS, PRODUCTS
from camkit.layers.dryrun import DryRun
from camkit.layers.location import Location, is_only_output_of_a_layer, locate, nearest_location
from camkit.layers.tokens import apply_to_numbers
from camkit.layers.trace import Operation, Trace


def attention_blocks(dry: DryRun) -> list[Location]:
    """Returns the blocks of a transformer in order; an empty list if there are none.

    A block is the outermost module with exactly one attention inside, if it outputs tokens that form a grid.
    """
    trace = dry.trace
    paths = [o.module.split(".") for o in trace.operations if _is_attention(trace, o)]
    # For each attention the modules around it, the outermost first: "blocks", "blocks.0", "blocks.0.attn".
    around = [[".".join(path[:depth]) for depth in range(1, len(path) + 1)] for path in paths]
    count = Counter(name for names in around for name in names)
    found = []
    for names in around:
        name = next((name for name in names if count[name] == 1), None)
        values = trace.outputs_of(name) if name else []
        layout = dry.layout(values[0]) if len(values) == 1 and values[0] is not None else None
        if name and layout is not None and layout.grid is not None:
            found.append(locate(dry, name))
    return found


def _is_attention(trace: Trace, operation: Operation) -> bool:
    """Whether an operation is one of torch's attention functions, or the product of a softmax and values."""
    if operation.name in ATTENTION:
        return True
    if operation.name not in PRODUCTS:
        return False
    for value in operation.inputs:
        maker = trace.producer(value)
        for _ in range(3):  # a cast or a reshape may stand between the softmax and the product
            if maker is None or maker.name == "softmax" or len(maker.inputs) != 1:
                break
            maker = trace.producer(maker.inputs[0])
        if maker is not None and maker.name == "softmax":
            return True
    return False


def attentions_inside(place: Location) -> list[Operation]:
    """Returns the attentions that follow a layer within a module around it.

    For example, the layer ``attn.qkv``, which projects tokens to queries, keys and values, is followed by the
    attention that ``attn`` computes from them.
    """
    trace = place.dry.trace
    around = (o for o in place.after if o.module and f"{place.name}.".startswith(f"{o.module}."))
    return [operation for operation in around if _is_attention(trace, operation)]


def attentions_above(place: Location) -> list[Operation]:
    """Returns the attentions that a layer's output was made by, the last one first."""
    trace = place.dry.trace
    above = set(trace.ancestors(place.value))
    attentions = (o for o in reversed(trace.operations) if _is_attention(trace, o))
    return [operation for operation in attentions if not above.isdisjoint(operation.outputs)]


def reads_only_beside_grid(place: Location) -> bool:
    """Whether the model continues with tokens outside the grid only, such as the class token.

    Also true if the model ends in a layer with tokens outside the grid. In both cases a score of the class
    token has no gradient at the tokens of the grid, since no attention mixes them after the layer.
    """
    layout, trace = place.layout, place.dry.trace
    if layout.grid is None or layout.prefix + layout.suffix == 0:
        return False
    if not place.after:
        return True
    first, *rest = place.after
    value, shape = first.inputs[0], trace.shapes[first.inputs[0]]
    # A function that does not pick tokens reads all of them.
    if first.name not in PICKS or any(
        value in operation.inputs and operation.name not in PICKS for operation in rest
    ):
        return False
    # Number the tokens and let the recorded picks choose among the numbers, to see which tokens are read.
    numbers = torch.arange(shape[1], dtype=torch.int32)[None, :, None].expand(shape)
    picks, used = [o for o in place.after if value in o.inputs], set(trace.ancestors(trace.output))
    try:
        parts = [zip(o.outputs, apply_to_numbers(o, {value: numbers}, trace), strict=True) for o in picks]
        read = torch.cat([t.flatten() for pairs in parts for output, t in pairs if output in used])
    except Exception:  # the index of the pick was computed in the pass and is not known here
        return False
    return not ((read >= layout.prefix) & (read < layout.prefix + math.prod(layout.grid))).any()


def input_layer_of(dry: DryRun, attention: Operation) -> Location | None:
    """Returns the last layer from which queries, keys and values of an attention are all made.

    Layers within the module that attends, such as the projections, do not count.

    Returns:
        The location of the layer; ``None`` if there is no such layer with a spatial output.
    """
    trace = dry.trace
    sources = [set(trace.ancestors(v)) for v in attention.inputs if v in trace.from_input]
    for value in sorted(set.intersection(*sources) if sources else set(), reverse=True):
        name = trace.layer_of(value) or ""
        outside = not f"{name}.".startswith(f"{attention.module}.") or not attention.module
        if name and outside and dry.is_spatial(value) and is_only_output_of_a_layer(dry, value):
            return nearest_location(dry, value)
    return None
