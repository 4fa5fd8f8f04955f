"""Gradients of several scores."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch

from camkit._tools import checks


def gradients(
    scores: torch.Tensor, wrt: torch.Tensor, name: str = "", *, keep: bool = False, create_graph: bool = False
) -> torch.Tensor:
    """The gradient of each score ``(N, K)`` by a tensor ``(N, ...)``, as ``(N, K, ...)``.

    Args:
        scores: what to derive.
        wrt: by what: what a layer gives, or the input.
        name: that layer, for the message.
        keep: whether the graph is still needed afterwards.
        create_graph: whether the gradient is to be derived in its turn.

    Raises:
        ValueError: if the scores do not depend on it.
    """
    count = scores.shape[1]
    derive: Callable[..., tuple[torch.Tensor | None, ...]] = partial(
        torch.autograd.grad, scores, wrt, create_graph=create_graph, allow_unused=True
    )

    def starts(some: range) -> torch.Tensor:
        # New each time: a hook may edit them.
        found = scores.new_zeros(len(some), *scores.shape)
        for place, k in enumerate(some):
            found[place, :, k] = 1
        return found

    def derived(some: range) -> list[torch.Tensor | None]:
        if len(some) > 1:
            with suppress(RuntimeError):  # such as that of a user's hook on the way, which asks for numbers
                (together,) = derive(starts(some), retain_graph=True, is_grads_batched=True)
                return [None] if together is None else list(together)
        return [derive(starts(range(k, k + 1))[0], retain_graph=keep or k + 1 < count)[0] for k in some]

    each: list[torch.Tensor | None] = [None]
    if scores.requires_grad:
        size = _TOGETHER if count > 1 and not create_graph and _is_plain_head(scores) else 1
        each = [g for k in range(0, count, size) for g in derived(range(k, min(k + size, count)))]
    found = [gradient for gradient in each if gradient is not None]
    if len(found) < count:
        source = f"layer {name!r}" if name else "the input"
        expected = f"a score that depends on {source} through a gradient"
        raise ValueError(checks.error_message("target", expected, "one that does not"))
    return torch.stack(found, 1)


# So many scores are derived together at most, for the memory of what lies between.
_TOGETHER = 16
# What lies between the last layer and the logits of most networks: the gradients of several scores pass these
# together, which reads the weights once. Anything else might have no rule for that.
_PLAIN = {"AdaptiveAvgPool2D", "Addmm", "AsStrided", "Clone", "Gather", "Mean", "Mm", "NativeLayerNorm"}
_PLAIN |= {"Permute", "Relu", "Select", "Squeeze", "T", "Unsqueeze", "UnsafeView", "View"}


def _is_plain_head(scores: torch.Tensor) -> bool:
    """Whether all that leads to the scores is known to take the gradients of several at once."""
    if torch.is_anomaly_enabled():  # which looks at the numbers of each
        return False
    nodes, seen = [scores.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # torch's own have a number at the end, and a user's functions have not.
        kind = re.fullmatch(r"(\w+)Backward\d", type(node).__name__)
        if type(node).__name__ != "AccumulateGrad" and (kind is None or kind[1] not in _PLAIN):
            return False
        nodes += [before for before, _ in node.next_functions]
    return True


def gradients_by_each(scores: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of each score ``(N, K)`` by each of several tensors, as ``(N, K, ...)``.

    Args:
        scores: the scores.
        leaves: the tensors, the input first.

    Returns:
        For each tensor its gradients, outside any graph; zeros where no score depends on it.

    Raises:
        ValueError: if the scores do not depend on the input.
    """
    found: list[list[torch.Tensor]] = [[] for _ in leaves]
    for k in range(scores.shape[1]):
        start = torch.zeros_like(scores)
        start[:, k] = 1
        each: tuple[torch.Tensor | None, ...] = (None,)
        if scores.requires_grad:
            each = torch.autograd.grad(scores, leaves, start, retain_graph=True, allow_unused=True)
        if each[0] is None:
            expected = "a score that depends on the input through a gradient"
            raise ValueError(checks.error_message("target", expected, "one that does not"))
        for made, gradient, leaf in zip(found, each, leaves, strict=True):
            made.append(torch.zeros_like(leaf) if gradient is None else gradient)
    return [torch.stack(made, 1).detach() for made in found]
