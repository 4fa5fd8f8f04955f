"""A forward pass that keeps the attention of each block."""

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
    model: nn.Module, names: Sequence[str], images: int
) -> Iterator[dict[str, tuple[list[torch.Tensor], torch.Tensor]]]:
    """Keeps, during a pass, each block's attentions as leaves ``(N, heads, L, L)`` and its tokens by them."""
    found: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
    attention, thread = _AttentionRecorder(images), threading.get_ident()

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            torch.set_grad_enabled(True)
            attention.leaves = []

    def leave(name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
            if threading.get_ident() != thread:
                return None
            torch.set_grad_enabled(False)
            found[name] = attention.leaves, output
            return output.detach()

        return hook

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(enter))
        handles.append(block.register_forward_hook(leave(name), prepend=True))
    try:
        with torch.no_grad(), attention:
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _AttentionRecorder(FunctionMode):
    """Computes attention in the open, and keeps its weights as leaves where there is a gradient."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.leaves: list[torch.Tensor] = []

    def meet(self, call: Call) -> Any:
        if call.name == "multi_head_attention_forward":
            return self._attend_with_heads(*call.args, **call.kwargs)
        if call.name == "scaled_dot_product_attention":
            return self._attend(*call.args, **call.kwargs)[0]
        result = call.run()
        is_attention = call.name == "softmax" and result.ndim > 2 and result.shape[-1] == result.shape[-2]
        return self._kept(result) if is_attention else result

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
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if is_bool else logits + attn_mask
        weights = self._kept(logits.softmax(-1))
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
        if weight is None or bias_k is not None or add_zero_attn or key_padding_mask is not None:
            expected = "attention of tokens to tokens with one projection, and no padding"
            raise ValueError(checks.error_message("model", expected, "another"))
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(tokens, w, b).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)  # (N, heads, L, E / heads)
            for tokens, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )
        found, weights = self._attend(q, k, v, attn_mask)
        joined = F.linear(found.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
        return joined, weights.mean(1) if need_weights else None

    def _kept(self, weights: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return weights
        heads = weights.detach().reshape(self.images, -1, *weights.shape[-2:])
        self.leaves.append(heads.requires_grad_())
        return heads.reshape(weights.shape)
