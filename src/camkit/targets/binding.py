"""How a target is applied to the output of a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from camkit._tools import checks

#: Classes: nothing (each image's predicted class), a class, a class per image, or several per image.
Classes = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray[Any, Any] | torch.Tensor | None
#: What ``target=`` takes: classes, the key of one entry of the output, or a function of the output.
Target = Classes | str | Callable[[Any], torch.Tensor]
# Logits (N, classes) and class indices (N, K) to scores (N, K).
ClassFormula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """A target that has seen the output: what it explains is the same from now on.

    Attributes:
        score: from an output for the same images to scores ``(N,)`` or ``(N, K)``.
        target: the target as it is reported; explains the same again.
        classes: the class indices ``(N,)`` or ``(N, K)`` that the target is about, if it is about classes.
        plain_classes: the same indices, if the score of each is its logit and nothing else.
        logits: from the output to logits ``(N, classes)``, if the target is plain classes.
    """

    score: Callable[[Any], torch.Tensor]
    target: Any
    classes: torch.Tensor | None = None
    plain_classes: torch.Tensor | None = None
    logits: Callable[[Any], torch.Tensor] | None = None

    def with_formula(self, formula: ClassFormula) -> Callable[[Any], torch.Tensor]:
        """The scores by another formula of logits and classes; as they are, if it is not just classes."""
        if self.plain_classes is None or self.logits is None:
            return self.score
        logits, classes = self.logits, self.plain_classes
        return lambda output: formula(logits(output), classes.reshape(len(classes), -1))


@dataclass(frozen=True)
class Scores:
    """The scores of one output.

    Attributes:
        bound: the target that they are scores of.
        rows: the scores, y, ``(N, K)``.
        single: whether the target asks for one score per image, so that maps have no dimension K.
    """

    bound: Bound
    rows: torch.Tensor
    single: bool

    @classmethod
    def of(cls, target: Target | Bound, output: Any, images: int) -> "Scores":
        """Binds a target to the output for N images, and computes its scores.

        Raises:
            ValueError: for a class out of range, and for a wrong number of targets.
            TypeError: for a target or an output of another type.
        """
        bound = bind(target, output, images)
        scores = bound.score(output)
        return cls(bound, scores.reshape(images, -1), scores.ndim == 1)


class BindableTarget(ABC):
    """A target that leaves something to the output, such as the predicted class, until it is bound."""

    @abstractmethod
    def bind(self, output: Any, count: int | None = None) -> Bound:
        """This target with everything settled by ``output``, as :func:`bind` returns it."""

    def __call__(self, output: Any) -> torch.Tensor:
        return self.bind(output).score(output)


def logit(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The score before softmax of each class ``(N, K)``."""
    return logits.gather(1, classes)


