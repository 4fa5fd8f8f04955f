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


@dataclass(frozen=True)
class DryRun:
    """A model's :class:`~camkit.trace.Trace`, and a second one at a larger input where it can take one.

    Attributes:
        kind: class of the model, for messages.
        trace: the run at the size that was asked for.
        larger: the run at a larger size; ``None`` for a model with a fixed input size, and for one that
            does other things at the other size.
    """

    kind: str
    trace: Trace
    larger: Trace | None

    @classmethod
    def of(cls, model: nn.Module, input_shape: Sequence[int]) -> "DryRun":
        """Runs ``model`` twice on the meta device.

        Args:
            model: any module.
            input_shape: shape of the input with its batch, ``(N, C, *size)``.

        Raises:
            ValueError: if the model cannot take such an input.
            NotImplementedError: if the model needs numbers to run, not only shapes.
        """
        shape = tuple(input_shape)
        kind = type(model).__name__
        try:
            trace = record(model, shape)
        except NotImplementedError as error:  # torch's word for "there is no data on meta"
            expected = f"a name, since {kind} does not run without numbers"
            raise NotImplementedError(_checks.complaint("layer", expected, None)) from error
        except Exception as error:
            raise ValueError(_cannot_take(model, shape, error)) from error
        extra = _LARGER[-len(shape[2:]) :] if len(shape) > 2 else ()
        enlarged = (*shape[:2], *(a + b for a, b in zip(shape[2:], extra, strict=True)))
        try:
            larger = record(model, enlarged)
        except Exception:  # a fixed input size: whatever is raised says just that
            return cls(kind, trace, None)
        same = [o.name for o in trace.operations] == [o.name for o in larger.operations]
        return cls(kind, trace, larger if same and extra else None)

    def layout(self, value: int) -> Layout | None:
        """How ``value`` reads as ``(N, C, *spatial)``; ``None`` if it is not spatial.

        Raises:
            ValueError: if it can be read in two ways.
        """
        return infer_layout(
            self.trace.shapes[value],
            self.trace.input_shape,
            (self.larger.shapes[value], self.larger.input_shape) if self.larger else None,
        )

    def is_spatial(self, value: int) -> bool:
        """Whether ``value`` has positions: it grows with the input, or has the input's proportions."""
        shape = self.trace.shapes[value]
        if self.larger is not None:
            return len(shape) > 2 and shape != self.larger.shapes[value]
        try:
            return self.layout(value) is not None
        except ValueError:  # spatial, whichever way it reads
            return True


def _cannot_take(model: nn.Module, shape: tuple[int, ...], error: Exception) -> str:
    """The complaint about an input that the model cannot take, with the size that it could."""
    reason = " ".join(str(error).split())
    got = f"{_checks.shape_of(shape)} ({type(error).__name__}: {reason[:200]})"
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
