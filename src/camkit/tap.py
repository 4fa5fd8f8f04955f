"""Watching one layer during one forward pass, and leaving the model as it was found."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from camkit import _checks
from camkit.layers import ran_once


class Tap:
    """Takes one layer's output during the forward pass inside its ``with`` block.

    With ``gradient=True`` that output becomes the leaf of a graph, so that a gradient of it costs no more
    than what comes after the layer.

    Args:
        model: the model that will run.
        name: dotted name of the layer.
        gradient: whether the layer's output becomes a leaf.
        before: the grad mode up to the layer: ``torch.no_grad``, so that there is no graph. A model that
            leaves a ``no_grad`` of its own after the layer falls back to this mode, and needs
            ``torch.enable_grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        gradient: bool,
        before: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._layer = model.get_submodule(name)
        self._name = name
        self._gradient = gradient
        self._grad_mode = before()
        self._thread = threading.get_ident()
        self._outputs: list[torch.Tensor] = []

    def __enter__(self) -> "Tap":
        self._grad_mode.__enter__()
        # First in line: hooks that the model owns see what this one hands on.
        self._handle = self._layer.register_forward_hook(self._take, prepend=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        self._grad_mode.__exit__(None, None, None)

    @property
    def output(self) -> torch.Tensor:
        """The layer's output as it left the layer, also where the model overwrote it later.

        Raises:
            ValueError: if the layer did not run once.
        """
        ran_once(self._name, len(self._outputs))
        return self._outputs[0]

    def _take(self, module: nn.Module, args: object, output: object) -> torch.Tensor | None:
        if threading.get_ident() != self._thread:  # another thread runs the same model
            return None
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
            expected = f"a layer whose output is one tensor of floats, as {self._name!r} has not"
            raise TypeError(_checks.complaint("layer", expected, kind))
        # An input from the caller's inference mode, handed through, could be no leaf.
        leaf = output.clone() if output.is_inference() else output.detach()
        if self._gradient:
            torch.set_grad_enabled(True)  # until __exit__ puts back what the caller had
            leaf.requires_grad_()
        self._outputs.append(leaf)
        # The model goes on with a copy: an in-place operation after the layer must not reach ours.
        return leaf.clone()


@dataclass
class _Visit:
    """The explanations that one model is in the middle of, in all threads."""

    count: int
    training: list[nn.Module]
    random_state: torch.Tensor
    cuda_random_states: list[torch.Tensor]


_visits: WeakKeyDictionary[nn.Module, _Visit] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, and at the end its flags and torch's random state back.

    The first of several threads saves them, and the last puts them back.
    """
    with _lock:
        if model not in _visits:
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            _visits[model] = _Visit(0, [], torch.get_rng_state(), cuda)
        visit = _visits[model]
        visit.count += 1
        # Set and not called: a model's own eval() and train() may do more than set a flag.
        for module in model.modules():
            if module.training:
                visit.training.append(module)
                module.training = False
    try:
        with torch.inference_mode(False):
            yield
    finally:
        with _lock:
            visit.count -= 1
            if visit.count == 0:
                for module in visit.training:
                    module.training = True
                torch.set_rng_state(visit.random_state)
                if visit.cuda_random_states:
                    torch.cuda.set_rng_state_all(visit.cuda_random_states)
                del _visits[model]
