"""The base class of all methods, with the call that they share, and the result of a call."""

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
    """The explanation of a batch of N images.

    Attributes:
        maps: the raw maps, before normalisation: ``(N, *spatial)``, or ``(N, K, *spatial)`` for K targets per
            image. Their spatial size is that of the layer, or of the finest layer if several are fused.
            FullGrad and GuidedGradCAM make maps at the size of the input.
        output: the model's output, from the same forward pass.
        target: the explained target, in a form that ``target=`` takes: the class indices ``(N,)`` or
            ``(N, K)``, or the given target with its classes filled in.
        layer: the name of the layer; the names of several layers as ``"layer3, layer4"``; empty for FullGrad.
        input_size: the spatial size of the input, such as ``(H, W)``.
        parts: the explanation of each layer, from the shallowest to the deepest, if several were fused.
        classes: the class indices ``(N,)`` or ``(N, K)`` if the target is about classes, else ``None``.
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
        """Builds an explanation from maps ``(N, K, *spatial)``; drops K if each image has a single target."""
        shown = maps[:, 0] if scores.single else maps
        bound = scores.bound
        return cls(shown, output, bound.target, layer, input_size, classes=bound.classes)

    def heatmaps(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the maps at the size of the input, each scaled to [0, 1] by its own minimum and maximum.

        Args:
            size: another spatial size, such as ``(H, W)``.

        Returns:
            Shape ``(N, *size)`` or ``(N, K, *size)``, in [0, 1]. A constant map becomes all zeros.

        Raises:
            ValueError: if a map holds NaN or infinity, or if ``size`` is not one positive length for each
                spatial dimension.
            TypeError: if ``size`` is not a list or tuple of ints.
        """
        dims = len(self.input_size)
        size = self.input_size if size is None else size
        checks.lengths("size", f"{dims} positive lengths", size, dims)
        return maps.normalize(maps.resize(self.maps, size), dims=len(size))


@contextmanager
def prepared_call(model: nn.Module, x: Input, *, differentiable: bool = False) -> Iterator[Inputs]:
    """Checks the inputs of a call, and runs the block with the model in evaluation mode.

    At the end of the block, the model is restored to the state in which it was found.

    Args:
        model: the unwrapped model.
        x: images, or several inputs.
        differentiable: whether the call is part of a training step. The model then stays in its own mode,
            and nothing is restored.

    Yields:
        The checked inputs.

    Raises:
        ValueError: if the images have no batch dimension, are empty, or hold NaN or infinity.
        TypeError: if ``x`` has an unsupported type, or holds no images of floats.
    """
    modules = modules_of(model)
    inputs = Inputs.checked(x, modules)
    with nullcontext() if differentiable else restored_on_exit(modules):
        yield inputs


class Method(ABC):
    """Base class of all methods: an object with a ``model`` that explains a batch when it is called.

    A subclass implements :meth:`explain`. For a new kind of map at a layer, derive from
    :class:`camkit.Explainer` instead. It finds the layer and runs the model, so that only the formula of the
    map is left to write.

    Args:
        model: any :class:`torch.nn.Module`. A model inside ``torch.compile``, ``DataParallel`` or
            ``DistributedDataParallel`` is taken out of it.

    Raises:
        TypeError: if ``model`` is not a module, or a part of it is a ``torch.jit`` module.
        ValueError: if a parameter or buffer belongs to a lazy module that has not run yet.
    """

    #: The formula of the map, in LaTeX. The documentation shows it, so that docstrings do not repeat it.
    formula: ClassVar[str]
    #: The paper that the method comes from.
    paper: ClassVar[str]
    #: The passes through the model, or through parts of it, that a call takes.
    passes: ClassVar[str]
    #: Whether the model must be differentiable after the layer.
    needs_gradient: ClassVar[bool] = True
    #: Whether the method supports ``differentiable=True``, for maps you can backpropagate through.
    keeps_graph: ClassVar[bool] = False

    model: nn.Module
    #: Whether the maps and the output keep their graph.
    differentiable: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)

    def __call__(self, x: Input, target: Target = None) -> Explanation:
        """Explains a batch.

        The model is left exactly as it was found, also when an error is raised. The exception is
        ``differentiable=True``, where the call is the forward pass of a training step.

        Args:
            x: images as the model expects them, ``(N, C, H, W)``. For a model with several inputs, a tuple
                (passed by position) or a dict (passed by name): the first floating-point tensor with spatial
                dimensions is the images, and every other tensor with N rows belongs to them.
            target: the score to explain: ``None`` (the predicted class of each image), a class for all
                images, one class per image ``(N,)``, K classes per image ``(N, K)``, the key of the logits in
                the model's output, one of :mod:`camkit.targets`, or a function from the output to scores
                ``(N,)`` or ``(N, K)``.

        Returns:
            The :class:`Explanation`, on the device of ``x``.

        Raises:
            ValueError: if the input has no batch dimension, is empty, holds NaN or infinity, or is too small
                for the model; if a layer did not run exactly once or has no spatial size; if a class is out
                of range; or if the number of targets is wrong.
            TypeError: if the input, the output or the target has an unsupported type, or if the model is
                quantized and the method needs its gradient or weights.
        """
        with prepared_call(self.model, x, differentiable=self.differentiable) as inputs:
            return self.explain(inputs, target)

    @abstractmethod
    def explain(self, inputs: Inputs, target: Target) -> Explanation:
        """Explains checked inputs. The model is in evaluation mode, unless ``differentiable`` is set."""


def require_method(value: object) -> Method:
    """Returns ``value`` if it is a method.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, Method):
        # A class passed without its model, such as camkit.GradCAM, is shown as that class.
        got = value if isinstance(value, type) else type(value).__name__
        raise TypeError(checks.error_message("method", "a method such as camkit.GradCAM(model)", got))
    return value
