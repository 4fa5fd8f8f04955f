"""The base class of methods that make a map at a layer."""

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
from camkit.model.modules import layer_name, require_floats
from camkit.passes.evidence import Evidence, gather
from camkit.targets.binding import Target

#: The types of ``layer=``: a layer by name or as the module, several of them, or ``None``.
Layer = str | nn.Module | Sequence[str | nn.Module] | None
# An explainer remembers the locations of its layers for this many input shapes.
_MAX_SHAPES = 16


@dataclass(eq=False)
class Explainer(Method):
    """Base class of the methods that make a map at a layer.

    It runs the model once and turns that pass, plus any further passes the method asks for, into a map. A
    method is a subclass that implements :meth:`map` and has its settings as dataclass fields.

    The model runs in evaluation mode and is left exactly as it was found, even if an error is raised. The
    only exception is ``differentiable=True``, described below.

    Args:
        model: any :class:`torch.nn.Module`. A model inside ``torch.compile``, ``DataParallel`` or
            ``DistributedDataParallel`` is taken out of it.
        layer: the layer to make maps at, by name or as the module, or several layers. By default a dry run
            finds the last spatial layer whose positions all affect the output. In a model that reads only
            its class token, this is the input of the last attention.
        fuse: how to combine the maps of several layers into one: ``"mean"``, ``"product"`` or
            ``"hierarchical"``, which is LayerCAM's fusion. Before that, each map is divided by its largest
            magnitude and resized to the finest resolution.
        layout: the layout of the named layer's output: ``"channels_first"``, ``"channels_last"`` or a
            :class:`camkit.Layout`. By default the dry run determines it.
        differentiable: whether the maps and the output keep their graph to the model's parameters, so that
            you can train with a loss on the maps. The call is then the forward pass of a training step: it
            runs in the model's own mode, and may update batch statistics and the random state. Only methods
            with ``keeps_graph`` support it.

    Raises:
        ValueError: if the model has no such layer, or if another argument has an unsupported value.
        TypeError: if an argument has an unsupported type.
    """

    # Whether the first pass records the graph for Evidence.gradient. Methods that build a graph of their own
    # in a later pass set it to False, which saves the memory of the first graph.
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
        given: Any = self.layer
        several = isinstance(given, list | tuple)
        layers = given if several else [] if given is None else [given]
        self._names = [layer_name(self.model, one) for one in layers]
        if len(set(self._names)) < len(self._names) or (several and not self._names):
            raise ValueError(
                checks.error_message("layer", "one layer, or several different ones", self._names)
            )
        # Store names in the place of modules, so that repr() shows which layers are explained.
        self.layer = tuple(self._names) if several else self._names[0] if self._names else None
        if self.differentiable and not self.keeps_graph:
            hint = "methods with keeps_graph, such as camkit.GradCAM, have maps you can backpropagate through"
            raise ValueError(
                checks.error_message("differentiable", f"False for {type(self).__name__}", True, hint)
            )
        self._layout = None if self.layout is None else as_layout(self.layout)
        if self._layout is not None and not self._names:
            expected = "layer= too, which names the layer with this layout"
            raise ValueError(checks.error_message("layout", expected, "no layer"))
        self._locations: dict[Hashable, tuple[Location, ...]] = {}

    @abstractmethod
    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps of one layer, ``(N, K, *spatial)``, for N images and K scores per image."""

    def map_each(self, evidences: Sequence[Evidence]) -> list[torch.Tensor]:
        """Returns the raw maps of each layer. By default :meth:`map` computes them layer by layer."""
        return [self.map(evidence) for evidence in evidences]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combines the maps of several layers, the shallowest first, into one; by default by ``fuse``."""
        return maps.fuse(parts, self.fuse)

    def find(self, dry: DryRun) -> Sequence[Location]:
        """Returns the layers that this method explains if ``layer`` is not given."""
        return [find_for_gradient(dry)]

    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Runs the model once, and turns that pass into a map."""
        size, attached = inputs.size, self.differentiable
        gradient = attached or (self.needs_gradient and self.gradient_in_first_pass)
        locations = self._locate(inputs)
        evidences = gather(self.model, inputs, target, locations, gradient=gradient, attached=attached)
        with torch.set_grad_enabled(attached):
            parts = self.map_each(evidences)
            self._require_shapes(parts, evidences)
            joined = self.join(parts)
        output = evidences[0].output if attached else detach_all(evidences[0].output)

        def explanation(part: torch.Tensor, layer: str) -> Explanation:
            part = part if attached else part.detach()
            return Explanation.of(part, output, evidences[0].scored, layer, size)

        names = tuple(evidence.location.name for evidence in evidences)
        if len(names) == 1:
            return explanation(joined, names[0])
        each = tuple(explanation(part, name) for part, name in zip(parts, names, strict=True))
        return replace(explanation(joined, ", ".join(names)), parts=each)

    def _require_shapes(self, parts: Sequence[torch.Tensor], evidences: Sequence[Evidence]) -> None:
        """Raises a ``ValueError`` unless the maps of each layer have the shape that :meth:`map` promises."""
        for part, evidence in zip(parts, evidences, strict=True):
            count, dims = evidence.scores.shape, evidence.x.ndim - 2
            if part.shape[:2] != count or part.ndim != dims + 2:
                expected = f"maps {checks.shape_of(count)} x {dims} spatial dimensions"
                got = f"{checks.shape_of(part)} from {type(self).__name__}"
                raise ValueError(checks.error_message("map", expected, got))

    def _locate(self, inputs: Inputs) -> tuple[Location, ...]:
        """Returns the layers to explain, the shallowest first, as a dry run at this input size finds them."""
        # The dry run gets two images. With one, a dimension of length one could be mistaken for the batch.
        shape = (2, *inputs.images.shape[1:])
        # The key holds the modules, because the user may have replaced one, such as the head, between calls.
        key = (shape, inputs.signature(), tuple(map(id, inputs.modules)))
        if key not in self._locations:
            if len(self._locations) >= _MAX_SHAPES:
                # A data set with images of many sizes would otherwise fill the memory with dry runs.
                self._locations.clear()
            if self.needs_gradient:
                require_floats(self.model)
            dry = DryRun.of(self.model, shape, inputs, self._names)
            found = [locate(dry, name, self._layout) for name in self._names] or self.find(dry)
            self._locations[key] = tuple(sorted(found, key=lambda location: location.value))
        return self._locations[key]
