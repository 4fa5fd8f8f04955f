"""Watching layers during one forward pass, or replacing the output of one."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from camkit._tools import checks
from camkit.model.modules import require_one_run


class Tap:
    """Takes the output of some layers during the forward pass inside its ``with`` block, or replaces it.

    With ``gradient=True`` the output of the first of them to run becomes the leaf of a graph, so that a
    gradient of it costs no more than what comes after it; the others are in that graph.

    Args:
        model: the model that will run.
        names: dotted names of the layers.
        gradient: whether there is a graph from the first layer on.
        grad_mode: the grad mode up to there: ``torch.no_grad``, so that there is no graph. A model that
            leaves a ``no_grad`` of its own after the layer falls back to this mode, and needs
            ``torch.enable_grad``.
        replacement: what the only layer gives in place of its output, with the grad mode of the caller.
        attached: whether the outputs stay in the graph that made them.
    """

    def __init__(
        self,
        model: nn.Module,
        *names: str,
        gradient: bool = False,
        grad_mode: Callable[[], AbstractContextManager[None]] = torch.no_grad,
        replacement: torch.Tensor | None = None,
        attached: bool = False,
    ) -> None:
        self._layers = {name: model.get_submodule(name) for name in names}
        self._gradient = gradient
        self._replacement = replacement
        self._attached = attached
        self._grad_mode = grad_mode()
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
        require_one_run(name, len(self._outputs[name]))
        return self._outputs[name][0]

    def _take(self, name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: object, output: object) -> torch.Tensor | None:
            if threading.get_ident() != self._thread:  # another thread runs the same model
                return None
            if isinstance(output, torch.Tensor) and output.is_quantized:
                self._outputs[name].append(output.dequantize())
                return None if self._replacement is None else _quantized(self._replacement, output)
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
                expected = f"a layer whose output is one tensor of floats, as {name!r} has not"
                raise TypeError(checks.error_message("layer", expected, kind))
            kept = self._kept(output)
            self._outputs[name].append(kept)
            # The model goes on with a copy: an in-place operation after the layer must not reach ours.
            return kept.clone()

        return hook

    def _kept(self, output: torch.Tensor) -> torch.Tensor:
        if self._replacement is not None:
            torch.set_grad_enabled(self._caller)
            return self._replacement
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
