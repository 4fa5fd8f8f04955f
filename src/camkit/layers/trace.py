"""The record of a dry run: the operations of one forward pass, in order.

A *dry run* is a forward pass of a stand-in for the model (see :func:`camkit.model.standin.skeleton`), so
nothing in the model itself changes. It usually runs on PyTorch's meta device, where tensors have shapes but
no numbers: the model's Python code runs as always, but nothing is computed.

Every state of every tensor in the pass is called a *value* and gets a number, in the order in which values
are made. Take a small model whose ``forward`` is ``x = conv(x); x.relu_(); return fc(x.mean((2, 3)))``:

=========  ==========================================  ================
number     value                                       made by
=========  ==========================================  ================
0 to 3     weights and biases of ``conv`` and ``fc``   (parameters)
4          the images                                  (input)
5          output of ``conv``                          ``conv2d``
6          the same tensor after the in-place ReLU     ``relu``
7          pooled activation                           ``mean``
8          logits                                      ``linear``
=========  ==========================================  ================

Recording torch functions rather than module calls shows all that happens in the model's own code as well:
the ``+`` of a residual block, a functional pooling, an in-place ReLU.
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
    """The number of a value; it takes the place of the tensor in the recorded arguments of an operation."""

    number: int


@dataclass(frozen=True)
class Operation:
    """One recorded call of a torch function.

    Attributes:
        name: name of the function as :func:`camkit.functions.name_of` returns it.
        inputs: numbers of the values among its arguments.
        outputs: numbers of the values that it made.
        module: dotted name of the innermost module that was running; empty for the model itself.
        args: its positional arguments, with a :class:`ValueRef` in the place of each tensor.
        kwargs: its keyword arguments, likewise.
        function: the function.
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
    """The record of one dry run. Values are given by their numbers.

    Attributes:
        input_shape: shape of the images, with the batch.
        shapes: shape of each value.
        operations: the calls of torch functions that made a value, in order.
        calls: each call of a module as (name, value of its output), in the order in which the calls ended;
            the value is ``None`` if the output is not a single tensor. The model itself has an empty name.
        started: for each module that ran, the number of calls that had ended when it first started, so that
            ``calls[: started[name]]`` ended before it.
        parameters: names of the values that are parameters or buffers.
        input: value of the images.
        output: value of the model's output; if the model returns several tensors, the first that an
            operation made.
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
        """Returns the operation that made ``value``; ``None`` for inputs and parameters."""
        return self._producers.get(value)

    def ancestors(self, value: int) -> tuple[int, ...]:
        """Returns ``value`` and every value that it was made from, by their distance to ``value``."""
        if value not in self._ancestors:
            # A dict keeps the order in which the breadth-first search reaches the values.
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
        """Yields the values that every path from the input to ``value`` passes through, ``value`` first."""
        # Walk back from ``value``: always replace the waiting value with the largest number by its inputs.
        # Outputs have larger numbers than inputs, so a value is replaced only after every value that the
        # paths compute from it. Whenever only one value is waiting, all paths pass through it.
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
        """The images' value and every value that was made from it."""
        made = {self.input}
        for operation in self.operations:
            if made.intersection(operation.inputs):
                made.update(operation.outputs)
        return made

    def between(self, start: int, end: int) -> list[Operation]:
        """Returns the operations on all paths from ``start`` to ``end``, in order."""
        reached, on_a_path = {start}, []
        needed = set(self.ancestors(end))
        for operation in self.operations:
            if reached.intersection(operation.inputs) and needed.intersection(operation.outputs):
                reached.update(operation.outputs)
                on_a_path.append(operation)
        return on_a_path

    def history(self, value: int) -> list[str]:
        """Returns the names of all operations that ``value`` was made by, in order."""
        needed = set(self.ancestors(value))
        return [o.name for o in self.operations if needed.intersection(o.outputs)]

    def layer_of(self, value: int) -> str | None:
        """Returns the name of the module whose output is ``value``; ``None`` if only the model outputs it.

        If several modules return the same value, the outermost is taken, and among equals the first to end.
        """
        names = [name for name, output in self.calls if output == value and name]
        return min(names, key=lambda name: name.count("."), default=None)

    def outputs_of(self, name: str) -> list[int | None]:
        """Returns the values of a module's output, one for each call."""
        return [value for called, value in self.calls if called == name]

    def break_off(self) -> None:
        """Completes the record of a pass that raised.

        One operation without a name is added. Its inputs are the loose ends of the pass, which are the values
        made from the input that no operation used. Its result stands for the model's output.
        """
        used = {value for operation in self.operations for value in operation.inputs}
        loose_ends = sorted(self.from_input - used)
        self.output = len(self.shapes)
        self.shapes.append(())
        self._add(Operation("", tuple(loose_ends), (self.output,), "", (), {}, tuple))

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
    """Runs a stand-in for ``model``, in evaluation mode, on random images and records the pass.

    Args:
        model: any module.
        input_shape: shape of the images, with the batch.
        device: ``"meta"`` to run on shapes; ``None`` to run with the model's own numbers on its own device,
            for models that branch on values.
        inputs: the call from which every input except the images is taken; if not given, the images are the
            only input.
        enough: called with the trace if the pass raises. If it returns ``True``, the incomplete trace is
            completed by :meth:`Trace.break_off` and returned.

    Returns:
        The record of the pass.

    Raises:
        Exception: whatever the model's forward pass raises on such an input.
        UnfitError: if the output holds no tensor.
    """
    like = prototype(model)
    # Leave inference mode: its tensors have no version counter, so that in-place changes would not be seen.
    with torch.inference_mode(False), torch.no_grad(), process_state_restored():
        copy = skeleton(model, device)
        x = torch.rand(tuple(input_shape), dtype=like.dtype, device=device or like.device)
        recorder = _Recorder(Trace(tuple(input_shape)), copy)
        recorder.trace.input = recorder.number_of(x)
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
    # A model may return one of its inputs beside its results, so take the first tensor that was made.
    values = [recorder.number_of(tensor) for tensor in tensors]
    made = [value for value in values if recorder.trace.producer(value)]
    recorder.trace.output = (made or values)[0]
    return recorder.trace


