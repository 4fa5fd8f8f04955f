"""A dry run at two input sizes, which shows which values are spatial and how to read them.

One dry run (see :mod:`camkit.layers.trace`) gives the shape of every value, but a shape such as
``(2, 7, 7, 7)`` does not show which of its dimensions are spatial. A :class:`DryRun` therefore runs the
stand-in twice: at the size that was asked for and at a larger one. A value is spatial if it is larger in the
second run, and the dimensions that differ are its spatial dimensions:

======================================  ================  ==================  ==============
value                                   at 224 x 224      at 416 x 288        reading
======================================  ================  ==================  ==============
last feature map of ResNet-18           (2, 512, 7, 7)    (2, 512, 13, 9)     channels first
linear layer in a block of ConvNeXt     (2, 7, 7, 3072)   (2, 13, 9, 3072)    channels last
output of ResNet-18's global pooling    (2, 512, 1, 1)    (2, 512, 1, 1)      not spatial
======================================  ================  ==================  ==============

Some values cannot be compared, because the model accepts one input size only, or performs other operations at
the larger size. Such a value is read by the proportions of the input, or else by the operation that made it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import nn

from camkit._tools import checks
from camkit.functions import CHANNELS_FIRST, KEEP_DIMENSIONS
from camkit.layers.layouts import Layout, infer_layout
from camkit.layers.tokens import layout_of_tokens
from camkit.layers.trace import Trace, record
from camkit.model.inputs import Inputs, UnfitError

# The larger run's input is longer by this many frames and pixels: (time, height, width). Height and width
# grow by different lengths, so that they cannot be mistaken for one another.
_ENLARGEMENT = (8, 192, 64)


@dataclass(frozen=True)
class DryRun:
    """The records of a model's dry run at two input sizes.

    Attributes:
        kind: class name of the model, for error messages.
        trace: the run at the size that was asked for.
        device: where the runs were made: ``"meta"``, or ``None`` for the model's own device.
        larger: the run at the larger size; ``None`` for a model that accepts one input size only, and for one
            that itself resizes its input to a fixed size.
        identical_values: the number of values, counted from the first, that both runs made by the same
            operations. Any smaller value number means the same value in both runs. Larger numbers exist if
            the model does different things at different sizes (Swin crops its padding at some sizes only).
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
        """Runs a stand-in for ``model`` twice: on the meta device, or with numbers if shapes do not suffice.

        Args:
            model: any module.
            input_shape: shape of the images with their batch, ``(N, C, *size)``.
            inputs: the call from which every input except the images is taken; if not given, the images are
                the only input.
            names: the layers that the caller is interested in; by default every module with parameters. If a
                run on shapes raises, its record is used if all of these layers have run before. Detectors
                need this, because they select boxes by numbers.

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
            # The model may need numbers, for example to branch on a value. Run it with its own.
            try:
                device = None
                trace = record(model, shape, device, inputs)
            except UnfitError:
                raise
            except Exception as error:
                raise ValueError(_unfit_message(model, shape, error, inputs)) from error
        extra = _ENLARGEMENT[-len(shape[2:]) :] if len(shape) > 2 else ()
        enlarged = (*shape[:2], *(a + b for a, b in zip(shape[2:], extra, strict=True)))
        try:
            larger = record(model, enlarged, device, inputs, enough)
        except Exception:  # the model ran at the first size, so it accepts no other
            return cls(kind, trace, device, None)
        identical = _count_identical_values(trace, larger)
        layer_outputs = {value for _, value in trace.calls if value is not None and value < identical}
        # If no layer's output grew, the model resizes its input, and the second run says nothing.
        grows = any(trace.shapes[value] != larger.shapes[value] for value in layer_outputs)
        return cls(kind, trace, device, larger if grows else None, identical if grows else 0)

    def layout(self, value: int) -> Layout | None:
        """Returns the layout that reads ``value`` as ``(N, C, *spatial)``; ``None`` if it is not spatial.

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
        # The input has at least four dimensions. A value of three can only be spatial as tokens (N, L, C).
        if len(shape) == 3 and len(input_shape) > 3:
            tokens = layout_of_tokens(self.trace, value, other)
            if other is None or tokens is None:
                return tokens
            # Both runs must agree on the tokens outside the grid, and there must be more tokens in the larger
            # run. Otherwise a fixed number of learnt queries could be mistaken for a grid.
            again = layout_of_tokens(other, value, self.trace)
            same = again is not None and (again.prefix, again.suffix) == (tokens.prefix, tokens.suffix)
            return tokens if same and larger is not None and larger[1] != shape[1] else None
        if _is_attention_weights(self.trace, value):
            return None
        try:
            found = infer_layout(shape, input_shape, larger)
        except ValueError:
            found = _layout_by_operation(self.trace, value)
            if found is None:
                raise
        return found or _layout_by_operation(self.trace, value)

    def is_spatial(self, value: int) -> bool:
        """Whether ``value`` has one row per image and a spatial size that follows the size of the input.

        A pooling to a fixed size of 6 x 6 has a layout, but is not spatial in this sense.
        """
        shape, other = self.trace.shapes[value], self.larger_run_with(value)
        if len(shape) < 3 or shape[0] != self.trace.input_shape[0]:
            return False
        if other is not None and shape == other.shapes[value]:
            return False
        try:
            return self.layout(value) is not None
        except ValueError:  # it can be read in two ways, and is spatial in both
            return True

    def grows(self, value: int) -> bool:
        """Whether ``value`` has another shape in the larger run, and more than two dimensions.

        Unlike :meth:`is_spatial` this asks for neither a layout nor one row per image.
        """
        shape, other = self.trace.shapes[value], self.larger_run_with(value)
        return len(shape) > 2 and other is not None and shape != other.shapes[value]

    def larger_run_with(self, value: int) -> Trace | None:
        """Returns the larger run if ``value`` means the same in it, and ``None`` otherwise."""
        return self.larger if value < self.identical_values else None


