"""LeGrad, which looks at the attention of a transformer."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camkit import _checks, layers, maps
from camkit.dryrun import DryRun
from camkit.evidence import Evidence, gradients
from camkit.explainer import Explainer
from camkit.layers import Location


class LeGrad(Explainer):
    r"""LeGrad: how the score of each block's tokens depends on the block's attention.

    .. math::
        E^l_j = \operatorname{mean}_{h, i} \operatorname{ReLU}
        \Big(\frac{\partial s^l}{\partial a^l_{h i j}}\Big), \qquad
        M = \operatorname{mean}_l E^l

    with :math:`a^l_{hij}` how much, in head h of block l, token i attends to token j, and :math:`s^l` the
    score that the model's head gives to the mean token of block l. The map has the positions of the patches
    j.

    Args:
        model: a transformer of blocks with one attention over all tokens in each.
        layer: the blocks, or one; all if not given.

    Raises:
        ValueError: at the call, if a block is none such.

    Departs from the paper: nothing, before the map is normalised. A head that reads one token reads the mean
    token, as in the authors' program.

    References:
        Bousselham et al., *LeGrad: An Explainability Method for Vision Transformers via Feature Formation
        Sensitivity*, 2024, equations 5 to 9.
    """

    formula = r"\mathrm{mean}_l\, \mathrm{mean}_{h, i}\, \mathrm{ReLU}(\partial s^l / \partial a^l_{h i j})"
    paper = "Bousselham et al., 2024"
    passes = "2 forward; of each block the head, forward and backward"
    needs_gradient = True
    taps_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.one_of("fuse", self.fuse, ("mean",))

    def find(self, dry: DryRun) -> list[Location]:
        """Every block."""
        blocks = layers.attention_blocks(dry)
        if not blocks:
            expected = "a transformer of blocks with one attention over all tokens in each"
            raise ValueError(_checks.complaint("model", expected, dry.kind, "layer= names a block"))
        return blocks

    def map(self, evidence: Evidence) -> torch.Tensor:
        """One block's E, ``(N, K, *spatial)``, never negative."""
        return self.map_each([evidence])[0]

    def map_each(self, evidences: Sequence[Evidence]) -> list[torch.Tensor]:
        """Each block's E, of one pass that keeps every block's attention."""
        first, places = evidences[0], [evidence.location for evidence in evidences]
        last = max([*places, *layers.attention_blocks(first.location.dry)], key=lambda place: place.value)
        names = dict.fromkeys([*(place.name for place in places), last.name])
        with _watched(first.model, list(names), len(first.x)) as found:
            first.run(first.x)
        after_all = replace(first, location=last, leaf=found[last.name][1])
        return [_sensitivity(after_all, place, *found[place.name]) for place in places]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean over the blocks."""
        return torch.stack([*parts]).mean(0)


def _sensitivity(
    after_all: Evidence, place: Location, attentions: list[torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    """E of one block, of its attention and the tokens that it gives."""
    length = tokens.shape[1]
    if len(attentions) != 1 or attentions[0].shape[-1] != length:
        shapes = ", ".join(_checks.shape_of(a.shape[-2:]) for a in attentions) or "none"
        expected = f"a block with one attention over its {length} tokens"
        raise ValueError(_checks.complaint("layer", expected, f"{place.name!r} with {shapes}"))
    with torch.enable_grad():
        mean = tokens.mean(1, keepdim=True).expand_as(tokens)
        scores = after_all.score(*after_all.outputs_of_rows(mean))
    each = gradients(scores, attentions[0], place.name, keep=True)  # (N, K, heads, L, L)
    columns = maps.wide(each).relu().mean((2, 3)).reshape(-1, length, 1)
    return place.layout.channels_first(columns).reshape(*scores.shape, *place.size)


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str], images: int
) -> Iterator[dict[str, tuple[list[torch.Tensor], torch.Tensor]]]:
    """Keeps, during a pass, each block's attentions as leaves ``(N, heads, L, L)`` and its tokens by them."""
    found: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
    attention, thread = _Attention(images), threading.get_ident()

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


class _Attention(TorchFunctionMode):
    """Computes attention in the open, and keeps its weights as leaves where there is a gradient."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.leaves: list[torch.Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "multi_head_attention_forward":
            return self._attend_with_heads(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)[0]
        result = func(*args, **kwargs)
        is_attention = name == "softmax" and result.ndim > 2 and result.shape[-1] == result.shape[-2]
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
            raise ValueError(_checks.complaint("model", expected, "another"))
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