class _Recorder(FunctionMode):
    """A context that writes each torch function and each module call of the stand-in into a trace."""

    def __init__(self, trace: Trace, copy: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        # Weak keys let PyTorch free a tensor during the pass. Otherwise a run with numbers would hold every
        # intermediate activation in memory.
        self.numbers = WeakIdKeyDictionary()
        # The names of the modules that are running, the innermost last.
        self.running: list[str] = [""]
        for name, tensor in (*copy.named_parameters(), *copy.named_buffers()):
            trace.parameters[self.number_of(tensor)] = name
        # A module that is registered under several names is recorded under each of them.
        for name, module in copy.named_modules(remove_duplicate=False):
            # Prepended hooks see the module's own output, before another hook may replace it.
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave(name), prepend=True)

    def number_of(self, tensor: torch.Tensor, *, new: bool = False) -> int:
        """Returns the number of a tensor's present state; a new one if it has none, or if ``new`` is true."""
        if new or tensor not in self.numbers:
            self.numbers[tensor] = len(self.trace.shapes)
            self.trace.shapes.append(tuple(tensor.shape))
        number: int = self.numbers[tensor]
        return number

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            self.running.append(name)
            self.trace.started.setdefault(name, len(self.trace.calls))

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            self.running.pop()
            value = self.number_of(output) if isinstance(output, torch.Tensor) else None
            self.trace.calls.append((name, value))

        return hook

    def meet(self, call: Call) -> Any:
        given = {id(tensor): tensor for tensor in tensors_in((call.args, call.kwargs))}
        # PyTorch raises a tensor's version with each in-place change.
        before = {key: (tensor._version, self.number_of(tensor)) for key, tensor in given.items()}
        result = call.run()
        # A tensor that is returned unchanged (by dropout in evaluation mode, or by contiguous) keeps its
        # value. A tensor that was changed in place becomes a new value, even if the function does not
        # return it (x[i] = y).
        after = {id(tensor): tensor for tensor in tensors_in(result)} | given
        made = [t for key, t in after.items() if key not in before or t._version != before[key][0]]
        if made:
            inputs = tuple(value for _, value in before.values())
            outputs = tuple(self.number_of(tensor, new=True) for tensor in made)
            args, kwargs = map_leaves(
                lambda tensor: ValueRef(before[id(tensor)][1]), (call.args, call.kwargs)
            )
            self.trace._add(
                Operation(call.name, inputs, outputs, self.running[-1], args, kwargs, call.function)
            )
        return result
