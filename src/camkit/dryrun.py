"""What a dry run at two input sizes tells of a model: which values are spatial, and how to read them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from camkit import _checks
from camkit.inputs import Inputs, UnfitError
from camkit.layouts import Layout, infer_layout
from camkit.positions import follow
from camkit.propagation import ELEMENTWISE, out_of_place
from camkit.trace import Operation, Trace, record

# How much larger the second run's input is, per side: unequal, so that no side is taken for another.
_LARGER = (8, 192, 64)
# Class and register tokens: no published model has more beside its patches.
_MOST_TOKENS = 16
# Functions that read their input as (N, C, *spatial) and give the same, whatever the sizes are.
_CHANNELS_FIRST = {"batch_norm", "group_norm", "instance_norm", "interpolate", "pixel_shuffle"} | {
    f"{kind}{d}d"
    for d in (1, 2, 3)
    for kind in ("conv", "conv_transpose", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
}
# Functions that leave dimensions where they are.
_KEEP_DIMENSIONS = ELEMENTWISE | {"add", "sub", "mul", "div", "cat", "concat", "pad"}
_KEEP_DIMENSIONS |= {"clone", "contiguous", "dropout"}


@dataclass(frozen=True)
class DryRun:
    """A model's :class:`~camkit.trace.Trace`, and a second one at a larger input where it can take one.

    Attributes:
        kind: class of the model, for messages.
        trace: the run at the size that was asked for.
        device: what the runs were made on: ``"meta"``, or ``None`` for the model's own.
        larger: the run at a larger size; ``None`` for a model with a fixed input size, and for one that
            brings its input to one size itself.
        common: how many values the two runs made in the same way: all, unless sizes or numbers decide what
            is done.
    """

    kind: str
    trace: Trace
    device: str | None
    larger: Trace | None
    common: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_shape: Sequence[int],
        inputs: Inputs | None = None,
        names: Sequence[str] = (),
    ) -> "DryRun":
        """Runs a stand-in for ``model`` twice: on shapes, or on numbers where these are not enough.

        Args:
            model: any module.
            input_shape: shape of the images with their batch, ``(N, C, *size)``.
            inputs: the call whose other inputs go in too; the images alone if not given.
            names: the layers that it is about, if they are known. A run on shapes that breaks off after them,
                or after the last of all, will do: detectors end in a choice by numbers.

        Raises:
            ValueError: if the model cannot take such an input.
        """
        wanted = set(names) or {
            n for n, m in model.named_modules() if next(m.parameters(False), None) is not None
        }

        def enough(trace: Trace) -> bool:
            return bool(wanted) and wanted <= {name for name, _ in trace.calls}

        shape = tuple(input_shape)
        kind = type(model).__name__
        try:
            device: str | None = "meta"
            trace = record(model, shape, device, inputs, enough)
        except UnfitError:
            raise
        except Exception:
            # It may be a matter of numbers: a branch on a value, say.
            try:
                device = None
                trace = record(model, shape, device, inputs)
            except UnfitError:
                raise
            except Exception as error:
                raise ValueError(_cannot_take(model, shape, error, inputs)) from error
        extra = _LARGER[-len(shape[2:]) :] if len(shape) > 2 else ()
        enlarged = (*shape[:2], *(a + b for a, b in zip(shape[2:], extra, strict=True)))
        try:
            larger = record(model, enlarged, device, inputs, enough)
        except Exception:  # a fixed input size: whatever is raised says just that
            return cls(kind, trace, device, None)
        common = _common(trace, larger)
        made = {value for _, value in trace.calls if value is not None and value < common}
        grows = any(trace.shapes[value] != larger.shapes[value] for value in made)
        return cls(kind, trace, device, larger if grows else None, common if grows else 0)

    def layout(self, value: int) -> Layout | None:
        """How ``value`` reads as ``(N, C, *spatial)``; ``None`` if it is not spatial.

        Raises:
            ValueError: if it can be read in two ways.
        """
        shape, input_shape = self.trace.shapes[value], self.trace.input_shape
        other = self._other(value)
        larger = other.shapes[value] if other else None
        if len(shape) == 3 and len(input_shape) > 3:
            tokens = _tokens(self.trace, value, other)
            if other is None or tokens is None:
                return tokens
            again = _tokens(other, value, self.trace)
            same = again is not None and (again.prefix, again.suffix) == (tokens.prefix, tokens.suffix)
            return tokens if same and larger is not None and larger[1] != shape[1] else None
        if is_attention_weights(self.trace, value):
            return None
        try:
            found = infer_layout(shape, input_shape, larger)
        except ValueError:
            found = _by_operation(self.trace, value)
            if found is None:
                raise
        return found or _by_operation(self.trace, value)

    def is_spatial(self, value: int) -> bool:
        """Whether ``value`` has positions: it grows with the input, or has the input's proportions."""
        shape, other = self.trace.shapes[value], self._other(value)
        if len(shape) < 3 or shape[0] != self.trace.input_shape[0]:
            return False
        if other is not None and shape == other.shapes[value]:
            return False
        try:
            return self.layout(value) is not None
        except ValueError:  # spatial, whichever way it reads
            return True

    def grows(self, value: int) -> bool:
        """Whether ``value`` is larger for a larger input, whatever it is."""
        shape, other = self.trace.shapes[value], self._other(value)
        return len(shape) > 2 and other is not None and shape != other.shapes[value]

    def _other(self, value: int) -> Trace | None:
        """The larger run, if it made ``value`` too."""
        return self.larger if value < self.common else None


