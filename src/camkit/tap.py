"""Watching one layer during one forward pass, and leaving the model as it was found."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn

from camkit import _checks
from camkit.layers import ran_once


class Tap:
    """Takes one layer's output during the forward pass inside its ``with`` block.

    The pass runs without a graph up to the layer. With ``gradient=True`` the graph starts at the layer's
    output, so that a gradient of it costs no more than what comes after the layer.

    Args:
        model: the model that will run.
        name: dotted name of the layer.
        gradient: whether the layer's output becomes the leaf of a graph.

    Attributes:
        output: the layer's output as it left the layer, also where the model overwrites it later.
    """

    output: torch.Tensor

    def __init__(self, model: nn.Module, name: str, *, gradient: bool) -> None:
        self._layer = model.get_submodule(name)
        self._name = name
        self._gradient = gradient
        self._thread = threading.get_ident()
        self._calls = 0

    def __enter__(self) -> "Tap":
        self._grad_mode = torch.no_grad()
        self._grad_mode.__enter__()
        # First in line: hooks that the model owns see what this one hands on.
        self._handle = self._layer.register_forward_hook(self._take, prepend=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handle.remove()
        self._grad_mode.__exit__(kind, error, traceback)
        if kind is None:
            ran_once(self._name, self._calls)

    def _take(self, module: nn.Module, args: object, output: object) -> torch.Tensor | None:
        if threading.get_ident() != self._thread:  # another thread runs the same model
            return None
        self._calls += 1
        if self._calls > 1:
            return None
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
            expected = f"a layer whose output is one tensor of floats, got {self._name!r}"
            raise TypeError(_checks.complaint("layer", expected, kind))
        self.output = output.detach()
        if self._gradient:
            torch.set_grad_enabled(True)  # until __exit__ puts back what the caller had
            self.output.requires_grad_()
        # The model goes on with a copy: an in-place operation after the layer must not reach ours.
        return self.output.clone()


@contextmanager
def as_found(model: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Puts the model in evaluation mode, and at the end its flags and torch's random state back."""
    training = [module for module in model.modules() if module.training]
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices):
        # Set and not called: a model's own eval() and train() may do more than set a flag.
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
