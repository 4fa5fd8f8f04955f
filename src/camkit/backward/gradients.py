"""Gradients of several scores for each image."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch

from camkit._tools import checks

# The most scores whose gradients one backward pass computes together. It bounds the memory, since each score
# has its own copy of every gradient on the way.
_MOST_TOGETHER = 16
# Autograd nodes that are known to have a batched backward pass, which computes several gradients together and
# reads each weight only once. Most networks have no other nodes between the last layer and the logits.
_BATCHABLE = {"AdaptiveAvgPool2D", "Addmm", "AsStrided", "Clone", "Gather", "Mean", "Mm", "NativeLayerNorm"}
_BATCHABLE |= {"Permute", "Relu", "Select", "Squeeze", "T", "Unsqueeze", "UnsafeView", "View"}


def gradients(
    scores: torch.Tensor, wrt: torch.Tensor, name: str = "", *, keep: bool = False, create_graph: bool = False
) -> torch.Tensor:
    """Returns the gradient of each score with respect to a tensor.

    Args:
        scores: the scores, ``(N, K)``.
        wrt: the output of a layer or the images, ``(N, ...)``.
        name: name of the layer, for the error message; empty for the images.
        keep: whether to keep the graph for further backward passes.
        create_graph: whether the gradient gets a graph of its own, to be differentiated again.

    Returns:
        The gradients, ``(N, K, ...)``.

    Raises:
        ValueError: if a score does not depend on ``wrt``.
    """
    count = scores.shape[1]
    backward: Callable[..., tuple[torch.Tensor | None, ...]] = partial(
        torch.autograd.grad, scores, wrt, create_graph=create_graph, allow_unused=True
    )

    def one_hot(some: range) -> torch.Tensor:
        # A new tensor for every pass, because a user's hook may change it in place.
        found = scores.new_zeros(len(some), *scores.shape)
        for place, k in enumerate(some):
            found[place, :, k] = 1
        return found

    def gradients_of(some: range) -> list[torch.Tensor | None]:
        if len(some) > 1:
            # A user's hook on the way may fail on batched gradients, for example if it reads numbers. Then
            # each score gets its own pass below, for which the graph has to be kept here.
            with suppress(RuntimeError):
                (together,) = backward(one_hot(some), retain_graph=True, is_grads_batched=True)
                return [None] if together is None else list(together)
        return [backward(one_hot(range(k, k + 1))[0], retain_graph=keep or k + 1 < count)[0] for k in some]

    each: list[torch.Tensor | None] = [None]
    if scores.requires_grad:
        size = _MOST_TOGETHER if count > 1 and not create_graph and _can_be_batched(scores) else 1
        each = [g for k in range(0, count, size) for g in gradients_of(range(k, min(k + size, count)))]
    found = [gradient for gradient in each if gradient is not None]
    if len(found) < count:
        source = f"layer {name!r}" if name else "the input"
        expected = f"a score that depends on {source} through a gradient"
        raise ValueError(checks.error_message("target", expected, "one that does not"))
    return torch.stack(found, 1)


def _can_be_batched(scores: torch.Tensor) -> bool:
    """Whether every autograd node behind the scores is known to have a batched backward pass."""
    # Anomaly mode reads the numbers of every gradient, which batched gradients do not allow.
    if torch.is_anomaly_enabled():
        return False
    nodes, seen = [scores.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # The names of torch's own nodes end in a number (MeanBackward1), those of users' functions do not.
        kind = re.fullmatch(r"(\w+)Backward\d", type(node).__name__)
        if type(node).__name__ != "AccumulateGrad" and (kind is None or kind[1] not in _BATCHABLE):
            return False
        nodes += [before for before, _ in node.next_functions]
    return True


def gradients_by_each(scores: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradient of each score with respect to each of several tensors.

    Args:
        scores: the scores, ``(N, K)``.
        leaves: the tensors, the input first.

    Returns:
        For each tensor its gradients ``(N, K, ...)``, outside any graph; zeros for a score that does not
        depend on it.

    Raises:
        ValueError: if a score does not depend on the input.
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
