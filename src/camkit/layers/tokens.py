"""Tokens: the grid that they form, and where positions go through functions that only move entries."""

import math
from collections.abc import Sequence

import torch

from camkit._tools.nested import map_leaves, tensors_in
from camkit.functions import JOINS, MOVES
from camkit.layers.layouts import Layout, infer_layout
from camkit.layers.trace import Operation, Trace, ValueRef


def apply_to_numbers(
    operation: Operation, known: dict[int, torch.Tensor], trace: Trace
) -> list[torch.Tensor]:
    """What an operation makes of numbers in the place of some of its inputs, and of -1 for the others."""

    def number(value: ValueRef) -> torch.Tensor:
        shape = trace.shapes[value.number]
        return known.get(value.number, torch.tensor(-1, dtype=torch.int32).expand(shape))

    given = map_leaves(number, (operation.args, operation.kwargs), lambda value: isinstance(value, ValueRef))
    return list(tensors_in(operation.function(*given[0], **given[1])))


def track_positions(trace: Trace, start: int, numbers: torch.Tensor, end: int) -> torch.Tensor | None:
    """The number of the position that each entry of a value stands at; ``None`` if it cannot be told.

    What works on every position for itself, and attention, which gives one row for each query, leave it where
    it is.

    Args:
        trace: the dry run.
        start: a value.
        numbers: the number of the position of each of its entries, of its shape.
        end: the value that is asked about.
    """
    known = {start: numbers}
    for operation in trace.between(start, end):
        if operation.name in MOVES:
            try:
                made = apply_to_numbers(operation, known, trace)
            except Exception:  # arguments that are no use here
                continue
            known.update(zip(operation.outputs, made, strict=False))
            continue
        for output in operation.outputs:
            shape = trace.shapes[output]
            for source in operation.inputs:
                if source in known and (same := _widened(known[source], shape)) is not None:
                    known[output] = same
                    break
    return known.get(end)


def _widened(numbers: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Numbers of another count of channels, first or last."""
    if numbers.shape == shape:
        return numbers
    if len(shape) == numbers.ndim > 2:
        for channels in (-1, 1):
            one = numbers.narrow(channels, 0, 1)
            others = [n for d, n in enumerate(shape) if d != channels % len(shape)]
            if [n for d, n in enumerate(numbers.shape) if d != channels % len(shape)] == others:
                return one.expand(shape)
    return None


# Class and register tokens: no published model has more beside its patches.
_MOST_TOKENS = 16


def layout_of_tokens(trace: Trace, value: int, other: Trace | None) -> Layout | None:
    """How tokens ``(N, L, C)`` read: as the grid of the nearest image-like value they were made from.

    What keeps its size in the other run is no grid, but heads of attention, say.
    """
    length = trace.shapes[value][1]
    above = list(trace.ancestors(value))
    joins = [o for o in map(trace.producer, above) if o is not None and o.name in JOINS]
    for source in above:
        shape = trace.shapes[source]
        is_picture = len(shape) == len(trace.input_shape) and shape[0] == trace.input_shape[0]
        if source not in trace.from_input or not is_picture:
            continue
        try:
            layout = infer_layout(shape, trace.input_shape, other.shapes[source] if other else None)
        except ValueError:
            layout = Layout() if math.prod(shape[2:]) <= length else None
        if layout is None:
            continue
        grid = layout.size(shape)
        if other is not None and layout.size(other.shapes[source]) == grid:
            continue
        others = length - math.prod(grid)
        if math.prod(grid) < 2 or others < 0:
            continue
        prefix = 0 if others == 0 else _prefix_length(trace, joins, math.prod(grid), others)
        if prefix is None and others <= _MOST_TOKENS:
            prefix = others
        if prefix is not None:
            return Layout(-1, grid, prefix, others - prefix)
    return None


def _prefix_length(trace: Trace, joins: Sequence[Operation], patches: int, others: int) -> int | None:
    """How many of the other tokens were put before the patches where they were joined, if they were."""
    for operation in joins:
        lengths = [trace.shapes[v][1] for v in operation.inputs if len(trace.shapes[v]) == 3]
        if patches in lengths and sum(lengths) == patches + others:
            return sum(lengths[: lengths.index(patches)])
    return None


def tokens_in_row_order(trace: Trace, value: int, layout: Layout) -> bool:
    """Whether tokens stand row by row, as far as what made them tells."""
    grid, shape = layout.grid or (), trace.shapes[value]
    length = math.prod(grid)
    for source in trace.ancestors(value):
        picture = trace.shapes[source]
        if len(picture) == len(trace.input_shape) and source in trace.from_input:
            for read in (Layout(1), Layout(-1)):
                if read.size(picture) == grid and picture[0] == shape[0]:
                    numbers = torch.arange(length, dtype=torch.int32).reshape(1, 1, *grid)
                    start = numbers.movedim(1, read.channel_dim).expand(picture)
                    found = track_positions(trace, source, start, value)
                    if found is None:
                        return True
                    patches = found[:, layout.prefix : layout.prefix + length]
                    return bool((patches == torch.arange(length)[None, :, None]).all())
    return True
