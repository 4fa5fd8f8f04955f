"""What one forward pass gives a method."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks
from camkit._tools.nested import split
from camkit.backward.gradients import gradients
from camkit.layers.location import Location
from camkit.model.inputs import Inputs
from camkit.model.state import math_attention
from camkit.passes.replay import Replay, repeat_batch, scores_agree
from camkit.passes.tap import Tap
from camkit.targets.binding import Bound, Scores, Target


@dataclass
class Evidence:
    """What one forward pass gives a method at one layer, and what other passes would.

    N images, K scores for each.

    Attributes:
        model: the model.
        inputs: what it is called with.
        location: the layer that was tapped.
        layer_output: the layer's output in its own layout, in the graph that leads to ``scores`` if there is one.
        output: the model's output.
        scored: the scores that are explained, with their target.
        shared: whether other layers' evidence comes from the same graph.
        attached: whether the activation and the gradient are in the graph of the model's parameters.
    """

    model: nn.Module
    inputs: Inputs
    location: Location
    layer_output: torch.Tensor
    output: Any
    scored: Scores
    shared: bool
    attached: bool

    @property
    def x(self) -> torch.Tensor:
        """The images, ``(N, C, *size)``."""
        return self.inputs.images

    @property
    def bound(self) -> Bound:
        """The target, with everything settled by :attr:`output`."""
        return self.scored.bound

    @property
    def scores(self) -> torch.Tensor:
        """The scores that are explained, y, ``(N, K)``."""
        return self.scored.rows

    def score(self, output: Any) -> torch.Tensor:
        """The scores ``(N, K)`` of an output for the same images."""
        return self.bound.score(output).reshape(len(self.x), -1)

    @cached_property
    def activation(self) -> torch.Tensor:
        """A, ``(N, C, *spatial)``, in single precision or better; outside any graph, if not attached."""
        leaf = self.layer_output if self.attached else self.layer_output.detach()
        return maps.at_least_float32(self.location.layout.channels_first(leaf))

    @cached_property
    def gradient(self) -> torch.Tensor:
        """dy/dA for each score y, ``(N, K, C, *spatial)``, in single precision or better.

        One backward pass a score, down to the layer; or one for many, if average pooling, linear layers and
        ReLUs are all that follows: hooks of the user's on the way see them together then.

        Raises:
            ValueError: if the scores do not depend on the layer, or on its tokens beside the grid only.
        """
        layout = self.location.layout
        if not self.layer_output.requires_grad:
            expected = "a method with needs_gradient = True to look at the gradient"
            raise ValueError(checks.error_message("map", expected, "False"))
        keep, attached = self.shared or self.attached, self.attached
        raw = gradients(self.scores, self.layer_output, self.location.name, keep=keep, create_graph=attached)
        count, targets = raw.shape[:2]
        flat = layout.channels_first(raw.flatten(0, 1))
        result = maps.at_least_float32(flat.reshape(count, targets, *flat.shape[1:]))
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
            raise ValueError(checks.error_message("layer", expected, got, "an earlier one serves"))

    def outputs(self, activations: torch.Tensor) -> list[Any]:
        """The model's outputs with other activations at the layer, in the caller's grad mode.

        Args:
            activations: M in the place of each image's, ``(M, N, C, *spatial)``.

        Returns:
            M outputs for the N images.
        """
        rows = activations.flatten(0, 1).to(self.layer_output.dtype)
        return self.outputs_of_rows(self.location.layout.restore(rows, self.layer_output.detach()))

    def outputs_of_rows(self, rows: torch.Tensor) -> list[Any]:
        """As :meth:`outputs`, for activations in the layer's own layout, ``(M * N, ...)``."""
        if self._replay is not None:
            output = self._replay(rows)
        else:
            mode = torch.enable_grad if torch.is_grad_enabled() else torch.no_grad
            with Tap(self.model, self.location.name, grad_mode=mode, replacement=rows):
                output = self.run(repeat_batch(self.x, len(rows) // len(self.x)))
        return split(output, len(self.x), len(rows))

    @cached_property
    def _replay(self) -> Replay | None:
        """What runs only what comes after the layer, if it gives the model's own scores."""
        times = 2 if len(self.x) != 1 else 3  # another batch than the dry run's, whose shapes it knows
        try:
            replay = Replay(self.model, self.inputs, self.location)
            with torch.no_grad():
                rows = repeat_batch(self.layer_output.detach(), times)
                outputs = split(replay(rows), len(self.x), len(rows))
                # By its numbers, for what is done by way of .data or NumPy leaves no trace.
                replay.head_writes_in_place = not torch.equal(
                    rows, repeat_batch(self.layer_output.detach(), times)
                )
                same = all(scores_agree(self.score(output), self.scores.detach()) for output in outputs)
        except Exception:  # whatever it is that this model cannot do without: the whole model can
            return None
        return replay if same else None

    def rescore(self, activations: torch.Tensor) -> torch.Tensor:
        """The scores ``(M, N, K)`` with other activations ``(M, N, C, *spatial)`` at the layer."""
        return torch.stack([self.score(output) for output in self.outputs(activations)])

    def rescore_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """As :meth:`rescore`, for activations in the layer's own layout, ``(M * N, ...)``."""
        return torch.stack([self.score(output) for output in self.outputs_of_rows(rows)])

    def editable_copies(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output M times over, to be edited in place and rescored again and again.

        Args:
            count: M.

        Returns:
            The rows for :meth:`rescore_rows`, and the same memory as activations ``(M, N, C, *spatial)``.
        """
        rows = repeat_batch(self.layer_output.detach(), count)
        return rows, self.location.layout.channels_first(rows).unflatten(0, (count, -1))

    def run(self, images: torch.Tensor) -> Any:
        """The model's output for other images, several times the batch at most."""
        return self.inputs.run(self.model, images)

    def outputs_of_images(self, images: torch.Tensor) -> list[Any]:
        """The model's M outputs for others in the place of the N images, ``(M, N, C, *size)``."""
        return split(self.run(images.flatten(0, 1)), len(self.x), images.shape[:2].numel())

    def at(self, images: torch.Tensor) -> "Evidence":
        """The evidence on the same target at other images of that shape, with a gradient."""
        inputs = Inputs.of(self.inputs.with_images(images))
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

    def run(grad_mode: Callable[[], AbstractContextManager[None]]) -> list[Evidence]:
        with Tap(model, *names, gradient=gradient, grad_mode=grad_mode, attached=attached) as tap:
            output = inputs.run(model, x)
            leaves = [tap.output(name) for name in names]
            scored = Scores.of(target, output, len(x))
        shared = len(names) > 1
        return [
            Evidence(model, inputs, location, leaf, output, scored, shared, attached)
            for location, leaf in zip(locations, leaves, strict=True)
        ]

    if attached:
        with math_attention():
            return run(torch.enable_grad)
    found = run(torch.no_grad)
    if gradient and not found[0].scores.requires_grad:
        # The model left a no_grad of its own after the layer, and fell back to ours.
        found = run(torch.enable_grad)
    return found
