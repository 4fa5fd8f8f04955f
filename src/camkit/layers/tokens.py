"""Tokens: the grid that they form, and the order in which they stand in it.

A transformer cuts a feature map ``(N, C, h, w)`` into tokens ``(N, L, C)``. Their shape no longer shows the
grid ``h x w``, but the record of the dry run does: the grid is the spatial size of the feature map that the
tokens were made from (:func:`layout_of_tokens`).

To see where each position of the feature map ends up, its positions are numbered, and the recorded operations
that only move entries (reshape, permute, cat, roll) are applied to these numbers instead of the activations
(:func:`track_positions`). Numbers that arrive as 0, 1, 2, ... show that the tokens stand row by row.
"""

import math
from collections.abc import Sequence

import torch

from camkit._tools.nested import map_leaves, tensors_in
from camkit.functions import JOINS, MOVES
from camkit.layers.layouts import Layout, infer_layout
from camkit.layers.trace import Operation, Trace, ValueRef

# If the record shows no operation that joined other tokens to the grid, up to this many are assumed to be
# class and register tokens. Published models have far fewer, such as 5 in DINOv2 with registers.
_MOST_TOKENS = 16


def apply_to_numbers(
    operation: Operation, known: dict[int, torch.Tensor], trace: Trace
) -> list[torch.Tensor]:
    """Calls the function of an operation with numbers in the place of the tensors that it was recorded with.

    Args:
        operation: the operation.
        known: the numbers to use for some of its inputs, each in the shape of the value. Every other input is
            filled with -1.
        trace: the dry run.

    Returns:
        The tensors that the function returns.
    """

    def number(value: ValueRef) -> torch.Tensor:
        shape = trace.shapes[value.number]
        return known.get(value.number, torch.tensor(-1, dtype=torch.int32).expand(shape))

    given = map_leaves(number, (operation.args, operation.kwargs), lambda value: isinstance(value, ValueRef))
    return list(tensors_in(operation.function(*given[0], **given[1])))


def track_positions(trace: Trace, start: int, numbers: torch.Tensor, end: int) -> torch.Tensor | None:
    """Follows numbered positions through the recorded operations from one value to another.

    Operations that only move entries are applied to the numbers. Any other operation is assumed to leave each
    position in its place, if its result has as many positions. This holds for an operation that works on each
    position by itself, and for attention, whose result has one row for each query.

    Args:
        trace: the dry run.
        start: the value whose positions are numbered.
        numbers: the number of the position of each of its entries, in the shape of ``start``.
        end: the value to follow them to.

    Returns:
        For each entry of ``end`` the number of the position that it comes from, or -1 if it comes from
        elsewhere; ``None`` if the numbers cannot be followed.
    """
    known = {start: numbers}
    for operation in trace.between(start, end):
        if operation.name in MOVES:
            try:
                moved = apply_to_numbers(operation, known, trace)
            except Exception:  # such as a view that does not fit the strides of the numbers
                continue
            known.update(zip(operation.outputs, moved, strict=False))
            continue
        for output in operation.outputs:
            shape = trace.shapes[output]
            # The first input with numbers decides; for attention that is the query.
            for source in operation.inputs:
                if source in known and (same := _with_other_channels(known[source], shape)) is not None:
                    known[output] = same
                    break
    return known.get(end)


def _with_other_channels(numbers: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Expands numbers to ``shape``; ``None`` if it differs in more than the channels (last or first)."""
    if numbers.shape == shape:
        return numbers
    if len(shape) == numbers.ndim > 2:
        for channels in (-1, 1):
            # All channels of a position have its number, so one channel can stand for all of them.
            one = numbers.narrow(channels, 0, 1)
            others = [n for d, n in enumerate(shape) if d != channels % len(shape)]
            if [n for d, n in enumerate(numbers.shape) if d != channels % len(shape)] == others:
                return one.expand(shape)
    return None


def layout_of_tokens(trace: Trace, value: int, other: Trace | None) -> Layout | None:
    """Returns the layout of tokens ``(N, L, C)``: the grid of the nearest feature map they were made from.

    Args:
        trace: the dry run.
        value: the tokens.
        other: the dry run at the other input size, if it made the same values.

    Returns:
        The layout; ``None`` if the tokens were made from no feature map with a fitting number of positions.
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
        except ValueError:  # ambiguous; most models cut tokens from a feature map with channels first
            layout = Layout() if math.prod(shape[2:]) <= length else None
        if layout is None:
            continue
        grid = layout.size(shape)
        # A size that does not change with the input is not a grid. Tokens that were split into the heads of
        # an attention have such a size, for example.
        if other is not None and layout.size(other.shapes[source]) == grid:
            continue
        others = length - math.prod(grid)
        if math.prod(grid) < 2 or others < 0:
            continue
        prefix = 0 if others == 0 else _prefix_length(trace, joins, math.prod(grid), others)
        if prefix is None and others <= _MOST_TOKENS:
            prefix = others  # the record shows no join; class and register tokens usually come first
        if prefix is not None:
            return Layout(-1, grid, prefix, others - prefix)
    return None


def _prefix_length(trace: Trace, joins: Sequence[Operation], patches: int, others: int) -> int | None:
    """Returns the number of other tokens joined in front of the patches; ``None`` if no join shows it."""
    for operation in joins:
        lengths = [trace.shapes[v][1] for v in operation.inputs if len(trace.shapes[v]) == 3]
        if patches in lengths and sum(lengths) == patches + others:
            return sum(lengths[: lengths.index(patches)])
    return None


def tokens_in_row_order(trace: Trace, value: int, layout: Layout) -> bool:
    """Whether tokens stand row by row in their grid; ``True`` also if the record does not show their order.

    Some models reorder their tokens window by window. A map of these would show evidence at wrong places.

    Args:
        trace: the dry run.
        value: the tokens, ``(N, L, C)``.
        layout: their layout.
    """
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
