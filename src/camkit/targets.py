"""Targets: what turns a model's output into one score per explained thing.

A target is a class, several, nothing (the predicted class), or any function from the model's output to
scores ``(N,)`` or ``(N, K)``. The functions here make the usual ones::

    from camkit import targets

    explain(x, targets.contrast(281, 207))  # why this class and not that one
    explain(x, targets.key("out", targets.pixels(mask, 15)))  # of a dict's entry, the pixels of a mask
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from camkit import _checks

#: Classes: nothing (each image's predicted class), a class, a class per image, or several per image.
Classes = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray[Any, Any] | torch.Tensor | None
#: What ``target=`` takes: classes, the key of one entry of the output, or a function of the output.
Target = Classes | str | Callable[[Any], torch.Tensor]
__all__ = ["Bound", "Classes", "Target", "bind", "box", "contrast", "finer", "key", "negative", "pixels"]
__all__ += ["probability", "similarity"]

# Logits (N, classes) and class indices (N, K) to scores (N, K).
_Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """A target that has seen the output: what it explains is the same from now on.

    Attributes:
        score: from an output for the same images to scores ``(N,)`` or ``(N, K)``.
        target: the target as it is reported; explains the same again.
        classes: the class indices ``(N,)`` or ``(N, K)``, if it is just classes.
        logits: from the output to logits ``(N, classes)``, if it is just classes.
        about: the classes that it is about, also if it is not just them.
    """

    score: Callable[[Any], torch.Tensor]
    target: Any
    classes: torch.Tensor | None = None
    logits: Callable[[Any], torch.Tensor] | None = None
    about: torch.Tensor | None = None

    def of_classes(self, formula: _Formula) -> Callable[[Any], torch.Tensor]:
        """The scores by another formula of logits and classes; as they are, if it is not just classes."""
        if self.classes is None or self.logits is None:
            return self.score
        logits, classes = self.logits, self.classes
        return lambda output: formula(logits(output), classes.reshape(len(classes), -1))


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
            got = _checks.shape_of(output) + ("" if output.is_floating_point() else f", {output.dtype}")
        hint = "give target= a function from the output to one score per image, or the key of the logits"
        expected = "a model with logits (N, classes)"
        raise TypeError(_checks.complaint("target", expected, f"an output of {got}", hint))
    count, classes = output.shape
    if images not in (None, count):
        expected = f"a model with logits ({images}, classes) for {images} images"
        raise ValueError(_checks.complaint("target", expected, _checks.shape_of(output)))
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
            raise TypeError(_checks.complaint("target", expected, got)) from error
    if indices.ndim == 0:
        indices = indices.expand(count)
    if indices.ndim > 2 or len(indices) != count or indices.numel() == 0:
        expected = f"one target, {count} targets or {count} x K targets for {count} images"
        raise ValueError(_checks.complaint("target", expected, _checks.shape_of(indices)))
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(_checks.complaint("target", "integers", indices.dtype))
    indices = indices.to(output.device, torch.long)
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        expected = f"a class index in [0, {classes})"
        raise ValueError(_checks.complaint("target", expected, wrong[0].item()))
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
    if isinstance(target, _OfClasses | _Contrast | _Entry):
        return target.bind(output, count)
    if callable(target):
        return Bound(_checked(target, count), target)
    classes = class_indices(target, output, count)
    return Bound(_scorer(logit, classes), classes, classes, lambda logits: logits, classes)


def _scorer(formula: _Formula, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    rows = classes.reshape(len(classes), -1)
    return lambda logits: formula(logits, rows).reshape(classes.shape)


def _checked(function: Callable[[Any], torch.Tensor], count: int | None) -> Callable[[Any], torch.Tensor]:
    def score(output: Any) -> torch.Tensor:
        result = function(output)
        if not isinstance(result, torch.Tensor):
            got = type(result).__name__
            raise TypeError(_checks.complaint("target", "a function that returns a tensor", got))
        if result.ndim not in (1, 2) or count not in (None, len(result)) or result.numel() == 0:
            expected = f"a function that returns {count} or {count} x K scores for {count} images"
            expected = expected if count else "a function that returns one score or K per image"
            raise ValueError(_checks.complaint("target", expected, _checks.shape_of(result)))
        if not result.is_floating_point():
            raise TypeError(_checks.complaint("target", "a function that returns floats", result.dtype))
        return result

    return score


@dataclass(frozen=True, eq=False)
class _OfClasses:
    """A formula of the logits, for each of some classes."""

    formula: _Formula
    classes: Classes

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return _scorer(self.formula, class_indices(self.classes, output))(output)

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        return Bound(_scorer(self.formula, classes), replace(self, classes=classes), about=classes)


def probability(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    """The softmax probability of classes, in place of the score before softmax.

    Args:
        classes: as ``target=`` takes them; each image's predicted class if not given.

    Returns:
        A target.
    """
    return _OfClasses(softmax, classes)


def negative(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    """The score of classes with its sign turned: what speaks against them.

    Args:
        classes: as ``target=`` takes them; each image's predicted class if not given.

    Returns:
        A target.

    References:
        Selvaraju et al., ICCV 2017, section 3.3: counterfactual explanations.
    """
    return _OfClasses(_negative, classes)


def _negative(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return -logits.gather(1, classes)


@dataclass(frozen=True, eq=False)
class _Contrast:
    """Scores of classes, less a share of the mean score of others."""

    classes: Classes
    against: Classes | int
    share: float
    similar: int | None = None

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return self.bind(output).score(output)

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        rows = classes.reshape(len(output), -1)
        if output.shape[1] < 2:
            raise ValueError(_checks.complaint("target", "a model with two classes or more to compare", 1))
        if self.similar is None:
            against = class_indices(self.against, output)
            others = against.reshape(len(output), 1, -1).expand(-1, rows.shape[1], -1)
        elif self.against is not None:
            others = torch.as_tensor(self.against, device=output.device)
        else:
            logits = output.detach()
            distance = (logits[:, None] - logits.gather(1, rows)[:, :, None]).abs()
            distance.scatter_(2, rows[:, :, None], torch.inf)
            others = distance.topk(min(self.similar, output.shape[1] - 1), largest=False).indices

        def formula(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            reference = logits[:, None].expand(-1, rows.shape[1], -1).gather(2, others).mean(2)
            return logits.gather(1, rows) - self.share * reference

        settled = replace(self, classes=classes, against=others if self.similar else against)
        return Bound(_scorer(formula, classes), settled, about=classes)


def contrast(classes: Classes, against: Classes) -> Callable[[Any], torch.Tensor]:
    """Why these classes and not those: the difference of their scores.

    Of a class and itself it is zero, and so is the map.

    Args:
        classes: as ``target=`` takes them; ``None`` is each image's predicted class.
        against: the other class, for all images or one per image; of several, ``(N, K)``, their mean.

    Returns:
        A target.
    """
    return _Contrast(classes, against, 1.0)


def finer(classes: Classes = None, *, share: float = 0.6, similar: int = 3) -> Callable[[Any], torch.Tensor]:
    r"""FinerCAM: what tells a class from those that it is like.

    .. math:: y_c - \gamma \operatorname{mean}_{j \in S(c)} y_j

    The similar classes are those whose scores in the first pass are nearest.

    Args:
        classes: as ``target=`` takes them; each image's predicted class if not given.
        share: :math:`\gamma`, how much of the others' mean score is taken off.
        similar: how many classes count as similar; all others where there are fewer.

    Returns:
        A target for any method. With :class:`camkit.GradCAM` it is the paper's.

    References:
        Zhang et al., *Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation*,
        CVPR 2025.
    """
    _checks.positive("similar", similar)
    _checks.not_negative("share", share)
    return _Contrast(classes, None, share, similar)


def pixels(mask: torch.Tensor | np.ndarray[Any, Any], category: int) -> Callable[[Any], torch.Tensor]:
    """The summed scores of a category over a set of pixels, of a segmentation output ``(N, classes, H, W)``.

    Args:
        mask: which pixels, ``(H, W)`` for all images or ``(N, H, W)``, bool.
        category: the class.

    Returns:
        A target. ``key("out", pixels(mask, category))`` is for an output that is a dict.

    Raises:
        ValueError: if an image's mask is empty.
    """
    chosen = torch.as_tensor(mask)
    _checks.index("category", category)
    if chosen.dtype != torch.bool or chosen.ndim not in (2, 3):
        got = f"{chosen.dtype}, {_checks.shape_of(chosen)}"
        raise ValueError(_checks.complaint("mask", "bools (H, W) or (N, H, W)", got))
    if not chosen.flatten(-2).any(-1).all():
        raise ValueError(_checks.complaint("mask", "at least one pixel per image", "an empty mask"))

    def score(output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            got = _checks.shape_of(output) if isinstance(output, torch.Tensor) else type(output).__name__
            expected = "a model with output (N, classes, H, W)"
            hint = "of a dict of outputs take one with camkit.targets.key"
            raise TypeError(_checks.complaint("target", expected, got, hint))
        if not 0 <= category < output.shape[1]:
            expected = f"a category in [0, {output.shape[1]})"
            raise ValueError(_checks.complaint("category", expected, category))
        if chosen.shape[-2:] != output.shape[-2:] or (chosen.ndim == 3 and len(chosen) != len(output)):
            size = _checks.shape_of(output.shape[-2:])
            expected = f"the output's size {size}, for all or each of {len(output)} images"
            raise ValueError(_checks.complaint("mask", expected, _checks.shape_of(chosen)))
        inside = chosen.to(output.device).expand(len(output), *output.shape[-2:])
        return torch.where(inside, output[:, category], 0).sum((1, 2))

    return score


def box(corners: Sequence[float] | torch.Tensor, label: int) -> Callable[[Any], torch.Tensor]:
    r"""One box of a detector: the best of score times overlap among the detections with its label.

    .. math:: \max_{j:\, l_j = l} s_j \operatorname{IoU}(b_j, b)

    It is zero where there is none, so that it can be followed while the input is masked.

    Args:
        corners: the box b as ``(x1, y1, x2, y2)``, for all images ``(4,)`` or one per image ``(N, 4)``.
        label: its label l.

    Returns:
        A target for outputs as torchvision's detectors give them, per image a dict with ``boxes``,
        ``labels`` and ``scores``.

    References:
        Petsiuk et al., *Black-box Explanation of Object Detectors via Saliency Maps*, CVPR 2021,
        where the similarity also compares all class probabilities.
    """
    wanted = torch.as_tensor(corners)
    _checks.index("label", label)
    if wanted.ndim not in (1, 2) or wanted.shape[-1] != 4 or not (wanted[..., 2:] > wanted[..., :2]).all():
        expected = "(x1, y1, x2, y2) with x1 < x2 and y1 < y2, or one such per image"
        raise ValueError(_checks.complaint("corners", expected, wanted.tolist()))

    def score(output: Any) -> torch.Tensor:
        keys = {"boxes", "labels", "scores"}
        per_image = output if isinstance(output, list | tuple) else [None]
        if not all(isinstance(found, dict) and keys <= found.keys() for found in per_image):
            expected = "a detector, whose output per image is a dict with boxes, labels and scores"
            raise TypeError(_checks.complaint("target", expected, type(output).__name__))
        if wanted.ndim == 2 and len(wanted) != len(output):
            raise ValueError(_checks.complaint("corners", f"{len(output)} boxes", len(wanted)))
        rows = wanted.expand(len(output), 4)
        return torch.stack([best(found, one) for found, one in zip(output, rows, strict=True)])

    def best(found: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        boxes = found["boxes"]
        overlap = _iou(boxes, one.to(boxes)) * found["scores"] * (found["labels"] == label)
        return torch.cat([overlap, overlap.new_zeros(1)]).amax()

    return score


def _iou(boxes: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes ``(M, 4)`` with one ``(4,)``."""
    sides = (torch.minimum(boxes[:, 2:], one[2:]) - torch.maximum(boxes[:, :2], one[:2])).clamp(min=0)
    shared = sides.prod(1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + (one[2:] - one[:2]).prod() - shared)


