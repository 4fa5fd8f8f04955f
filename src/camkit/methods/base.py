"""The call that all methods share, and its result."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from camkit import maps
from camkit._tools import checks
from camkit.model.inputs import Input, Inputs
from camkit.model.modules import modules_of, unwrap
from camkit.model.state import restored_on_exit
from camkit.targets.binding import Scores, Target


@dataclass(frozen=True)
class Explanation:
    """One explanation of a batch.

    Attributes:
        maps: raw maps, unnormalised, at the layer's resolution: ``(N, h, w)``, or ``(N, K, h, w)`` where
            K targets per image were asked for.
        output: the model's own output in that very pass.
        target: what was explained, as ``target=`` takes it: the classes, ``(N,)`` or ``(N, K)``; or what
            was given, with its classes settled.
        layer: name of the layer; the names of several, ``"layer3, layer4"``.
        input_size: spatial size of the input.
        parts: of several layers that were fused, each one's explanation, from the shallowest layer on.
        classes: the classes that the target is about, ``(N,)`` or ``(N, K)``, if it is about classes.
    """

    maps: torch.Tensor
    output: Any
    target: Any
    layer: str
    input_size: tuple[int, ...]
    parts: tuple["Explanation", ...] = ()
    classes: torch.Tensor | None = None

    @classmethod
    def of(
        cls, maps: torch.Tensor, output: Any, scores: Scores, layer: str, input_size: tuple[int, ...]
    ) -> "Explanation":
        """The explanation that maps ``(N, K, *spatial)`` of some scores make."""
        shown = maps[:, 0] if scores.single else maps
        bound = scores.bound
        return cls(shown, output, bound.target, layer, input_size, classes=bound.classes)

    def heatmaps(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """The maps at the input's size, each scaled to [0, 1] by its own minimum and maximum.

        Args:
            size: another size, ``(H, W)``.

        Returns:
            Shape ``(N, H, W)`` or ``(N, K, H, W)``, in [0, 1]; a constant map is all zeros.

        Raises:
            ValueError: if a map holds NaN or infinity, or if ``size`` is not one.
        """
        dims = len(self.input_size)
        size = self.input_size if size is None else size
        checks.lengths("size", f"{dims} positive lengths", size, dims)
        return maps.normalize(maps.resize(self.maps, size), dims=len(size))


@contextmanager
def prepared_call(model: nn.Module, x: Input, *, differentiable: bool = False) -> Iterator[Inputs]:
    """Checks the inputs of a call, and leaves the model as it was found at the end of the block.

    Args:
        model: the model, unwrapped.
        x: images, or several inputs.
        differentiable: whether the call is part of a training step, which runs in the model's own mode.

    Raises:
        ValueError: for images without a batch dimension or of other than finite numbers.
        TypeError: if ``x`` is no input, or holds no images.
    """
    modules = modules_of(model)
    inputs = Inputs.checked(x, modules)
    with nullcontext() if differentiable else restored_on_exit(modules):
        yield inputs


class Method(ABC):
    """What every method is: an object with a ``model`` that explains a batch when it is called.

    A subclass has one method to write, :meth:`explain`. To write a new map, derive from
    :class:`camkit.Explainer`, which finds the layer and runs the model, and asks for the formula alone.

    Args:
        model: any module; ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` are unwrapped.

    Raises:
        TypeError: if ``model`` is no module.
    """

    #: The formula of the map, in LaTeX.
    formula: ClassVar[str]
    #: The paper that it comes from.
    paper: ClassVar[str]
    #: How often the model runs.
    passes: ClassVar[str]
    #: Whether the model must be differentiable after the layer.
    needs_gradient: ClassVar[bool] = True
    #: Whether ``differentiable=True`` is possible: you can backpropagate through the map.
    keeps_graph: ClassVar[bool] = False

    model: nn.Module
    #: Whether maps and output keep their graph.
    differentiable: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)

    def __call__(self, x: Input, target: Target = None) -> Explanation:
        """Explains a batch.

        The model is left exactly as it was found, also when something raises.

        Args:
            x: images as the model expects them, ``(N, C, H, W)``. For a model with several inputs, a tuple
                (passed by position) or a dict (passed by name): the first floating-point tensor with spatial
                dimensions is the images, and every other tensor with N rows belongs to them.
            target: what to explain: ``None`` (each image's predicted class), a class for all images, one
                class per image ``(N,)``, K classes per image ``(N, K)``, the key of the logits in the model's
                output, one of :mod:`camkit.targets`, or a function from the output to scores ``(N,)`` or
                ``(N, K)``.

        Returns:
            The :class:`Explanation`, on the device of ``x``.

        Raises:
            ValueError: for an input without a batch dimension or too small for the model, a layer that did
                not run exactly once or that has no spatial size, a class out of range, a wrong number of
                targets.
            TypeError: for an input, an output or a target of another type.
        """
        with prepared_call(self.model, x, differentiable=self.differentiable) as inputs:
            return self.explain(inputs, target)

    @abstractmethod
    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains checked inputs, with the model in evaluation mode unless ``differentiable`` is set."""


def require_method(value: object) -> Method:
    """``value``, if it is a method.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, Method):
        got = value if isinstance(value, type) else type(value).__name__
        raise TypeError(checks.error_message("method", "a method such as camkit.GradCAM(model)", got))
    return value
