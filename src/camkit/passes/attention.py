"""Recording the attention weights of transformer blocks during a forward pass."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from camkit._tools import checks
from camkit.functions import Call, FunctionMode


@contextmanager
def recorded_attention(
    model: nn.Module, names: Sequence[str], image_count: int
) -> Iterator[dict[str, tuple[list[torch.Tensor], torch.Tensor]]]:
    """Records the attention weights and the tokens of blocks while its ``with`` block runs the model.

    Each block gets a graph of its own, which starts at its attention weights and ends at its tokens. A
    gradient of these tokens with respect to the weights therefore never leaves the block.

    Args:
        model: the model that will run.
        names: dotted names of the blocks; none lies inside another.
        image_count: the number N of images.

    Yields:
        A dictionary that the pass fills. It maps the name of a block to its attention weights, one leaf
        ``(N, heads, L, L)`` for each attention in it, and to its output tokens ``(N, L, C)``.
    """
    found: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
    recorder, thread = _AttentionRecorder(image_count), threading.get_ident()

    def start_graph(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # Another thread may run the same model at the same time. Its pass is not ours to record.
        if threading.get_ident() == thread:
            torch.set_grad_enabled(True)
            recorder.leaves = []

    def end_graph_of(name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
            if threading.get_ident() != thread:
                return None
            torch.set_grad_enabled(False)
            found[name] = recorder.leaves, output
            # Detach the output; otherwise the graph of the next block would include this one.
            return output.detach()

        return hook

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(start_graph))
        # Put our hook first, so that we record the output before the model's own hooks change it.
        handles.append(block.register_forward_hook(end_graph_of(name), prepend=True))
    try:
        with torch.no_grad(), recorder:  # no_grad also restores the grad mode that the hooks set
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _AttentionRecorder(FunctionMode):
    """Computes attention step by step, and records its weights as leaves while gradients are enabled.

    torch's fused attention never returns its weights, so the formula is computed instead.
    """

    def __init__(self, image_count: int) -> None:
        super().__init__()
        self.image_count = image_count
        self.leaves: list[torch.Tensor] = []

    def meet(self, call: Call) -> Any:
        """Returns the result of a call, computed from the recorded weights if the call is attention."""
        if call.name == "multi_head_attention_forward":
            return self._attend_with_heads(*call.args, **call.kwargs)
        if call.name == "scaled_dot_product_attention":
            return self._attend(*call.args, **call.kwargs)[0]
        result = call.run()
        # In attention that a model writes out itself, a softmax has a result of as many rows as columns.
        is_attention = call.name == "softmax" and result.ndim > 2 and result.shape[-1] == result.shape[-2]
        return self._cut_at_leaf(result) if is_attention else result

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the result of ``scaled_dot_product_attention``, and the weights ``(..., L, L)``."""
        # The model is in evaluation mode, so that dropout_p has no effect.
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
        if attn_mask is not None:
            # A bool mask is true where a token may attend; a mask of floats is added.
            is_bool = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if is_bool else logits + attn_mask
        weights = self._cut_at_leaf(logits.softmax(-1))
        return weights @ value, weights

    def _attend_with_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        embed_dim: int,
        heads: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        bias_k: torch.Tensor | None,
        bias_v: torch.Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_weight: torch.Tensor,
        out_bias: torch.Tensor | None,
        need_weights: bool = True,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the result of ``multi_head_attention_forward``; the parameters are its own, in its order.

        Raises:
            ValueError: if the call uses an option that the formula here does not cover.
        """
        if weight is None or bias_k is not None or add_zero_attn or key_padding_mask is not None:
            expected = "attention with one input projection, without padding and without added tokens"
            raise ValueError(checks.error_message("model", expected, "attention of another kind"))
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)  # (N, heads, L, E / heads)
            for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )
        per_head, weights = self._attend(q, k, v, attn_mask)
        # nn.MultiheadAttention passes the tokens as (L, N, E) and expects them back in that shape.
        tokens = F.linear(per_head.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
        return tokens, weights.mean(1) if need_weights else None

    def _cut_at_leaf(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns the same weights, computed from a new leaf ``(N, heads, L, L)`` that is recorded."""
        if not torch.is_grad_enabled():  # outside the blocks to record
            return weights
        leaf = weights.detach().reshape(self.image_count, -1, *weights.shape[-2:]).requires_grad_()
        self.leaves.append(leaf)
        return leaf.reshape(weights.shape)
