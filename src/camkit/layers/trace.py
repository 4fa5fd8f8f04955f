"""A dry run: one forward pass, recorded operation by operation, of a stand-in for the model.

What runs is a :func:`skeleton`, whose modules are new objects: nothing in the model changes. On the meta
device its tensors are shapes without numbers, and nothing is computed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from camkit._tools import checks
from camkit._tools.nested import map_leaves, tensors_in
from camkit.functions import Call, FunctionMode
from camkit.model.inputs import Inputs, UnfitError
from camkit.model.modules import prototype
from camkit.model.standin import skeleton
from camkit.model.state import process_state_restored


@dataclass(frozen=True)
class ValueRef:
    """A value by its number."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One call of a torch function: numbers stand for the values that went in and came out.

    In its arguments a :class:`ValueRef` stands in the place of each tensor.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Any]


@dataclass
class Trace:
    """What happened in one dry run.

    A *value* is a number that stands for one state of one tensor: an in-place operation makes a new value
    of the same tensor.

    Attributes:
        shapes: the shape of each value.
        operations: every torch function that made a value, in order.
        calls: each call of a module as (name, value of its output), in the order of their ends; the value
            is ``None`` where the output is not one tensor.
        started: for each module that ran, how many calls had ended when it first started.
        parameters: the names of the parameters and buffers that are values.
        input: the value of the model's images.
        output: the value of the model's output; of several tensors the first that the model made.
    """

    input_shape: tuple[int, ...]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[tuple[str, int | None]] = field(default_factory=list)
    started: dict[str, int] = field(default_factory=dict)
    parameters: dict[int, str] = field(default_factory=dict)
    input: int = -1
    output: int = -1

    def producer(self, value: int) -> Operation | None:
        """The operation that made ``value``; ``None`` for inputs and parameters."""
        return self._producers.get(value)

    def ancestors(self, value: int) -> tuple[int, ...]:
        """``value`` and all that it was made from, nearest first."""
        if value not in self._ancestors:
            queue, seen = deque([value]), {value: None}
            while queue:
                operation = self.producer(queue.popleft())
                for source in operation.inputs if operation else ():
                    if source not in seen:
                        seen[source] = None
                        queue.append(source)
            self._ancestors[value] = tuple(seen)
        return self._ancestors[value]

    def bottlenecks(self, value: int) -> Iterator[int]:
        """The values that every way from the input to ``value`` goes through, nearest first."""
        # Values are numbered as they are made: what is made of others has a greater number.
        waiting = {value}
        while waiting:
            value = max(waiting)
            waiting.remove(value)
            if not waiting:
                yield value
            operation = self.producer(value)
            waiting |= {v for v in operation.inputs if v in self.from_input} if operation else set()

    @cached_property
    def from_input(self) -> set[int]:
        """The input's value, and every value that was made from it."""
        made = {self.input}
        for operation in self.operations:
            if made.intersection(operation.inputs):
                made.update(operation.outputs)
        return made

    def between(self, start: int, end: int) -> list[Operation]:
        """The operations on the ways from ``start`` to ``end``, in order."""
        reached, ways = {start}, []
        needed = set(self.ancestors(end))
        for operation in self.operations:
            if reached.intersection(operation.inputs) and needed.intersection(operation.outputs):
                reached.update(operation.outputs)
                ways.append(operation)
        return ways

    def history(self, value: int) -> list[str]:
        """What was done to make ``value``, in order: the names of the operations."""
        needed = set(self.ancestors(value))
        return [o.name for o in self.operations if needed.intersection(o.outputs)]

    def layer_of(self, value: int) -> str | None:
        """The module whose output ``value`` is: the outermost, and of those the first to end."""
        names = [name for name, output in self.calls if output == value and name]
        return min(names, key=lambda name: name.count("."), default=None)

    def outputs_of(self, name: str) -> list[int | None]:
        """The values that a module gave, one a call."""
        return [value for called, value in self.calls if called == name]

    def break_off(self) -> None:
        """Ends a run that could not go on: its output is made of all that nothing was made of."""
        used = {value for operation in self.operations for value in operation.inputs}
        ends = sorted(self.from_input - used)
        self.output = len(self.shapes)
        self.shapes.append(())
        self._add(Operation("", tuple(ends), (self.output,), "", (), {}, tuple))

    def __post_init__(self) -> None:
        self._producers: dict[int, Operation] = {}
        self._ancestors: dict[int, tuple[int, ...]] = {}

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self._producers.update(dict.fromkeys(operation.outputs, operation))


