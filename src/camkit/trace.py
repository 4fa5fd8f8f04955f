"""A dry run: one forward pass on the meta device, recorded operation by operation.

Nothing is computed and the model is not touched: what runs is a :func:`skeleton`, whose modules are new
objects that share everything with the model's but hold shapes instead of numbers.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from camkit._nested import tensors_in


@dataclass(frozen=True)
class Operation:
    """One call of a torch function: numbers stand for the values that went in and came out."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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
        parameters: the names of the parameters that are values.
        input: the value of the model's input.
        output: the value of the model's output; of its first tensor, if there are several.
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

    def ancestors(self, value: int) -> Iterator[int]:
        """``value`` and all that it was made from, nearest first."""
        queue, seen = [value], {value}
        while queue:
            value = queue.pop(0)
            yield value
            operation = self.producer(value)
            for source in operation.inputs if operation else ():
                if source not in seen:
                    seen.add(source)
                    queue.append(source)

    def between(self, start: int, end: int) -> list[Operation]:
        """The operations on the ways from ``start`` to ``end``, in order."""
        reached, ways = {start}, []
        needed = set(self.ancestors(end))
        for operation in self.operations:
            if reached.intersection(operation.inputs) and needed.intersection(operation.outputs):
                reached.update(operation.outputs)
                ways.append(operation)
        return ways

    def layer_of(self, value: int) -> str | None:
        """The module whose output ``value`` is: the outermost, and of those the first to end."""
        names = [name for name, output in self.calls if output == value and name]
        return min(names, key=lambda name: name.count("."), default=None)

    def outputs_of(self, name: str) -> list[int | None]:
        """The values that a module gave, one a call."""
        return [value for called, value in self.calls if called == name]

    def __post_init__(self) -> None:
        self._producers: dict[int, Operation] = {}

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self._producers.update(dict.fromkeys(operation.outputs, operation))


def record(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None) -> Trace:
    """Runs ``model`` in evaluation mode on a meta tensor of ``input_shape`` and records the run.

    Raises:
        Exception: whatever the model's forward pass raises on such an input.
    """
    if dtype is None:
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.get_default_dtype())
    # Out of the caller's inference mode: its tensors do not say when they are changed in place.
    with torch.inference_mode(False), torch.no_grad():
        copy = skeleton(model)
        x = torch.empty(tuple(input_shape), dtype=dtype, device="meta")
        recorder = _Recorder(Trace(tuple(input_shape)), copy)
        recorder.trace.input = recorder.value(x)
        with recorder:
            output = copy(x)
    tensors = list(tensors_in(output))
    if not tensors:
        raise TypeError(f"the model's output holds no tensor: {type(output).__name__}")
    recorder.trace.output = recorder.value(tensors[0])
    return recorder.trace


class _Recorder(TorchFunctionMode):
    def __init__(self, trace: Trace, copy: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.alive: list[torch.Tensor] = []  # so that no id is used twice
        self.values: dict[int, int] = {}
        self.stack: list[str] = [""]
        for name, parameter in copy.named_parameters():
            trace.parameters[self.value(parameter)] = name
        for name, module in copy.named_modules(remove_duplicate=False):
            # First in line, so that what a user's hook puts in the output's place comes later.
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave(name), prepend=True)

    def value(self, tensor: torch.Tensor, *, new: bool = False) -> int:
        if new or id(tensor) not in self.values:
            self.values[id(tensor)] = len(self.trace.shapes)
            self.trace.shapes.append(tuple(tensor.shape))
            self.alive.append(tensor)
        return self.values[id(tensor)]

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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        before = {id(tensor): (tensor._version, self.value(tensor)) for tensor in given}
        result = func(*args, **kwargs)
        made = [
            tensor
            for tensor in tensors_in(result)
            # What comes back as it went in (dropout in evaluation, contiguous) is no new value.
            if id(tensor) not in before or tensor._version != before[id(tensor)][0]
        ]
        if made:
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # tensor.mT and the like
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            inputs = tuple(value for _, value in before.values())
            outputs = tuple(self.value(tensor, new=True) for tensor in made)
            self.trace._add(Operation(name, inputs, outputs, self.stack[-1], args, kwargs))
        return result


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model's structure in evaluation mode, its tensors on the meta device.

    Modules are new objects; what is neither a module nor a tensor is shared with the model, so that this
    costs no memory and works where ``copy.deepcopy`` does not.
    """
    made: dict[int, Any] = {}

    def rebuild(value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, nn.Module):
            made[id(value)] = module = object.__new__(type(value))
            for key, attribute in vars(value).items():
                vars(module)[key] = rebuild(attribute)
            vars(module)["training"] = False
            return module
        if isinstance(value, torch.Tensor):
            meta = torch.empty_like(value.detach(), device="meta")
            if isinstance(value, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=value.requires_grad)
            made[id(value)] = meta
            return meta
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, rebuild(value.__self__))
        if isinstance(value, dict):
            new = value.copy()
            new.update((key, rebuild(item)) for key, item in value.items())
            return new
        if type(value) in (list, tuple):
            return type(value)(rebuild(item) for item in value)
        return value

    copy: nn.Module = rebuild(model)
    return copy
