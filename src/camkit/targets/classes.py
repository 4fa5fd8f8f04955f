"""Targets that are about classes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from camkit._tools import checks
from camkit.targets.binding import (
    BindableTarget,
    Bound,
    Classes,
    ClassFormula,
    class_indices,
    scorer,
    softmax,
)


@dataclass(frozen=True, eq=False)
class ClassScore(BindableTarget):
    """A formula of the logits, for each of some classes."""

    formula: ClassFormula
    classes: Classes

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        return Bound(scorer(self.formula, classes), replace(self, classes=classes), classes=classes)


def probability(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    """The softmax probability of classes, in place of the score before softmax.

    Args:
        classes: as ``target=`` takes them; each image's predicted class if not given.

    Returns:
        A target.
    """
    return ClassScore(softmax, classes)


def negative(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    """The score of classes with its sign turned: what speaks against them.

    Args:
        classes: as ``target=`` takes them; each image's predicted class if not given.

    Returns:
        A target.

    References:
        Selvaraju et al., ICCV 2017, section 3.3: counterfactual explanations.
    """
    return ClassScore(_negative, classes)


def _negative(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return -logits.gather(1, classes)


@dataclass(frozen=True, eq=False)
class ClassContrast(BindableTarget):
    """Scores of classes, less a share of the mean score of others."""

    classes: Classes
    against: Classes | int
    share: float
    similar: int | None = None

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        rows = classes.reshape(len(output), -1)
        if output.shape[1] < 2:
            raise ValueError(checks.error_message("target", "a model with two classes or more to compare", 1))
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
        return Bound(scorer(formula, classes), settled, classes=classes)


def contrast(classes: Classes, against: Classes) -> Callable[[Any], torch.Tensor]:
    """Why these classes and not those: the difference of their scores.

    Of a class and itself it is zero, and so is the map.

    Args:
        classes: as ``target=`` takes them; ``None`` is each image's predicted class.
        against: the other class, for all images or one per image; of several, ``(N, K)``, their mean.

    Returns:
        A target.
    """
    return ClassContrast(classes, against, 1.0)


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
    checks.positive("similar", similar)
    checks.not_negative("share", share)
    return ClassContrast(classes, None, share, similar)