def similarity(embedding: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The cosine similarity of the output ``(N, D)`` to an embedding: why is this like that?

    Args:
        embedding: what to compare with, ``(D,)`` for all images or ``(N, D)``.

    Returns:
        A target.
    """
    _checks.tensor("embedding", embedding)

    def score(output: Any) -> torch.Tensor:
        fits = isinstance(output, torch.Tensor) and output.ndim == 2
        if not fits or embedding.shape not in (output.shape[1:], output.shape):
            got = _checks.shape_of(output) if isinstance(output, torch.Tensor) else type(output).__name__
            expected = f"a model with output (N, D) for an embedding of {_checks.shape_of(embedding)}"
            raise ValueError(_checks.complaint("target", expected, got))
        return torch.cosine_similarity(output, embedding.to(output).expand_as(output), dim=1)

    return score


@dataclass(frozen=True, eq=False)
class _Entry:
    """A target of one entry of the output."""

    key: Hashable
    target: Target

    def _entry(self, output: Any) -> Any:
        try:
            if isinstance(output, torch.Tensor):  # which would give one image, or an attribute
                raise TypeError
            is_field = isinstance(self.key, str) and not isinstance(output, dict)
            if (
                is_field
                and isinstance(output, list | tuple)
                and self.key not in getattr(output, "_fields", ())
            ):
                raise TypeError  # "count" and "index" are no entries
            return getattr(output, str(self.key)) if is_field else output[self.key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            keys = list(output) if isinstance(output, dict) else getattr(output, "_fields", None)
            keys = keys or list(getattr(output, "__dataclass_fields__", ()))
            got = f"an output of type {type(output).__name__}"
            if keys:
                got += f" with {', '.join(map(repr, keys))}"
            elif isinstance(output, list | tuple):
                got += f" with {len(output)} entries"
            raise TypeError(_checks.complaint("target", f"an output that has {self.key!r}", got)) from error

    def __call__(self, output: Any) -> torch.Tensor:
        return self.bind(output).score(output)

    def bind(self, output: Any, count: int | None = None) -> Bound:
        inner = bind(self.target, self._entry(output), count)
        logits = inner.logits
        return Bound(
            lambda output: inner.score(self._entry(output)),
            replace(self, target=inner.target),
            inner.classes,
            None if logits is None else lambda output: logits(self._entry(output)),
            inner.about,
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
    return _Entry(key, target)