def record(
    model: nn.Module,
    input_shape: Sequence[int],
    device: str | None = "meta",
    inputs: Inputs | None = None,
    enough: Callable[[Trace], bool] | None = None,
) -> Trace:
    """Runs a skeleton of ``model`` in evaluation mode on an input of ``input_shape`` and records the run.

    Args:
        model: any module.
        input_shape: shape of the images with their batch.
        device: ``"meta"``, or ``None`` to run with the model's own numbers, where shapes are not enough.
        inputs: the call whose other inputs go in too; the images alone if not given.
        enough: whether a run that broke off will do. In place of the rest stands one operation without a
            name, of all that nothing had been made of.

    Raises:
        Exception: whatever the model's forward pass raises on such an input.
    """
    like = prototype(model)
    # Out of the caller's inference mode: its tensors do not say when they are changed in place.
    with torch.inference_mode(False), torch.no_grad(), process_state_restored():
        copy = skeleton(model, device)
        x = torch.rand(tuple(input_shape), dtype=like.dtype, device=device or like.device)
        recorder = _Recorder(Trace(tuple(input_shape)), copy)
        recorder.trace.input = recorder.value(x)
        call = inputs or Inputs(x, argument="input_shape")
        try:
            with recorder:
                output = call.run(copy, x)
        except Exception:
            if enough is None or not enough(recorder.trace):
                raise
            recorder.trace.break_off()
            return recorder.trace
    tensors = list(tensors_in(output))
    if not tensors:
        expected = "an output of tensors, or of tuples, lists, dicts or dataclasses of them"
        raise UnfitError(checks.error_message("model", expected, type(output).__name__))
    # Of several outputs the first that the model made: one may be what it was given.
    values = [recorder.value(tensor) for tensor in tensors]
    made = [value for value in values if recorder.trace.producer(value)]
    recorder.trace.output = (made or values)[0]
    return recorder.trace


class _Recorder(FunctionMode):
    def __init__(self, trace: Trace, copy: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.values = WeakIdKeyDictionary()  # so that a pass takes no more memory than it does
        self.stack: list[str] = [""]
        for name, tensor in (*copy.named_parameters(), *copy.named_buffers()):
            trace.parameters[self.value(tensor)] = name
        for name, module in copy.named_modules(remove_duplicate=False):
            # First in line, so that what another hook puts in the output's place comes later.
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave(name), prepend=True)

    def value(self, tensor: torch.Tensor, *, new: bool = False) -> int:
        if new or tensor not in self.values:
            self.values[tensor] = len(self.trace.shapes)
            self.trace.shapes.append(tuple(tensor.shape))
        number: int = self.values[tensor]
        return number

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            self.stack.append(name)
            self.trace.started.setdefault(name, len(self.trace.calls))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            self.stack.pop()
            value = self.value(output) if isinstance(output, torch.Tensor) else None
            self.trace.calls.append((name, value))

        return hook

    def meet(self, call: Call) -> Any:
        given = {id(tensor): tensor for tensor in tensors_in((call.args, call.kwargs))}
        before = {key: (tensor._version, self.value(tensor)) for key, tensor in given.items()}
        result = call.run()
        # What comes back as it went in (dropout in evaluation, contiguous) is no new value; what was
        # changed in place is one, even if it does not come back (x[i] = y).
        after = {id(tensor): tensor for tensor in tensors_in(result)} | given
        made = [t for key, t in after.items() if key not in before or t._version != before[key][0]]
        if made:
            inputs = tuple(value for _, value in before.values())
            outputs = tuple(self.value(tensor, new=True) for tensor in made)
            args, kwargs = map_leaves(
                lambda tensor: ValueRef(before[id(tensor)][1]), (call.args, call.kwargs)
            )
            self.trace._add(
                Operation(call.name, inputs, outputs, self.stack[-1], args, kwargs, call.function)
            )
        return result
