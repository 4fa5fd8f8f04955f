"""The call that all methods share: tap, one pass, target, result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from camkit import _checks, layers, maps, targets
from camkit._nested import detached
from camkit.dryrun import DryRun
from camkit.evidence import Evidence
from camkit.layers import Location
from camkit.tap import Tap, as_found
from camkit.targets import Target

# Input shapes for which an explainer remembers its dry run.
_KEPT = 16


@dataclass(frozen=True)
class Explanation:
    """One explanation of a batch.

    Attributes:
        maps: raw maps, unnormalised, at the layer's resolution: ``(N, h, w)``, or ``(N, K, h, w)`` where
            K targets per image were asked for.
        output: the model's own output in that very pass.
        target: the explained classes, ``(N,)`` or ``(N, K)``; or the function that was given.
        layer: name of the layer.
        input_size: spatial size of the input.
    """

    maps: torch.Tensor
    output: Any
    target: Any
    layer: str
    input_size: tuple[int, ...]

    def heatmaps(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """The maps at the input's size, each scaled to [0, 1] by its own minimum and maximum.

        Args:
            size: another size, ``(H, W)``.

        Returns:
            Shape ``(N, H, W)`` or ``(N, K, H, W)``, in [0, 1]; a constant map is all zeros.

        Raises:
            ValueError: if a map holds NaN or infinity, or if ``size`` is not one.
        """
        if isinstance(size, int):
            raise TypeError(_checks.complaint("size", "(H, W)", size))
        size = self.input_size if size is None else tuple(size)
        if len(size) != len(self.input_size) or min(size) < 1:
            expected = f"{len(self.input_size)} positive lengths"
            raise ValueError(_checks.complaint("size", expected, size))
        return maps.normalize(maps.resize(self.maps, size), dims=len(size))


class Explainer(ABC):
    """Runs a model once and makes a map of what a method reads off that pass.

    A method is a subclass with one pure function, :meth:`map`. The model is left exactly as it was found,
    also when something raises: it runs in evaluation mode, whatever mode it is in, and gets its mode back.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; found by a dry run if not given.

    Raises:
        ValueError: if the model has no such layer.
        TypeError: for a model or a layer of another kind.
    """

    needs_gradient: ClassVar[bool]

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None) -> None:
        _checks.module("model", model)
        self.model = model
        self.layer = None if layer is None else layers.name_of(model, layer)
        self._locations: dict[tuple[tuple[int, ...], tuple[int, ...]], Location] = {}

    @abstractmethod
    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``."""

    def find(self, dry: DryRun) -> Location:
        """The layer that this method explains if none is named."""
        return layers.find_for_gradient(dry)

    def __call__(self, x: torch.Tensor, target: Target = None) -> Explanation:
        """Explains a batch in one forward pass.

        Args:
            x: inputs as the model expects them, ``(N, C, H, W)``.
            target: what to explain: nothing (each image's predicted class), a class for all images,
                one class per image ``(N,)``, K classes per image ``(N, K)``, or a function from the
                model's output to scores ``(N,)`` or ``(N, K)``.

        Returns:
            The :class:`Explanation`, on the device of ``x``.

        Raises:
            ValueError: for an input without a batch dimension or too small for the model, a layer that
                did not run exactly once or that has no spatial size, a class out of range, a wrong
                number of targets.
            TypeError: for an input, an output or a target of another kind.
        """
        _checks.batch(self.model, x)
        location = self._locate(x)
        with as_found(self.model):
            evidence = self._run(x, target, location, torch.no_grad)
            if self.needs_gradient and not evidence.scores.requires_grad:
                # The model left a no_grad of its own after the layer, and fell back to ours.
                evidence = self._run(x, target, location, torch.enable_grad)
            raw = self.map(evidence).detach()
        return Explanation(
            maps=raw.reshape(*evidence.scores.shape, *raw.shape[2:]),
            output=detached(evidence.output),
            target=evidence.target,
            layer=location.name,
            input_size=tuple(x.shape[2:]),
        )

    def _run(
        self,
        x: torch.Tensor,
        target: Target,
        location: Location,
        before: Callable[[], AbstractContextManager[None]],
    ) -> Evidence:
        with Tap(self.model, location.name, gradient=self.needs_gradient, before=before) as tap:
            output = self.model(x)
            leaf = tap.output
            scores, reported = targets.scores(target, output, len(x))
        return Evidence(location, leaf, output, scores, reported)

    def _locate(self, x: torch.Tensor) -> Location:
        # Two images, so that no dimension of length one is taken for the batch. The modules are in the key:
        # a user may have given the model another head since.
        key = ((2, *x.shape[1:]), tuple(map(id, self.model.modules())))
        if key not in self._locations:
            if len(self._locations) >= _KEPT:
                self._locations.clear()
            dry = DryRun.of(self.model, key[0])
            self._locations[key] = self.find(dry) if self.layer is None else layers.locate(dry, self.layer)
        return self._locations[key]