@contextmanager
def explaining_errors(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Lets a dry run say what is wrong with the input where the model raises: a method may make no other.

    Raises:
        ValueError: if the model cannot take such an input.
    """
    try:
        yield
    except UnfitError:
        raise
    except Exception:
        DryRun.of(model, (2, *inputs.images.shape[1:]), inputs)
        raise


def _common(one: Trace, other: Trace) -> int:
    """How many values two runs made in the same way, from the start on."""
    for a, b in zip(one.operations, other.operations, strict=False):
        if (a.name, a.inputs, a.outputs) != (b.name, b.inputs, b.outputs):
            return min(*a.outputs, *b.outputs)
    return min(len(one.shapes), len(other.shapes))


def _by_operation(trace: Trace, value: int) -> Layout | None:
    """Channels first, if what made ``value`` works so by its nature; ``None`` if not, or for one position."""
    shape = trace.shapes[value]
    queue, seen = [value], set[int]()
    while queue:
        value = queue.pop()
        operation = trace.producer(value)
        if operation is None or value in seen or len(trace.shapes[value]) != len(trace.input_shape):
            continue
        seen.add(value)
        name = out_of_place(operation.name)
        if name in _CHANNELS_FIRST:
            return Layout(1) if math.prod(shape[2:]) > 1 else None
        if name in _KEEP_DIMENSIONS:
            queue.extend(operation.inputs)
    return None


def _tokens(trace: Trace, value: int, other: Trace | None) -> Layout | None:
    """How tokens ``(N, L, C)`` read: as the grid of the nearest image-like value they were made from.

    What keeps its size in the other run is no grid, but heads of attention, say.
    """
    length = trace.shapes[value][1]
    above = list(trace.ancestors(value))
    joins = [o for o in map(trace.producer, above) if o is not None and o.name in ("cat", "concat")]
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
        prefix = 0 if others == 0 else _before(trace, joins, math.prod(grid), others)
        if prefix is None and others <= _MOST_TOKENS:
            prefix = others
        if prefix is not None:
            return Layout(-1, grid, prefix, others - prefix)
    return None


def _before(trace: Trace, joins: Sequence[Operation], patches: int, others: int) -> int | None:
    """How many of the other tokens were put before the patches where they were joined, if they were."""
    for operation in joins:
        lengths = [trace.shapes[v][1] for v in operation.inputs if len(trace.shapes[v]) == 3]
        if patches in lengths and sum(lengths) == patches + others:
            return sum(lengths[: lengths.index(patches)])
    return None


def is_attention_weights(trace: Trace, value: int) -> bool:
    """Whether a value is how much each position attends to each: a softmax over the last dimension."""
    operation = trace.producer(value)
    while operation is not None and len(trace.shapes[value]) > 2:
        if operation.name == "softmax":
            dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else None)
            return dim in (-1, len(trace.shapes[value]) - 1)
        if operation.name not in _KEEP_DIMENSIONS or not operation.inputs:
            return False
        operation = trace.producer(operation.inputs[0])
    return False


def in_order(trace: Trace, value: int, layout: Layout) -> bool:
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
                    found = follow(trace, source, start, value)
                    if found is None:
                        return True
                    patches = found[:, layout.prefix : layout.prefix + length]
                    return bool((patches == torch.arange(length)[None, :, None]).all())
    return True


def _cannot_take(model: nn.Module, shape: tuple[int, ...], error: Exception, inputs: Inputs | None) -> str:
    """The complaint about an input that the model cannot take, with the size that it could."""

    def can_run(shape: Sequence[int]) -> bool:
        try:
            record(model, shape, inputs=inputs)
        except Exception:
            return False
        return True

    reason = " ".join(str(error).split())
    got = f"{_checks.shape_of(shape[1:])} ({type(error).__name__}: {reason[:200]})"
    smallest = _smallest(lambda size: can_run((*shape[:2], *size)), shape[2:])
    kind, name = type(model).__name__, inputs.argument if inputs else "input_shape"
    if smallest is not None:
        return _checks.complaint(name, f"images of at least {_checks.shape_of(smallest)} for {kind}", got)
    return _checks.complaint(name, f"an input that {kind} can take", got)


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
