"""Recording the outputs of layers during one forward pass, or replacing the output of one layer."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from camkit._tools import checks
from camkit.model.modules import require_one_run


class Tap:
    """Records the outputs of layers, or replaces the output of one, while its ``with`` block runs.

    With ``gradient=True`` the graph starts at the first of the layers to run: its output becomes a leaf, and
    the outputs of the other layers belong to the same graph. The backward pass then stops at that leaf, so
    that it costs no more than the part of the model after the first layer.

    Args:
        model: the model that will run.
        names: dotted names of the layers.
        gradient: whether to build a graph from the first layer on.
        grad_mode: the grad mode before the first layer. The default, ``torch.no_grad``, builds no graph
            there. Use ``torch.enable_grad`` for a model that runs the layer inside a ``no_grad`` block of
            its own: the end of that block restores this mode for the rest of the pass.
        replacement: the tensor that the model continues with in place of the output of the only layer. The
            rest of the pass runs in the grad mode of the caller.
        attached: whether the recorded outputs stay in the graph of the model's parameters.
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
        # One list per layer, so that a layer that runs twice is noticed.
        self._outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def __enter__(self) -> "Tap":
        self._caller_grad = torch.is_grad_enabled()
        self._grad_mode.__enter__()
        # Put our hook first, so that the model's own hooks receive the tensor that ours returns.
        self._handles = [
            layer.register_forward_hook(self._hook_for(name), prepend=True)
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._grad_mode.__exit__(None, None, None)

    def output(self, name: str) -> torch.Tensor:
        """Returns the output of a layer as the layer returned it, even if the model overwrote it later.

        Raises:
            ValueError: if the layer did not run exactly once.
        """
        require_one_run(name, len(self._outputs[name]))
        return self._outputs[name][0]

    def _hook_for(self, name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: object, output: object) -> torch.Tensor | None:
            # Another thread may run the same model at the same time. Its pass is not ours to record.
            if threading.get_ident() != self._thread:
                return None
            if isinstance(output, torch.Tensor) and output.is_quantized:
                self._outputs[name].append(output.dequantize())
                return None if self._replacement is None else _quantize_like(self._replacement, output)
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                kind = output.dtype if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
                got = f"{name!r}, whose output is {kind}"
                raise TypeError(
                    checks.error_message("layer", "a layer whose output is one floating-point tensor", got)
                )
            kept = self._tensor_to_keep(output)
            self._outputs[name].append(kept)
            # The model continues with a copy, so that an in-place operation cannot change the tensor we keep.
            return kept.clone()

        return hook

    def _tensor_to_keep(self, output: torch.Tensor) -> torch.Tensor:
        """Returns the tensor to record for a layer, and sets the grad mode for the rest of the pass."""
        if self._replacement is not None:
            torch.set_grad_enabled(self._caller_grad)
            return self._replacement
        if self._gradient:
            first = not any(self._outputs.values())
            torch.set_grad_enabled(True)  # __exit__ restores the mode of the caller
            if output.requires_grad and (self._attached or not first):
                return output
        # A layer may return an input that was made in the caller's inference mode. Such a tensor cannot
        # require a gradient, but a clone of it can.
        leaf = output.clone() if output.is_inference() else output.detach()
        return leaf.requires_grad_(self._gradient)


def _quantize_like(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Quantizes rows with the type, scale and zero point of the quantized tensor ``like``."""
    return torch.quantize_per_tensor(rows, like.q_scale(), like.q_zero_point(), like.dtype)
