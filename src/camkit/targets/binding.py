"""Binding a target to the output of a model.

Some targets are open until there is an output: ``None`` means the predicted class, which depends on the
output. :func:`bind` makes a :class:`Bound` target from the first output. Later outputs, such as those of
masked images, are then scored for the same classes, even if the model predicts another class for them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from camkit._tools import checks

#: Classes: ``None`` for the predicted class of each image, one class for all images, one class per image
#: ``(N,)``, or K classes per image ``(N, K)``.
Classes = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray[Any, Any] | torch.Tensor | None
#: The type of ``target=``: classes, the key of one entry of the output, or a function from the output to
#: scores ``(N,)`` or ``(N, K)``.
Target = Classes | str | Callable[[Any], torch.Tensor]
# From logits (N, classes) and class indices (N, K) to scores (N, K).
ClassFormula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """A target whose classes are decided, so that it scores every further output in the same way.

    Attributes:
        score: function from an output for the same images to scores ``(N,)`` or ``(N, K)``.
        target: the target to report. If it is passed as ``target=`` again, it explains the same classes.
        classes: indices of the explained classes, ``(N,)`` or ``(N, K)``; ``None`` if the target is a
            function of the output.
        logits: function from the output to the logits ``(N, classes)``; ``None`` unless each score is a
            logit.
    """

    score: Callable[[Any], torch.Tensor]
    target: Any
    classes: torch.Tensor | None = None
    logits: Callable[[Any], torch.Tensor] | None = None

    @property
    def plain_classes(self) -> torch.Tensor | None:
        """The indices of the explained classes if each score is the logit of its class, else ``None``."""
        return None if self.logits is None else self.classes

    def with_formula(self, formula: ClassFormula) -> Callable[[Any], torch.Tensor]:
        """Returns a score function with another formula, such as the softmax probability.

        Args:
            formula: from logits ``(N, classes)`` and class indices ``(N, K)`` to scores ``(N, K)``.

        Returns:
            A function from the output to the scores by ``formula``, ``(N, K)``. If the scores of this target
            are not plain logits, the formula does not apply, and the result is :attr:`score`.
        """
        logits, classes = self.logits, self.plain_classes
        if logits is None or classes is None:
            return self.score
        return lambda output: formula(logits(output), classes.reshape(len(classes), -1))


@dataclass(frozen=True)
class Scores:
    """The scores of one output.

    Attributes:
        bound: the target that made them.
        rows: the scores y, ``(N, K)``; K is 1 if the target has one score per image.
        single: whether the target has one score per image. Maps then have no dimension K.
    """

    bound: Bound
    rows: torch.Tensor
    single: bool

    @classmethod
    def of(cls, target: Target | Bound, output: Any, images: int) -> "Scores":
        """Binds a target to an output, and computes its scores.

        Args:
            target: the target, bound or not.
            output: the model's output.
            images: the number of images, N.

        Raises:
            ValueError: for a class out of range, or a wrong number of targets or scores.
            TypeError: for a target or an output of the wrong type.
        """
        bound = bind(target, output, images)
        scores = bound.score(output)
        return cls(bound, scores.reshape(images, -1), scores.ndim == 1)


class BindableTarget(ABC):
    """A target that needs an output to decide something, such as the predicted class.

    Like a target that is a function, it can also be called with an output. Every such call decides anew.
    """

    @abstractmethod
    def bind(self, output: Any, count: int | None = None) -> Bound:
        """Uses ``output`` to decide everything that the target leaves open; see :func:`bind`."""

    def __call__(self, output: Any) -> torch.Tensor:
        return self.bind(output).score(output)


def logit(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Returns the logits of classes, the scores before the softmax.

    Args:
        logits: shape ``(N, classes)``.
        classes: class indices, ``(N, K)``.

    Returns:
        Shape ``(N, K)``.
    """
    return logits.gather(1, classes)


