"""What a dry run at two input sizes tells of a model: which values are spatial, and how to read them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from camkit._tools import checks
from camkit.functions import CHANNELS_FIRST, KEEP_DIMENSIONS
from camkit.layers.layouts import Layout, infer_layout
from camkit.layers.tokens import layout_of_tokens
from camkit.layers.trace import Trace, record
from camkit.model.inputs import Inputs, UnfitError

# How much larger the second run's input is, per side: unequal, so that no side is taken for another.
_LARGER = (8, 192, 64)


@dataclass(frozen=True)
class DryRun:
    """A model's :class:`~camkit.trace.Trace`, and a second one at a larger input where it can take one.

    Attributes:
        kind: class of the model, for messages.
        trace: the run at the size that was asked for.
        device: what the runs were made on: ``"meta"``, or ``None`` for the model's own.
        larger: the run at a larger size; ``None`` for a model with a fixed input size, and for one that
            brings its input to one size itself.
        identical_values: how many values the two runs made in the same way: all, unless sizes or numbers decide what
            is done.
    """

    kind: str
    trace: Trace
    device: str | None
    larger: Trace | None
    identical_values: int = 0
    _layouts: dict[int, Layout | None] = field(default_factory=dict, repr=False, compare=False)

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
                raise ValueError(_unfit_message(model, shape, error, inputs)) from error
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
        if value not in self._layouts:
            self._layouts[value] = self._find_layout(value)
        return self._layouts[value]

    def _find_layout(self, value: int) -> Layout | None:
        shape, input_shape = self.trace.shapes[value], self.trace.input_shape
        other = self.larger_run_with(value)
        larger = other.shapes[value] if other else None
        if len(shape) == 3 and len(input_shape) > 3:
            tokens = layout_of_tokens(self.trace, value, other)
            if other is None or tokens is None:
                return tokens
            again = layout_of_tokens(other, value, self.trace)
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
        shape, other = self.trace.shapes[value], self.larger_run_with(value)
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
        shape, other = self.trace.shapes[value], self.larger_run_with(value)
        return len(shape) > 2 and other is not None and shape != other.shapes[value]

    def larger_run_with(self, value: int) -> Trace | None:
        """The larger run, if it made ``value`` too."""
        return self.larger if value < self.identical_values else None


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
        name = operation.name
        if name in CHANNELS_FIRST:
            return Layout(1) if math.prod(shape[2:]) > 1 else None
        if name in KEEP_DIMENSIONS:
            queue.extend(operation.inputs)
    return None


def is_attention_weights(trace: Trace, value: int) -> bool:
    """Whether a value is how much each position attends to each: a softmax over the last dimension."""
    operation = trace.producer(value)
    while operation is not None and len(trace.shapes[value]) > 2:
        if operation.name == "softmax":
            dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else None)
            return dim in (-1, len(trace.shapes[value]) - 1)
        if operation.name not in KEEP_DIMENSIONS or not operation.inputs:
            return False
        operation = trace.producer(operation.inputs[0])
    return False


def _unfit_message(model: nn.Module, shape: tuple[int, ...], error: Exception, inputs: Inputs | None) -> str:
    """The error_message about an input that the model cannot take, with the size that it could."""

    def can_run(shape: Sequence[int]) -> bool:
        try:
            record(model, shape, inputs=inputs)
        except Exception:
            return False
        return True

    reason = " ".join(str(error).split())
    got = f"{checks.shape_of(shape[1:])} ({type(error).__name__}: {reason[:200]})"
    kind, name = type(model).__name__, inputs.argument if inputs else "input_shape"
    # Most often the images are too small for the poolings: a few larger sizes tell.
    for factor in (2, 4, 8, 16) if len(shape) > 2 else ():
        larger = [factor * n for n in shape[2:]]
        if can_run((*shape[:2], *larger)):
            hint = f"{checks.shape_of(larger)} is large enough"
            return checks.error_message(name, f"larger images for {kind}", got, hint)
    return checks.error_message(name, f"an input that {kind} can take", got)
