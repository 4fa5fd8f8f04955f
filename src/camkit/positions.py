"""Where positions go: what only moves the entries of a tensor, followed on their numbers."""

import torch

from camkit._nested import mapped, tensors_in
from camkit.propagation import out_of_place
from camkit.trace import Operation, Trace, Value

# Functions that move, drop and repeat entries, and change none.
_MOVES = {"cat", "chunk", "clone", "concat", "contiguous", "expand", "flatten", "flip", "getitem", "mT"} | {
    "movedim", "moveaxis", "narrow", "permute", "repeat", "reshape", "roll", "select", "split", "squeeze",
    "swapaxes", "swapdims", "t", "T", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


def moved(operation: Operation, known: dict[int, torch.Tensor], trace: Trace) -> list[torch.Tensor]:
    """What an operation makes of numbers in the place of some of its inputs, and of -1 for the others."""

    def number(value: Value) -> torch.Tensor:
        shape = trace.shapes[value.number]
        return known.get(value.number, torch.tensor(-1, dtype=torch.int32).expand(shape))

    given = mapped(number, (operation.args, operation.kwargs), lambda value: isinstance(value, Value))
    return list(tensors_in(operation.function(*given[0], **given[1])))


def follow(trace: Trace, start: int, numbers: torch.Tensor, end: int) -> torch.Tensor | None:
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
        if out_of_place(operation.name) in _MOVES:
            try:
                made = moved(operation, known, trace)
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
