"""What one forward pass gives a method."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from camkit import _checks, _process, maps
from camkit._nested import split
from camkit.inputs import Inputs
from camkit.layers import Location
from camkit.replay import Replay, repeat
from camkit.tap import Tap
from camkit.targets import Bound, Target, bind


@dataclass
class Evidence:
    """What one forward pass gives a method at one layer, and what other passes would.

    N images, K scores for each.

    Attributes:
        model: the model.
        inputs: what it is called with.
        location: the layer that was tapped.
        leaf: the layer's output in its own layout, in the graph that leads to ``scores`` if there is one.
        output: the model's output.
        bound: the target.
        scores: what is explained, y, ``(N, K)``.
        single: whether one score per image was asked for, so that the maps have no dimension K.
        shared: whether other layers' evidence comes from the same graph.
        attached: whether the activation and the gradient are in the graph of the model's parameters.
    """

    model: nn.Module
    inputs: Inputs
    location: Location
    leaf: torch.Tensor
    output: Any
    bound: Bound
    scores: torch.Tensor
    single: bool
    shared: bool
    attached: bool

    @property
    def x(self) -> torch.Tensor:
        """The images, ``(N, C, *size)``."""
        return self.inputs.images

    def score(self, output: Any) -> torch.Tensor:
        """The scores ``(N, K)`` of an output for the same images."""
        return self.bound.score(output).reshape(len(self.x), -1)

    @cached_property
    def activation(self) -> torch.Tensor:
        """A, ``(N, C, *spatial)``, in single precision or better; outside any graph, if not attached."""
        leaf = self.leaf if self.attached else self.leaf.detach()
        return maps.wide(self.location.layout.channels_first(leaf))

    @cached_property
    def gradient(self) -> torch.Tensor:
        """dy/dA for each score y, ``(N, K, C, *spatial)``, in single precision or better.

        One backward pass a score, down to the layer; or one for many, if average pooling, linear layers and
        ReLUs are all that follows: hooks of the user's on the way see them together then.

        Raises:
            ValueError: if the scores do not depend on the layer, or on its tokens beside the grid only.
        """
        layout = self.location.layout
        if not self.leaf.requires_grad:
            expected = "a method with needs_gradient = True to look at the gradient"
            raise ValueError(_checks.complaint("map", expected, "False"))
        keep, attached = self.shared or self.attached, self.attached
        raw = gradients(self.scores, self.leaf, self.location.name, keep=keep, create_graph=attached)
        count, targets = raw.shape[:2]
        flat = layout.channels_first(raw.flatten(0, 1))
        result = maps.wide(flat.reshape(count, targets, *flat.shape[1:]))
        # A head of zeros, as torchvision's untrained ViTs have, has no gradient anywhere.
        if layout.prefix + layout.suffix and raw.any():
            self.require_reach(result)
        return result

    def require_reach(self, effect: torch.Tensor) -> None:
        """Raise a ``ValueError`` if nothing of the grid has an effect, and there are tokens beside it."""
        layout = self.location.layout
        if layout.prefix + layout.suffix and not effect.any():
            expected = "a layer whose positions reach the score"
            got = f"{self.location.name!r}, of which only the tokens beside the grid do"
            raise ValueError(_checks.complaint("layer", expected, got, "an earlier one serves"))

    def outputs(self, activations: torch.Tensor) -> list[Any]:
        """The model's outputs with other activations at the layer, in the caller's grad mode.

        Args:
            activations: M in the place of each image's, ``(M, N, C, *spatial)``.

        Returns:
            M outputs for the N images.
        """
        rows = activations.flatten(0, 1).to(self.leaf.dtype)
        return self.outputs_of_rows(self.location.layout.restore(rows, self.leaf.detach()))

    def outputs_of_rows(self, rows: torch.Tensor) -> list[Any]:
        """As :meth:`outputs`, for activations in the layer's own layout, ``(M * N, ...)``."""
        if self._replay is not None:
            output = self._replay(rows)
        else:
            mode = torch.enable_grad if torch.is_grad_enabled() else torch.no_grad
            with Tap(self.model, self.location.name, before=mode, answer=rows):
                output = self.run(repeat(self.x, len(rows) // len(self.x)))
        return split(output, len(self.x), len(rows))

    @cached_property
    def _replay(self) -> Replay | None:
        """What runs only what comes after the layer, if it gives the model's own scores."""
        times = 2 if len(self.x) != 1 else 3  # another batch than the dry run's, whose shapes it knows
        try:
            replay = Replay(self.model, self.inputs, self.location)
            with torch.no_grad():
                rows = repeat(self.leaf.detach(), times)
                outputs = split(replay(rows), len(self.x), len(rows))
                # By its numbers, for what is done by way of .data or NumPy leaves no trace.
                replay.copies = not torch.equal(rows, repeat(self.leaf.detach(), times))
                same = all(_agree(self.score(output), self.scores.detach()) for output in outputs)
        except Exception:  # whatever it is that this model cannot do without: the whole model can
            return None
        return replay if same else None

    def rescore(self, activations: torch.Tensor) -> torch.Tensor:
        """The scores ``(M, N, K)`` with other activations ``(M, N, C, *spatial)`` at the layer."""
        return torch.stack([self.score(output) for output in self.outputs(activations)])

    def rescore_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """As :meth:`rescore`, for activations in the layer's own layout, ``(M * N, ...)``."""
        return torch.stack([self.score(output) for output in self.outputs_of_rows(rows)])

    def copies(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output M times over, to be edited in place and rescored again and again.

        Args:
            count: M.

        Returns:
            The rows for :meth:`rescore_rows`, and the same memory as activations ``(M, N, C, *spatial)``.
        """
        rows = repeat(self.leaf.detach(), count)
        return rows, self.location.layout.channels_first(rows).unflatten(0, (count, -1))

    def run(self, images: torch.Tensor) -> Any:
        """The model's output for other images, several times the batch at most."""
        return self.inputs.run(self.model, images)

    def outputs_of_images(self, images: torch.Tensor) -> list[Any]:
        """The model's M outputs for others in the place of the N images, ``(M, N, C, *size)``."""
        return split(self.run(images.flatten(0, 1)), len(self.x), images.shape[:2].numel())

    def at(self, images: torch.Tensor) -> "Evidence":
        """The evidence on the same target at other images of that shape, with a gradient."""
        inputs = Inputs.of(self.inputs.holding(images))
        return gather(self.model, inputs, self.bound, [self.location], gradient=True)[0]

    def resize(self, to_resize: torch.Tensor) -> torch.Tensor:
        """Maps ``(..., *spatial)`` at the input's size."""
        return maps.resize(to_resize, self.x.shape[2:])


def gather(
    model: nn.Module,
    inputs: Inputs,
    target: Target | Bound,
    locations: Sequence[Location],
    *,
    gradient: bool,
    attached: bool = False,
) -> list[Evidence]:
    """Runs the model once, and gives the evidence at each location.

    Args:
        model: the model, in evaluation mode.
        inputs: what it is called with.
        target: what is explained.
        locations: the layers to tap.
        gradient: whether there will be need of a gradient by their outputs.
        attached: whether all is to stay in the graph of the model's parameters.
    """
    names, x = [location.name for location in locations], inputs.images

    def run(before: Callable[[], AbstractContextManager[None]]) -> list[Evidence]:
        with Tap(model, *names, gradient=gradient, before=before, attached=attached) as tap:
            output = inputs.run(model, x)
            leaves = [tap.output(name) for name in names]
            bound = bind(target, output, len(x))
            scores = bound.score(output)
            rows = scores.reshape(len(x), -1)
        single, shared = scores.ndim == 1, len(names) > 1
        return [
            Evidence(model, inputs, location, leaf, output, bound, rows, single, shared, attached)
            for location, leaf in zip(locations, leaves, strict=True)
        ]

    if attached:
        with _process.open_attention():
            return run(torch.enable_grad)
    found = run(torch.no_grad)
    if gradient and not found[0].scores.requires_grad:
        # The model left a no_grad of its own after the layer, and fell back to ours.
        found = run(torch.enable_grad)
    return found


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
        raise ValueError(_checks.complaint("target", expected, "one that does not"))
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


def _agree(scores: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether scores are the same up to rounding; where in doubt, not."""
    if scores.shape != expected.shape or not torch.isfinite(expected).all():
        return False
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(scores, expected, rtol=eps**0.5, atol=eps**0.75 * expected.abs().max().item())
