"""The evidence: the result of one forward pass, from which a method computes its map."""

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
    """The result of one forward pass at one layer, with functions that make further passes on demand.

    Below, N is the number of images, K the number of scores per image, and M the number of variants of an
    image or activation.

    Attributes:
        model: the model.
        inputs: the inputs of the model.
        location: the layer.
        layer_output: the output of the layer in its own layout. It is part of the graph that leads to
            ``scores`` if the pass built a graph.
        output: the output of the model.
        scored: the scores to explain, with their target.
        shared: whether the evidence of other layers uses the same graph, which must then be kept.
        attached: whether the activation and the gradient are part of the graph of the model's parameters.
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
        """The images ``(N, C, *size)``."""
        return self.inputs.images

    @property
    def bound(self) -> Bound:
        """The target, with the predicted classes filled in from :attr:`output` where it names none."""
        return self.scored.bound

    @property
    def scores(self) -> torch.Tensor:
        """The scores y to explain, ``(N, K)``."""
        return self.scored.rows

    def score(self, output: Any) -> torch.Tensor:
        """Returns the scores ``(N, K)`` of another output for the N images."""
        return self.bound.score(output).reshape(len(self.x), -1)

    @cached_property
    def activation(self) -> torch.Tensor:
        """The activation A of the layer, ``(N, C, *spatial)``, in single precision or better.

        It is detached from any graph unless :attr:`attached` is set.
        """
        output = self.layer_output if self.attached else self.layer_output.detach()
        return maps.at_least_float32(self.location.layout.channels_first(output))

    @cached_property
    def gradient(self) -> torch.Tensor:
        """The gradient dy/dA of each score y, ``(N, K, C, *spatial)``, in single precision or better.

        It takes one backward pass per score, from the score to the layer. If only average pooling, linear
        layers, layer normalisation and ReLUs follow the layer, one backward pass computes up to 16 scores
        together; a user's backward hook in that part is then called once for all of them.

        Raises:
            ValueError: if the scores do not depend on the layer, if they depend only on its tokens outside
                the grid, or if the pass built no graph (the method has ``needs_gradient = False``).
        """
        layout = self.location.layout
        if not self.layer_output.requires_grad:
            expected = "a method with needs_gradient = True to look at the gradient"
            raise ValueError(checks.error_message("map", expected, "False"))
        keep, attached = self.shared or self.attached, self.attached
        raw = gradients(self.scores, self.layer_output, self.location.name, keep=keep, create_graph=attached)
        # A layout expects one batch dimension, so N and K are flattened to one while it is applied.
        flat = layout.channels_first(raw.flatten(0, 1))
        result = maps.at_least_float32(flat.unflatten(0, raw.shape[:2]))
        # The head of torchvision's untrained ViTs is all zeros: the gradient is zero at every token, which
        # says nothing about the layer.
        if layout.prefix + layout.suffix and raw.any():
            self.require_reach(result)
        return result

    def require_reach(self, effect: torch.Tensor) -> None:
        """Raises a ``ValueError`` if a layer has tokens outside its grid and none in the grid has an effect.

        Args:
            effect: the effect of each position on the score, such as the gradient, of any shape. It is only
                tested for an entry other than zero.
        """
        layout = self.location.layout
        if layout.prefix + layout.suffix and not effect.any():
            expected = "a layer whose positions reach the score"
            got = f"{self.location.name!r}, where only tokens outside the grid reach it"
            raise ValueError(checks.error_message("layer", expected, got, "name an earlier layer"))

    def outputs(self, activations: torch.Tensor) -> list[Any]:
        """Returns the outputs of the model for other activations of the layer, in the caller's grad mode.

        Args:
            activations: M activations for each of the N images, ``(M, N, C, *spatial)``. Tokens outside the
                grid keep their values.

        Returns:
            M outputs, each for the N images.
        """
        rows = activations.flatten(0, 1).to(self.layer_output.dtype)
        return self.outputs_of_rows(self.location.layout.restore(rows, self.layer_output.detach()))

    def outputs_of_rows(self, rows: torch.Tensor) -> list[Any]:
        """Like :meth:`outputs`, for activations in the layer's own layout, ``(M * N, ...)``."""
        if self._replay is not None:
            output = self._replay(rows)
        else:
            mode = torch.enable_grad if torch.is_grad_enabled() else torch.no_grad
            with Tap(self.model, self.location.name, grad_mode=mode, replacement=rows):
                output = self.run(repeat_batch(self.x, len(rows) // len(self.x)))
        return split(output, len(self.x), len(rows))

    @cached_property
    def _replay(self) -> Replay | None:
        """A replay of the part after the layer; ``None`` if its scores differ from the model's own."""
        # The dry run recorded two images, and the replay knows their shapes. The check takes a batch of
        # another size; otherwise a model whose result depends on that size would pass.
        times = 2 if len(self.x) != 1 else 3
        try:
            replay = Replay(self.model, self.inputs, self.location)
            with torch.no_grad():
                rows = repeat_batch(self.layer_output.detach(), times)
                outputs = split(replay(rows), len(self.x), len(rows))
                # Compare the numbers: a write through .data or NumPy leaves the tensor's version as it was.
                replay.head_writes_in_place = not torch.equal(
                    rows, repeat_batch(self.layer_output.detach(), times)
                )
                same = all(scores_agree(self.score(output), self.scores.detach()) for output in outputs)
        except Exception:  # the model does something that a stand-in cannot do: run the whole model instead
            return None
        return replay if same else None

    def rescore(self, activations: torch.Tensor) -> torch.Tensor:
        """Returns the scores ``(M, N, K)`` for other activations ``(M, N, C, *spatial)`` of the layer."""
        return torch.stack([self.score(output) for output in self.outputs(activations)])

    def rescore_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Like :meth:`rescore`, for activations in the layer's own layout, ``(M * N, ...)``."""
        return torch.stack([self.score(output) for output in self.outputs_of_rows(rows)])

    def editable_copies(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns M copies of the layer's output, to edit in place and rescore as often as you like.

        Args:
            count: the number M of copies.

        Returns:
            Two tensors in the same memory, the copies in the layer's own layout ``(M * N, ...)`` for
            :meth:`rescore_rows`, and the copies as activations ``(M, N, C, *spatial)`` to edit.
        """
        rows = repeat_batch(self.layer_output.detach(), count)
        return rows, self.location.layout.channels_first(rows).unflatten(0, (count, -1))

    def run(self, images: torch.Tensor) -> Any:
        """Returns the model's output for images ``(M * N, C, *size)``; repeats its other inputs M times."""
        return self.inputs.run(self.model, images)

    def outputs_of_images(self, images: torch.Tensor) -> list[Any]:
        """Returns M outputs of the model for images ``(M, N, C, *size)``, each for N of the images."""
        return split(self.run(images.flatten(0, 1)), len(self.x), images.shape[:2].numel())

    def at(self, images: torch.Tensor) -> "Evidence":
        """Runs the model on other images ``(N, C, *size)``; returns their evidence for the same target.

        The evidence has a gradient. If the target is the predicted class, it stays the class predicted for
        the original images.
        """
        inputs = Inputs.of(self.inputs.with_images(images))
        return gather(self.model, inputs, self.bound, [self.location], gradient=True)[0]

    def resize(self, to_resize: torch.Tensor) -> torch.Tensor:
        """Returns maps ``(..., *spatial)`` resized to the spatial size of the images, ``(..., *size)``."""
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
    """Runs the model once and returns the evidence at each location, in the same order.

    Args:
        model: the model, in the mode it should run in.
        inputs: the inputs of the model.
        target: the target to explain.
        locations: the layers.
        gradient: whether the method needs gradients with respect to the outputs of the layers.
        attached: whether outputs and scores stay in the graph of the model's parameters.

    Raises:
        ValueError: if a layer did not run exactly once, or if the target does not fit the output.
        TypeError: if the output of a layer is not one floating-point tensor, or if the target or the output
            has another type than expected.
    """
    names, x = [location.name for location in locations], inputs.images

    def run(grad_mode: Callable[[], AbstractContextManager[None]]) -> list[Evidence]:
        with Tap(model, *names, gradient=gradient, grad_mode=grad_mode, attached=attached) as tap:
            output = inputs.run(model, x)
            layer_outputs = [tap.output(name) for name in names]
            scored = Scores.of(target, output, len(x))
        shared = len(names) > 1
        return [
            Evidence(model, inputs, location, layer_output, output, scored, shared, attached)
            for location, layer_output in zip(locations, layer_outputs, strict=True)
        ]

    if attached:
        with math_attention():  # a loss on the map needs second derivatives
            return run(torch.enable_grad)
    found = run(torch.no_grad)
    if gradient and not found[0].scores.requires_grad:
        # The model runs the layer inside a no_grad block of its own. The end of that block switched back to
        # our no_grad, so that the rest built no graph. Run again with gradients enabled from the start.
        found = run(torch.enable_grad)
    return found
