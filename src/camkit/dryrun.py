"""What a dry run at two input sizes tells of a model: which values are spatial, and how to read them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from camkit import _checks
from camkit.layouts import Layout, infer_layout
from camkit.trace import Trace, record

# How much larger the second run's input is, per side: unequal, so that no side is taken for another.
_LARGER = (8, 96, 32)
# Class and register tokens: no published model has more beside its patches.
_MOST_TOKENS = 16


@dataclass(frozen=True)
class DryRun:
    """A model's :class:`~camkit.trace.Trace`, and a second one at a larger input where it can take one.

    Attributes:
        kind: class of the model, for messages.
        trace: the run at the size that was asked for.
        device: what the runs were made on: ``"meta"``, or ``None`` for the model's own.
        larger: the run at a larger size; ``None`` for a model with a fixed input size, and for one that
            does other things at the other size.
    """

    kind: str
    trace: Trace
    device: str | None
    larger: Trace | None

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int]) -> "DryRun":
        """Runs a stand-in for ``model`` twice: on shapes, or on numbers where these are not enough.

        Args:
            model: any module.
            input_shape: shape of the input with its batch, ``(N, C, *size)``.

        Raises:
            ValueError: if the model cannot take such an input.
        """
        shape = tuple(input_shape)
        kind = type(model).__name__
        try:
            device: str | None = "meta"
            trace = record(model, shape, device)
        except Exception as error:
            # It may be a matter of numbers: a branch on a value, say.
            try:
                device = None
                trace = record(model, shape, device)
            except Exception:
                raise ValueError(_cannot_take(model, shape, error)) from error
        extra = _LARGER[-len(shape[2:]) :] if len(shape) > 2 else ()
        enlarged = (*shape[:2], *(a + b for a, b in zip(shape[2:], extra, strict=True)))
        try:
            larger = record(model, enlarged, device)
        except Exception:  # a fixed input size: whatever is raised says just that
            return cls(kind, trace, device, None)
        same = [o.name for o in trace.operations] == [o.name for o in larger.operations]
        return cls(kind, trace, device, larger if same and extra else None)

    def layout(self, value: int) -> Layout | None:
        """How ``value`` reads as ``(N, C, *spatial)``; ``None`` if it is not spatial.

        Raises:
            ValueError: if it can be read in two ways.
        """
        shape, input_shape = self.trace.shapes[value], self.trace.input_shape
        larger = self.larger.shapes[value] if self.larger else None
        if len(shape) == 3 and len(input_shape) == 4:
            tokens = _tokens(self.trace, value, self.larger)
            if self.larger is None or tokens is None:
                return tokens
            again = _tokens(self.larger, value, self.trace)
            same = again is not None and (again.prefix, again.suffix) == (tokens.prefix, tokens.suffix)
            return tokens if same and larger is not None and larger[1] != shape[1] else None
        return infer_layout(shape, input_shape, larger)

    def is_spatial(self, value: int) -> bool:
        """Whether ``value`` has positions: it grows with the input, or has the input's proportions."""
        shape = self.trace.shapes[value]
        if self.larger is not None:
            return len(shape) > 2 and shape != self.larger.shapes[value]
        try:
            return self.layout(value) is not None
        except ValueError:  # spatial, whichever way it reads
            return True


def _tokens(trace: Trace, value: int, other: Trace | None) -> Layout | None:
    """How tokens ``(N, L, C)`` read: as the grid of the nearest image-like value they were made from.

    What keeps its size in the other run is no grid, but heads of attention, say.
    """
    length = trace.shapes[value][1]
    for source in trace.ancestors(value):
        shape = trace.shapes[source]
        if source in trace.parameters or len(shape) != 4 or shape[0] != trace.input_shape[0]:
            continue
        try:
            layout = infer_layout(shape, trace.input_shape)
        except ValueError:
            layout = Layout() if shape[2] * shape[3] <= length else None
        if layout is None:
            continue
        grid = layout.size(shape)
        if other is not None and layout.size(other.shapes[source]) == grid:
            continue
        others = length - math.prod(grid)
        if math.prod(grid) > 1 and 0 <= others <= _MOST_TOKENS:
            prefix = others if others == 0 else _before(trace, value, math.prod(grid), others)
            return Layout(-1, grid, prefix, others - prefix)
    return None


def _before(trace: Trace, value: int, patches: int, others: int) -> int:
    """How many of the other tokens were put before the patches, where they were joined; all, if unknown."""
    for source in trace.ancestors(value):
        operation = trace.producer(source)
        if operation is None or operation.name not in ("cat", "concat"):
            continue
        lengths = [trace.shapes[v][1] for v in operation.inputs if len(trace.shapes[v]) == 3]
        if patches in lengths and sum(lengths) == patches + others:
            return sum(lengths[: lengths.index(patches)])
    return others


def _cannot_take(model: nn.Module, shape: tuple[int, ...], error: Exception) -> str:
    """The complaint about an input that the model cannot take, with the size that it could."""
    reason = " ".join(str(error).split())
    got = f"{_checks.shape_of(shape[1:])} ({type(error).__name__}: {reason[:200]})"
    smallest = _smallest(lambda size: _can_run(model, (*shape[:2], *size)), shape[2:])
    if smallest is not None:
        size = _checks.shape_of(smallest)
        return _checks.complaint("x", f"images of at least {size} for {type(model).__name__}", got)
    hint = "a function with an input_shape argument wants the shape that the model takes"
    return _checks.complaint("x", f"an input that {type(model).__name__} can take", got, hint)


def _can_run(model: nn.Module, shape: Sequence[int]) -> bool:
    try:
        record(model, shape)
    except Exception:
        return False
    return True


def _smallest(fits: Callable[[tuple[int, ...]], bool], size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The smallest enlargement of ``size``, proportions kept, that fits; ``None`` up to 16 times."""

    def scaled(factor: float) -> tuple[int, ...]:
        return tuple(math.ceil(n * factor) for n in size)

    high = next((f for f in (2.0, 4.0, 8.0, 16.0) if size and fits(scaled(f))), None)
    if high is None:
        return None
    low = high / 2
    while (high - low) * min(size) > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(scaled(middle)) else (middle, high)
    return scaled(high)
