"""Watching one layer during one forward pass, and leaving the model as it was found."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from camkit import _checks, _process
from camkit.layers import ran_once


class Tap:
    """Takes the output of some layers during the forward pass inside its ``with`` block, or replaces it.

    With ``gradient=True`` the output of the first of them to run becomes the leaf of a graph, so that a
    gradient of it costs no more than what comes after it; the others are in that graph.

    Args:
        model: the model that will run.
        names: dotted names of the layers.
        gradient: whether there is a graph from the first layer on.
        before: the grad mode up to there: ``torch.no_grad``, so that there is no graph. A model that
            leaves a ``no_grad`` of its own after the layer falls back to this mode, and needs
            ``torch.enable_grad``.
        answer: what the only layer gives in place of its output, with the grad mode of the caller.
        attached: whether the outputs stay in the graph that made them.
    """

    def __init__(
        self,
        model: nn.Module,
        *names: str,
        gradient: bool = False,
        before: Callable[[], AbstractContextManager[None]] = torch.no_grad,
        answer: torch.Tensor | None = None,
        attached: bool = False,
    ) -> None:
        self._layers = {name: model.get_submodule(name) for name in names}
        self._gradient = gradient
        self._answer = answer
        self._attached = attached
        self._grad_mode = before()
        self._thread = threading.get_ident()
        self._outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def __enter__(self) -> "Tap":
        self._caller = torch.is_grad_enabled()
        self._grad_mode.__enter__()
        # First in line: hooks that the model owns see what this one hands on.
        self._handles = [
            layer.register_forward_hook(self._take(name), prepend=True)
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._grad_mode.__exit__(None, None, None)

    def output(self, name: str) -> torch.Tensor:
        """A layer's output as it left the layer, also where the model overwrote it later.

        Raises:
            ValueError: if the layer did not run once.
        """
        ran_once(name, len(self._outputs[name]))
        return self._outputs[name][0]

    def _take(self, name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: object, output: object) -> torch.Tensor | None:
            if threading.get_ident() != self._thread:  # another thread runs the same model
                return None
            if isinstance(output, torch.Tensor) and output.is_quantized:
                self._outputs[name].append(output.dequantize())
                return None if self._answer is None else _quantized(self._answer, output)
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
                expected = f"a layer whose output is one tensor of floats, as {name!r} has not"
                raise TypeError(_checks.complaint("layer", expected, kind))
            kept = self._kept(output)
            self._outputs[name].append(kept)
            # The model goes on with a copy: an in-place operation after the layer must not reach ours.
            return kept.clone()

        return hook

    def _kept(self, output: torch.Tensor) -> torch.Tensor:
        if self._answer is not None:
            torch.set_grad_enabled(self._caller)
            return self._answer
        if self._gradient:
            first = not any(self._outputs.values())
            torch.set_grad_enabled(True)  # until __exit__ puts back what the caller had
            if output.requires_grad and (self._attached or not first):
                return output
        # An input from the caller's inference mode, handed through, could be no leaf.
        leaf = output.clone() if output.is_inference() else output.detach()
        return leaf.requires_grad_(self._gradient)


def _quantized(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows in the type, the scale and the zero point of a quantized tensor."""
    return torch.quantize_per_tensor(rows, like.q_scale(), like.q_zero_point(), like.dtype)


@dataclass(slots=True)
class _Visit:
    """How many explanations one module is in the middle of, in all threads, and how it was before."""

    count: int
    training: bool
    buffers: Sequence["_Buffer"]


class _Buffer(NamedTuple):
    """A buffer as it was found: some forward passes write to it in evaluation mode too."""

    name: str
    tensor: torch.Tensor
    version: int
    numbers: torch.Tensor


# By the module: one model may be a part of another.
_visits: dict[nn.Module, _Visit] = {}
_lock = threading.Lock()


@contextmanager
def as_found(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts all modules in evaluation mode, and at the end flags, buffers and the random state back.

    The first of several threads saves them, and the last puts them back. What torch.compile made runs as it
    was before.
    """
    entered: list[nn.Module] = []
    with _process.undisturbed(), torch.inference_mode(False):
        try:
            with _lock:
                for module in modules:
                    visit = _visits.get(module)
                    if visit is None:
                        training, buffers = module.training, _buffers(module)
                        if not training and not buffers:
                            continue  # there is nothing to put back
                        visit = _visits[module] = _Visit(0, training, buffers)
                    entered.append(module)
                    visit.count += 1
                    # Set and not called: a model's own eval() and train() may do more than set a flag.
                    if module.training:
                        module.training = False
            yield
        finally:
            with _lock:
                for module in entered:
                    _leave(module)


def _leave(module: nn.Module) -> None:
    visit = _visits[module]
    visit.count -= 1
    if visit.count == 0:
        del _visits[module]
        if visit.training:
            module.training = True
        _put_back(module, visit.buffers)


def _buffers(module: nn.Module) -> Sequence[_Buffer]:
    # Most buffers there are belong to these, and evaluation only reads them.
    if not module._buffers or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ()
    return [
        # Tensors of inference mode have no version.
        _Buffer(name, tensor, -1 if tensor.is_inference() else tensor._version, tensor.detach().clone())
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


def _put_back(module: nn.Module, buffers: Sequence[_Buffer]) -> None:
    for name, tensor, version, numbers in buffers:
        module._buffers[name] = tensor
        if version == -1 or tensor._version != version:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(numbers)