def softmax(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Returns the softmax probabilities of classes.

    Args:
        logits: shape ``(N, classes)``.
        classes: class indices, ``(N, K)``.

    Returns:
        Shape ``(N, K)``, in [0, 1].
    """
    return logits.softmax(1).gather(1, classes)


def _are_logits(output: torch.Tensor) -> bool:
    return output.ndim == 2 and output.shape[1] > 0 and (output.is_floating_point() or output.is_quantized)


def class_indices(target: Classes, output: object, images: int | None = None) -> torch.Tensor:
    """Returns the classes of a target as a tensor of indices.

    Args:
        target: ``None`` for the predicted class of each image, an int for all images, N ints, or N x K ints.
        output: the model's output, logits ``(N, classes)``.
        images: the number of images, N; not checked if it is ``None``.

    Returns:
        Class indices, ``(N,)`` or ``(N, K)``, on the device of ``output``.

    Raises:
        ValueError: for a class out of range, or a number of targets or of rows of the output other than N.
        TypeError: if ``target`` is not ints, or ``output`` is not a tensor of logits.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.class_indices(None, torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
        tensor([1, 0])
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
            # NumPy reads any nested list of integers. In a list, torch refuses some of NumPy's integer types.
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
    """Uses the model's first output to decide which classes a target explains.

    Args:
        target: classes, a key, or a function from the output to scores ``(N,)`` or ``(N, K)``. A target that
            is bound already is returned unchanged.
        output: the model's output.
        count: the number of images, N. If it is ``None``, the number of scores is not checked.

    Returns:
        The bound target.

    Raises:
        ValueError: for a class out of range, or a wrong number of targets.
        TypeError: for a target or an output of the wrong type.

    Example:
        >>> import camkit, torch
        >>> bound = camkit.targets.bind(None, torch.tensor([[1.0, 9.0]]))
        >>> bound.score(torch.tensor([[7.0, 2.0]]))  # still class 1
        tensor([2.])
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
    return Bound(scorer(logit, classes), classes, classes, lambda logits: logits)


def scorer(formula: ClassFormula, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a function from logits ``(N, classes)`` to scores of the same shape as ``classes``.

    Args:
        formula: from logits and class indices ``(N, K)`` to scores ``(N, K)``.
        classes: class indices, ``(N,)`` or ``(N, K)``.
    """
    rows = classes.reshape(len(classes), -1)
    return lambda logits: formula(logits, rows).reshape(classes.shape)


def _checked(function: Callable[[Any], torch.Tensor], count: int | None) -> Callable[[Any], torch.Tensor]:
    """Wraps a user's function from the output to scores; raises unless it returns N or N x K floats."""

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
    """A target that explains one entry of the output. See :func:`key`.

    Attributes:
        key: index, key or attribute name of the entry.
        target: the target to apply to the entry.
    """

    key: Hashable
    target: Target

    def _entry(self, output: Any) -> Any:
        # A string is an attribute of a dataclass or named tuple, unless the output is a dict.
        is_field = isinstance(self.key, str) and not isinstance(output, dict)
        fields = getattr(output, "_fields", ())
        # Two look-ups would succeed but return something that is not an entry of the output: indexing a
        # tensor returns one image, and a name such as "count" is a method of every list and tuple.
        is_method = is_field and isinstance(output, list | tuple) and self.key not in fields
        if isinstance(output, torch.Tensor) or is_method:
            raise self._missing(output)
        try:
            return getattr(output, str(self.key)) if is_field else output[self.key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._missing(output) from error

    def _missing(self, output: Any) -> TypeError:
        """Makes the error for an output without the entry. It names the entries that the output has."""
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
        # Each function of the inner target is applied to the entry instead of the output.
        return Bound(
            lambda output: inner.score(self._entry(output)),
            replace(self, target=inner.target),
            inner.classes,
            None if logits is None else lambda output: logits(self._entry(output)),
        )


def key(key: Hashable, target: Target = None) -> Callable[[Any], torch.Tensor]:
    """Explains one entry of the output of a model that returns a dict, a tuple, a list or a dataclass.

    Args:
        key: the key of the entry in a dict, its index in a tuple or list, or its attribute name in a
            dataclass or named tuple. ``target="logits"`` is short for ``target=key("logits")``.
        target: the target to apply to the entry, as ``target=`` takes it; by default the predicted class of
            each image.

    Returns:
        A target. A call with it raises a ``TypeError`` if the output has no such entry.

    Example:
        >>> import camkit, torch
        >>> output = {"loss": torch.tensor(0.1), "logits": torch.tensor([[1.0, 5.0]])}
        >>> camkit.targets.key("logits", 0)(output)
        tensor([1.])
    """
    return OutputEntry(key, target)