@contextmanager
def explaining_errors(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """A context that replaces an error of the model's forward pass by a clear one if the input caused it.

    It is for methods that make no dry run of their own. This context makes one, but only after an error.

    Args:
        model: the model that runs within the context.
        inputs: the inputs that it runs on.

    Raises:
        ValueError: if the model cannot take such an input; any other error is raised as it is.
    """
    try:
        yield
    except UnfitError:
        raise
    except Exception:
        DryRun.of(model, (2, *inputs.images.shape[1:]), inputs)
        raise


def _count_identical_values(one: Trace, other: Trace) -> int:
    """Counts the first values that two runs made by the same operations from the same values."""
    for a, b in zip(one.operations, other.operations, strict=False):
        if (a.name, a.inputs, a.outputs) != (b.name, b.inputs, b.outputs):
            return min(*a.outputs, *b.outputs)
    return min(len(one.shapes), len(other.shapes))


def _layout_by_operation(trace: Trace, value: int) -> Layout | None:
    """Returns channels first if ``value`` was made by a function that requires it, such as a convolution.

    The search walks back through functions that keep the order of the dimensions, such as ReLU and sums.

    Returns:
        The layout; ``None`` if no such function is found, or if there is only one position.
    """
    shape = trace.shapes[value]
    queue, seen = [value], set[int]()
    while queue:
        current = queue.pop()
        operation = trace.producer(current)
        if operation is None or current in seen or len(trace.shapes[current]) != len(trace.input_shape):
            continue
        seen.add(current)
        if operation.name in CHANNELS_FIRST:
            return Layout(1) if math.prod(shape[2:]) > 1 else None
        if operation.name in KEEP_DIMENSIONS:
            queue.extend(operation.inputs)
    return None


def _is_attention_weights(trace: Trace, value: int) -> bool:
    """Whether a value is the weights of attention: the result of a softmax over its last dimension.

    Weights ``(N, heads, L, L)`` grow with the input and could be taken for a feature map.
    """
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
    """Returns the message for an input that the model cannot take, with a size that fits if one is found."""
    reason = " ".join(str(error).split())
    got = f"{checks.shape_of(shape[1:])} ({type(error).__name__}: {reason[:200]})"
    kind, name = type(model).__name__, inputs.argument if inputs else "input_shape"
    # The most frequent cause is an image too small for the model's poolings, so try a few larger sizes.
    for factor in (2, 4, 8, 16) if len(shape) > 2 else ():
        larger = [factor * n for n in shape[2:]]
        with suppress(Exception):
            record(model, (*shape[:2], *larger), inputs=inputs)
            hint = f"{checks.shape_of(larger)} is large enough"
            return checks.error_message(name, f"larger images for {kind}", got, hint)
    return checks.error_message(name, f"an input that {kind} can take", got)
