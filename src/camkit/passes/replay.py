"""Running only the part of a model that follows one layer."""

import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from camkit._tools import checks
from camkit.layers.location import Location
from camkit.layers.trace import Trace
from camkit.model.inputs import Inputs
from camkit.model.modules import prototype
from camkit.model.standin import skeleton
from camkit.passes.tap import Tap


class Replay:
    """Runs the part of a model that follows one layer, from given activations of that layer.

    It runs a stand-in for the model, which shares the model's parameters. In the stand-in the layer returns
    the given activations. A module that had ended before the layer started is not computed again: it
    returns its original output if a later operation reads it (a skip connection), and otherwise zeros that
    take no memory. Forward hooks fire on the modules that run and on those that return their original output.

    The result is right only for a model that always performs the operations of its dry run. The caller must
    compare the scores with the model's own, as :class:`camkit.Evidence` does.

    Args:
        model: the model, in evaluation mode.
        inputs: the inputs of the model.
        location: the layer.

    Attributes:
        head_writes_in_place: whether the part after the layer overwrites the layer's output; ``None`` until
            the caller has found out.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, location: Location) -> None:
        trace = location.dry.trace
        ended = _ended_before(trace, location.name)
        read_later = _read_after(trace, location, {value for values in ended.values() for value in values})
        kept = [name for name, values in ended.items() if read_later.intersection(values)]
        with torch.no_grad(), Tap(model, *kept) as tap:
            if kept:  # only a skip connection makes this further pass of the whole model necessary
                inputs.run(model, inputs.images)
        self._inputs, self._images = inputs, inputs.images
        self._needs_images = trace.input in read_later
        self._kept = {name: tap.output(name) for name in kept}
        self._dtype = prototype(model).dtype
        self._model = skeleton(model, device=None, hooks=True)
        self._rows = torch.empty(0)
        self._grad_enabled = False
        self.head_writes_in_place: bool | None = None
        self._calls: dict[str, int] = {}
        # The stand-in refers to this object weakly. A strong reference would close a cycle, and the kept
        # tensors would stay in memory until the garbage collector runs.
        me: Any = weakref.proxy(self)
        for name, values in ended.items():
            module = self._model.get_submodule(name)
            if name in kept:
                module.forward = Replay._returns_kept_output(me, name)
            else:
                shapes = [trace.shapes[value] for value in values]
                forward = _with_weak_self(module)
                module.forward = Replay._returns_zeros(me, name, shapes, trace.input_shape[0], forward)
                # A module that never computes must not fire its hooks. A module that the model calls again
                # after the layer does compute then, so it keeps them.
                if len(values) == len(trace.outputs_of(name)):
                    module._forward_hooks.clear()
                    module._forward_pre_hooks.clear()
        self._layer = location.name
        self._model.get_submodule(location.name).forward = partial(Replay._return_rows, me)

    def __call__(self, rows: torch.Tensor) -> Any:
        """Returns the model's output for other activations of the layer, in the caller's grad mode.

        Args:
            rows: activations in the layer's own layout, ``(M * N, ...)``. The model gets a copy of them if
                they require a gradient or if :attr:`head_writes_in_place` is true.

        Raises:
            RuntimeError: if the stand-in did not run the layer exactly once, or overwrote rows that were not
                copied.
        """
        self._rows, self._calls, self._grad_enabled = rows, {}, torch.is_grad_enabled()
        version = rows._version
        # If nothing after the layer reads the images, expand one image to the right number of rows.
        images = self._images[:1].expand(len(rows), *self._images.shape[1:])
        if self._needs_images:
            images = repeat_batch(self._images, len(rows) // len(self._images))
        # On exit this block restores the grad mode, which _return_rows changes inside the model.
        with torch.set_grad_enabled(self._grad_enabled):
            output = self._inputs.run(self._model, images)
        self._rows = torch.empty(0)
        if rows._version != version and self.head_writes_in_place is False:
            expected = f"layers after {self._layer!r} that leave its output unchanged, as at first"
            raise RuntimeError(checks.error_message("model", expected, "layers that overwrote it"))
        runs = self._calls.get(self._layer, 0)
        if runs != 1:
            raise RuntimeError(checks.error_message("model", f"one run of {self._layer!r}", f"{runs} runs"))
        return output

    def _count_call(self, name: str) -> int:
        """Counts a call of a module; returns the number of its calls so far."""
        self._calls[name] = self._calls.get(name, 0) + 1
        return self._calls[name]

    def _return_rows(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the given rows; the forward function of the layer in the stand-in."""
        self._count_call(self._layer)
        torch.set_grad_enabled(self._grad_enabled)  # the layer may lie in a no_grad block of the model
        return self._rows.clone() if self.head_writes_in_place or self._rows.requires_grad else self._rows

    def _returns_kept_output(self, name: str) -> Callable[..., torch.Tensor]:
        """Makes a forward function that returns the module's original output, repeated for all rows."""
        return lambda *args, **kwargs: repeat_batch(self._kept[name], len(self._rows) // len(self._images))

    def _returns_zeros(
        self, name: str, shapes: list[tuple[int, ...]], batch: int, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Makes a forward function that returns zeros in calls before the layer, and computes in later calls.

        Args:
            name: name of the module.
            shapes: shapes of its outputs before the layer in the dry run, one for each call.
            batch: number of images in the dry run.
            forward: the module's own forward function, for later calls.
        """

        def zeros_at_first(*args: Any, **kwargs: Any) -> Any:
            call = self._count_call(name)
            if call > len(shapes):
                return forward(*args, **kwargs)
            dry_rows, *rest = shapes[call - 1]
            # Expand one number, so that the zeros take no memory.
            zero = torch.zeros((), dtype=self._dtype, device=self._images.device)
            return zero.expand(dry_rows * len(self._rows) // batch, *rest)

        return zeros_at_first


def _with_weak_self(module: nn.Module) -> Callable[..., Any]:
    """Returns the forward function of a module, without a strong reference to the module."""
    forward: object = module.forward
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return module.forward
    function, weak = forward.__func__, weakref.ref(module)
    return lambda *args, **kwargs: function(weak(), *args, **kwargs)


def repeat_batch(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeats a batch ``times`` times: ``(N, ...)`` becomes ``(times * N, ...)``, one copy after another."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _ended_before(trace: Trace, layer: str) -> dict[str, list[int]]:
    """Returns the outermost modules that ended before the layer started, with their outputs up to then."""
    found: dict[str, list[int]] = {}
    for name, value in trace.calls[: trace.started[layer]]:
        if value is not None:
            found.setdefault(name, []).append(value)
    # A module that never runs again stands for all modules inside it.
    outer = {name for name, values in found.items() if len(values) == len(trace.outputs_of(name))}
    return {name: v for name, v in found.items() if not any(name.startswith(f"{o}.") for o in outer)}


def _read_after(trace: Trace, location: Location, ended: set[int]) -> set[int]:
    """Returns the values among ``ended`` and the input that operations after the layer read.

    Values that the model made outside any module are traced back to the values that they were made from.
    """
    made = trace.producer(location.value)
    later = trace.operations[trace.operations.index(made) + 1 if made else 0 :]
    queue = [value for operation in later for value in operation.inputs]
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
    """Whether scores equal the expected ones up to rounding; false if an expected score is not finite."""
    if scores.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    eps = torch.finfo(expected.dtype).eps
    # A score near zero has a large relative error; the absolute tolerance follows the largest score.
    return torch.allclose(scores, expected, rtol=eps**0.5, atol=eps**0.75 * expected.abs().max().item())