def softmax(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The softmax probability of each class ``(N, K)``."""
    return logits.softmax(1).gather(1, classes)


def _are_logits(output: torch.Tensor) -> bool:
    return output.ndim == 2 and output.shape[1] > 0 and (output.is_floating_point() or output.is_quantized)


def class_indices(target: Classes, output: object, images: int | None = None) -> torch.Tensor:
    """The classes that ``target`` names, as an index tensor ``(N,)`` or ``(N, K)``.

    Args:
        target: ``None`` for each image's predicted class, an int for all images, N ints, or N x K ints.
        output: the model's output, logits ``(N, classes)``.
        images: their number N, if it is known.

    Raises:
        ValueError: for a class out of range, and for a wrong number of targets or of rows of the output.
        TypeError: for a target or an output of another kind.
    """
    if not isinstance(output, torch.Tensor) or not _are_logits(output):
        got = f"type {type(output).__name__}"
        if isinstance(output, torch.Tensor):
            got = checks.shape_of(output) + ("" if output.is_floating_point() else f", {output.dtype}")
        hint = "give target= a function from the output to one score per image, or the key of the logits"
        expected = "a model with logits (N, classes)"
        raise TypeError(checks.error_message("target", expected, f"an output of {got}", hint))
    count, classes = output.shape
    if images not in (None, count):
        expected = f"a model with logits ({images}, classes) for {images} images"
        raise ValueError(checks.error_message("target", expected, checks.shape_of(output)))
    if target is None:
        return output.detach().argmax(1)
    if isinstance(target, torch.Tensor):
        indices = target.detach()
    else:
        try:
            indices = torch.as_tensor(np.asarray(target))
        except (TypeError, ValueError) as error:
            expected = "an int, N ints, N x K ints, a key or a function of the output"
            got = repr(target) if isinstance(target, int | list | tuple) else type(target).__name__
            raise TypeError(checks.error_message("target", expected, got)) from error
    if indices.ndim == 0:
        indices = indices.expand(count)
    if indices.ndim > 2 or len(indices) != count or indices.numel() == 0:
        expected = f"one target, {count} targets or {count} x K targets for {count} images"
        raise ValueError(checks.error_message("target", expected, checks.shape_of(indices)))
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(checks.error_message("target", "integers", indices.dtype))
    indices = indices.to(output.device, torch.long)
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        expected = f"a class index in [0, {classes})"
        raise ValueError(checks.error_message("target", expected, wrong[0].item()))
    return indices


def bind(target: Target | Bound, output: Any, count: int | None = None) -> Bound:
    """The target, with what it leaves to the output (the predicted class) settled.

    Args:
        target: classes, a key, or a function from the model's output to scores ``(N,)`` or ``(N, K)``; one
            that is bound already stays as it is.
        output: the model's output.
        count: number of images, N; of a function's scores there may be any number if it is not given.

    Raises:
        ValueError: for a class out of range, and for a wrong number of targets.
        TypeError: for a target or an output of another kind.
    """
    if isinstance(target, Bound):
        return target
    if isinstance(target, str):
        target = key(target)
    if isinstance(target, BindableTarget):
        return target.bind(output, count)
    if callable(target):
        return Bound(_checked(target, count), target)
    classes = class_indices(target, output, count)
    return Bound(scorer(logit, classes), classes, classes, classes, lambda logits: logits)


def scorer(formula: ClassFormula, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from logits ``(N, classes)`` to the score of each of ``classes`` by ``formula``."""
    rows = classes.reshape(len(classes), -1)
    return lambda logits: formula(logits, rows).reshape(classes.shape)


def _checked(function: Callable[[Any], torch.Tensor], count: int | None) -> Callable[[Any], torch.Tensor]:
    def score(output: Any) -> torch.Tensor:
        result = function(output)
        if not isinstance(result, torch.Tensor):
            got = type(result).__name__
            raise TypeError(checks.error_message("target", "a function that returns a tensor", got))
        if result.ndim not in (1, 2) or count not in (None, len(result)) or result.numel() == 0:
            expected = f"a function that returns {count} or {count} x K scores for {count} images"
            expected = expected if count else "a function that returns one score or K per image"
            raise ValueError(checks.error_message("target", expected, checks.shape_of(result)))
        if not result.is_floating_point():
            raise TypeError(checks.error_message("target", "a function that returns floats", result.dtype))
        return result

    return score


@dataclass(frozen=True, eq=False)
class OutputEntry(BindableTarget):
    """A target of one entry of the output."""

    key: Hashable
    target: Target

    def _entry(self, output: Any) -> Any:
        is_field = isinstance(self.key, str) and not isinstance(output, dict)
        fields = getattr(output, "_fields", ())
        # Indexing a tensor would pick one image, and "count" is a method of every tuple: neither is an entry.
        is_method = is_field and isinstance(output, list | tuple) and self.key not in fields
        if isinstance(output, torch.Tensor) or is_method:
            raise self._missing(output)
        try:
            return getattr(output, str(self.key)) if is_field else output[self.key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._missing(output) from error

    def _missing(self, output: Any) -> TypeError:
        """The error about an output without the entry, which names the entries that it has."""
        keys = list(output) if isinstance(output, dict) else getattr(output, "_fields", None)
        keys = keys or list(getattr(output, "__dataclass_fields__", ()))
        got = f"an output of type {type(output).__name__}"
        if keys:
            got += f" with {', '.join(map(repr, keys))}"
        elif isinstance(output, list | tuple):
            got += f" with {len(output)} entries"
        return TypeError(checks.error_message("target", f"an output that has {self.key!r}", got))

    def bind(self, output: Any, count: int | None = None) -> Bound:
        inner = bind(self.target, self._entry(output), count)
        logits = inner.logits
        return Bound(
            lambda output: inner.score(self._entry(output)),
            replace(self, target=inner.target),
            inner.classes,
            inner.plain_classes,
            None if logits is None else lambda output: logits(self._entry(output)),
        )


def key(key: Hashable, target: Target = None) -> Callable[[Any], torch.Tensor]:
    """A target of one entry of the output, where that is a tuple, a dict, a dataclass or a named tuple.

    Args:
        key: index, key or attribute of the entry. ``target="logits"`` is short for
            ``target=key("logits")``.
        target: what to explain of that entry, as ``target=`` takes it.

    Returns:
        A target.
    """
    return OutputEntry(key, target)
