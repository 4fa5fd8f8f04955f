"""Running only what comes after a layer."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from camkit.layers.location import Location
from camkit.layers.trace import Trace
from camkit.model.inputs import Inputs
from camkit.model.modules import prototype
from camkit.model.standin import skeleton
from camkit.passes.tap import Tap


class Replay:
    """A model that answers other activations at one layer, and computes only what follows them.

    A stand-in for the model runs, with its parameters. In it the layer gives the activation, and every module
    that had ended before the layer started gives zeros that take no memory; or, if something after the layer
    looks at its output (a skip connection), what it gave. Hooks fire on what runs. It is right for a model
    that is what its dry run says: who uses it compares.

    Args:
        model: the model, in evaluation mode.
        inputs: what it is called with.
        location: the layer.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, location: Location) -> None:
        trace = location.dry.trace
        ended = _ended_before(trace, location.name)
        looked_at = _looked_at(trace, location, {value for values in ended.values() for value in values})
        kept = [name for name, values in ended.items() if looked_at.intersection(values)]
        with torch.no_grad(), Tap(model, *kept) as tap:
            if kept:
                inputs.run(model, inputs.images)
        self._inputs, self._x = inputs, inputs.images
        self._needs_input = trace.input in looked_at
        self._kept = {name: tap.output(name) for name in kept}
        self._like = prototype(model)
        self._model = skeleton(model, device=None, hooks=True)
        self._rows = torch.empty(0)
        self._has_graph = False
        #: Whether what follows the layer writes to its output; None until somebody has looked.
        self.head_writes_in_place: bool | None = None
        self._calls: dict[str, int] = {}
        # Weakly, so that what is kept goes with the last who uses it, and not when a circle is collected.
        me: Any = weakref.proxy(self)
        for name, values in ended.items():
            module = self._model.get_submodule(name)
            if name in kept:
                module.forward = Replay._recall(me, name)
            else:
                shapes = [trace.shapes[value] for value in values]
                stand_in = Replay._stand_in(me, name, shapes, trace.input_shape[0], _unbound(module))
                module.forward = stand_in
                if len(values) == len(trace.outputs_of(name)):  # what does not run fires no hook
                    module._forward_hooks.clear()
                    module._forward_pre_hooks.clear()
        self._layer = location.name
        self._model.get_submodule(location.name).forward = partial(Replay._answer, me)

    def __call__(self, rows: torch.Tensor) -> Any:
        """The output for activations ``(M * N, ...)`` as the layer gives them, in the caller's grad mode.

        They are copied where they have a graph, and where the model works on them in place, as
        :attr:`head_writes_in_place` says.

        Raises:
            RuntimeError: if the stand-in did not ask the layer once, or wrote to rows that were not copied.
        """
        self._rows, self._calls, self._has_graph = rows, {}, torch.is_grad_enabled()
        version = rows._version
        x = self._x[:1].expand(len(rows), *self._x.shape[1:])
        with torch.set_grad_enabled(self._has_graph):  # puts back what a layer sets
            images = repeat_batch(self._x, len(rows) // len(self._x)) if self._needs_input else x
            output = self._inputs.run(self._model, images)
        self._rows = torch.empty(0)
        if rows._version != version and self.head_writes_in_place is False:
            raise RuntimeError(f"what follows {self._layer!r} wrote to its output, as it had not before")
        if self._calls.get(self._layer) != 1:
            raise RuntimeError(f"{self._layer!r} was asked {self._calls.get(self._layer, 0)} times")
        return output

    def _count(self, name: str) -> int:
        self._calls[name] = self._calls.get(name, 0) + 1
        return self._calls[name]

    def _answer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._count(self._layer)
        torch.set_grad_enabled(self._has_graph)  # the model may be in a no_grad of its own
        return self._rows.clone() if self.head_writes_in_place or self._rows.requires_grad else self._rows

    def _recall(self, name: str) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: repeat_batch(self._kept[name], len(self._rows) // len(self._x))

    def _stand_in(
        self, name: str, shapes: list[tuple[int, ...]], images: int, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Zeros of these shapes, for so many images, at the first calls; then what the module computes."""

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            call = self._count(name)
            if call > len(shapes):
                return forward(*args, **kwargs)
            rows, *rest = shapes[call - 1]
            zero = torch.zeros((), dtype=self._like.dtype, device=self._x.device)
            return zero.expand(rows * len(self._rows) // images, *rest)

        return stand_in


def _unbound(module: nn.Module) -> Callable[..., Any]:
    """A module's forward that does not keep the module."""
    forward = module.forward
    if getattr(forward, "__self__", None) is not module:
        return forward
    function, weak = forward.__func__, weakref.ref(module)  # type: ignore[attr-defined]
    return lambda *args, **kwargs: function(weak(), *args, **kwargs)


def repeat_batch(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """A batch, that many times over: a copy."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _ended_before(trace: Trace, layer: str) -> dict[str, list[int]]:
    """The outermost modules that ended before the layer started, and the values that they gave until then."""
    found: dict[str, list[int]] = {}
    for name, value in trace.calls[: trace.started[layer]]:
        if value is not None:
            found.setdefault(name, []).append(value)
    outer = {name for name, values in found.items() if len(values) == len(trace.outputs_of(name))}
    return {name: v for name, v in found.items() if not any(name.startswith(f"{o}.") for o in outer)}


def _looked_at(trace: Trace, location: Location, ended: set[int]) -> set[int]:
    """Of the input and the values that modules gave before the layer, those that what follows it looks at."""
    made = trace.producer(location.value)
    follows = trace.operations[trace.operations.index(made) + 1 if made else 0 :]
    queue = [value for operation in follows for value in operation.inputs]
    seen, found = {location.value}, set()
    while queue:
        value = queue.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in ended or value == trace.input:
            found.add(value)
        elif (operation := trace.producer(value)) is not None:
            queue.extend(operation.inputs)
    return found


def scores_agree(scores: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether scores are the same up to rounding; where in doubt, not."""
    if scores.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(scores, expected, rtol=eps**0.5, atol=eps**0.75 * expected.abs().max().item())
