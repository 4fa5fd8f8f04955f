"""The call that all methods share: tap, one pass, target, result."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks
from camkit._tools.nested import detach_all
from camkit.layers.dryrun import DryRun
from camkit.layers.layouts import Layout, as_layout
from camkit.layers.location import Location, locate
from camkit.layers.search import find_for_gradient
from camkit.methods.base import Explanation, Method
from camkit.model.inputs import Inputs
from camkit.model.modules import layer_name, modules_of, require_floats
from camkit.passes.evidence import Evidence, gather
from camkit.targets.binding import Target

#: What ``layer=`` takes: a layer by name or as the module, several of them, or nothing.
Layer = str | nn.Module | Sequence[str | nn.Module] | None
# Input shapes for which an explainer remembers its dry run.
_KEPT = 16


@dataclass(eq=False)
class Explainer(Method):
    """Runs a model and makes a map of what a method reads off that pass, or asks of it in others.

    A method is a subclass with one pure function, :meth:`map`, and its hyperparameters as fields. The model
    is left exactly as it was found, also when something raises: it runs in evaluation mode, whatever mode
    it is in, and gets its mode back.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module, or several; found by a dry run if not
            given.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``
            (LayerCAM's).
        layout: how the named layer's output reads: ``"channels_first"``, ``"channels_last"`` or a
            :class:`camkit.Layout`; the dry run tells if not given.
        differentiable: whether maps and output keep their graph to the model's parameters, for losses on
            maps. The call is then the forward pass of a training step: it runs in the mode that the model is
            in, with whatever that does to statistics and the random state. Methods with ``keeps_graph`` can.

    Raises:
        ValueError: if the model has no such layer.
        TypeError: for a model or a layer of another kind.
    """

    # Whether the first pass makes the graph for that, and not one of the method's own.
    gradient_in_first_pass: ClassVar[bool] = True

    model: nn.Module = field(repr=False)
    layer: Layer = None
    _: KW_ONLY
    fuse: str = "mean"
    layout: str | Layout | None = None
    differentiable: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.model)
        checks.one_of("fuse", self.fuse, maps.FUSIONS)
        several = isinstance(self.layer, list | tuple)
        named: Sequence[Any] = self.layer if isinstance(self.layer, list | tuple) else [self.layer]
        self._names = [layer_name(self.model, one) for one in named if several or one is not None]
        if len(set(self._names)) < len(self._names) or (several and not self._names):
            raise ValueError(
                checks.error_message("layer", "one layer, or several different ones", self._names)
            )
        self.layer = tuple(self._names) if several else self._names[0] if self._names else None
        if self.differentiable and not self.keeps_graph:
            hint = "methods with keeps_graph, such as camkit.GradCAM, have maps to train through"
            raise ValueError(
                checks.error_message("differentiable", f"False for {type(self).__name__}", True, hint)
            )
        self._layout = None if self.layout is None else as_layout(self.layout)
        if self._layout is not None and not self._names:
            raise ValueError(checks.error_message("layout", "layer= with it, whose layout it is", "no layer"))
        self._locations: dict[Hashable, tuple[Location, ...]] = {}

    @abstractmethod
    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``."""

    def map_each(self, evidences: Sequence[Evidence]) -> list[torch.Tensor]:
        """The raw maps of each layer."""
        return [self.map(evidence) for evidence in evidences]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The maps of several layers, the shallowest first, as one."""
        return maps.fuse(parts, self.fuse)

    def find(self, dry: DryRun) -> Sequence[Location]:
        """The layers that this method explains if none is named."""
        return [find_for_gradient(dry)]

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Runs the model once, and turns that pass into a map."""
        size, attached = inputs.size, self.differentiable
        gradient = attached or (self.needs_gradient and self.gradient_in_first_pass)
        locations = self._locate(inputs)
        evidences = gather(self.model, inputs, target, locations, gradient=gradient, attached=attached)
        with torch.set_grad_enabled(attached):
            parts = self.map_each(evidences)
            self._check(parts, evidences)
            joined = self.join(parts)
        output = evidences[0].output if attached else detach_all(evidences[0].output)

        def explained(part: torch.Tensor, layer: str) -> Explanation:
            part = part if attached else part.detach()
            return Explanation.of(part, output, evidences[0].scored, layer, size)

        names = tuple(evidence.location.name for evidence in evidences)
        if len(names) == 1:
            return explained(joined, names[0])
        each = tuple(explained(part, name) for part, name in zip(parts, names, strict=True))
        return replace(explained(joined, ", ".join(names)), parts=each)

    def _check(self, parts: Sequence[torch.Tensor], evidences: Sequence[Evidence]) -> None:
        """Raise unless a method's maps are what :meth:`map` promises."""
        for part, evidence in zip(parts, evidences, strict=True):
            count, dims = evidence.scores.shape, evidence.x.ndim - 2
            if part.shape[:2] != count or part.ndim != dims + 2:
                expected = f"maps {checks.shape_of(count)} x {dims} spatial dimensions"
                got = f"{checks.shape_of(part)} from {type(self).__name__}"
                raise ValueError(checks.error_message("map", expected, got))

    def _locate(self, inputs: Inputs) -> tuple[Location, ...]:
        # Two images, so that no dimension of length one is taken for the batch. The modules are in the key:
        # a user may have given the model another head since.
        shape = (2, *inputs.images.shape[1:])
        key = (shape, inputs.signature(), tuple(map(id, modules_of(self.model))))
        if key not in self._locations:
            if len(self._locations) >= _KEPT:
                self._locations.clear()
            if self.needs_gradient:
                require_floats(self.model)
            dry = DryRun.of(self.model, shape, inputs, self._names)
            found = [locate(dry, name, self._layout) for name in self._names] or self.find(dry)
            self._locations[key] = tuple(sorted(found, key=lambda location: location.value))
        return self._locations[key]
