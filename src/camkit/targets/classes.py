"""Targets that are computed from the logits of classes."""

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
    """A target that scores classes by a formula of the logits.

    Attributes:
        formula: from logits ``(N, classes)`` and class indices ``(N, K)`` to scores ``(N, K)``.
        classes: the classes, as ``target=`` takes them.
    """

    formula: ClassFormula
    classes: Classes

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        # Report a target with these classes filled in, so that the user can explain the same classes again.
        return Bound(scorer(self.formula, classes), replace(self, classes=classes), classes=classes)


def probability(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    r"""Explains the softmax probability of classes, instead of their logits.

    .. math:: y = \frac{\exp z_c}{\sum_j \exp z_j}

    Args:
        classes: classes as ``target=`` takes them; by default the predicted class of each image.

    Returns:
        A target.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.probability(1)(torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
    """
    return ClassScore(softmax, classes)


def negative(classes: Classes = None) -> Callable[[Any], torch.Tensor]:
    r"""Explains the evidence against classes: their logits with the sign reversed.

    .. math:: y = -z_c

    Args:
        classes: classes as ``target=`` takes them; by default the predicted class of each image.

    Returns:
        A target.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.negative(1)(torch.tensor([[2.0, 3.0]]))
        tensor([-3.])

    References:
        Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*,
        ICCV 2017, section 3.3: counterfactual explanations.
    """
    return ClassScore(_negative, classes)


def _negative(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return -logits.gather(1, classes)


@dataclass(frozen=True, eq=False)
class ClassContrast(BindableTarget):
    """The logits of some classes minus a share of the mean logit of other classes.

    Attributes:
        classes: the classes, as ``target=`` takes them.
        against: the other classes. If ``similar`` is set: ``None`` until the first output decides which they
            are, and then their indices ``(N, K, similar)``.
        share: the share of the others' mean that is subtracted.
        similar: number of similar classes to compare with; ``None`` if ``against`` names the classes.
    """

    classes: Classes
    against: Classes | int
    share: float
    similar: int | None = None

    def bind(self, output: torch.Tensor, count: int | None = None) -> Bound:
        classes = class_indices(self.classes, output, count)
        rows = classes.reshape(len(output), -1)  # (N, K), also for one class per image
        if output.shape[1] < 2:
            raise ValueError(checks.error_message("target", "a model with two classes or more to compare", 1))
        if self.similar is None:
            against = class_indices(self.against, output)
            # All classes of an image are compared with the same others.
            others = against.reshape(len(output), 1, -1).expand(-1, rows.shape[1], -1)
        elif self.against is not None:
            # Bound before: keep the classes that were similar in the first output.
            others = torch.as_tensor(self.against, device=output.device)
        else:
            logits = output.detach()
            distance = (logits[:, None] - logits.gather(1, rows)[:, :, None]).abs()
            # Every class is nearest to itself. The infinite distance excludes it from its own neighbours.
            distance.scatter_(2, rows[:, :, None], torch.inf)
            others = distance.topk(min(self.similar, output.shape[1] - 1), largest=False).indices

        def formula(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            reference = logits[:, None].expand(-1, rows.shape[1], -1).gather(2, others).mean(2)
            return logits.gather(1, rows) - self.share * reference

        decided = replace(self, classes=classes, against=others if self.similar else against)
        return Bound(scorer(formula, classes), decided, classes=classes)


def contrast(classes: Classes, against: Classes) -> Callable[[Any], torch.Tensor]:
    r"""Explains why the model prefers some classes to others: the difference of their logits.

    .. math:: y = z_c - \operatorname{mean}_{j \in \text{against}} z_j

    If the class c is compared with itself, the score is zero, and so is a map that depends on the score.

    Args:
        classes: classes as ``target=`` takes them; ``None`` for the predicted class of each image.
        against: the class to compare with: ``None`` for the predicted class of each image, one class for all
            images, or one per image ``(N,)``. Of several classes per image, ``(N, K)``, their mean is used.

    Returns:
        A target. A call with it raises a ``ValueError`` if the model has fewer than two classes.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.contrast(1, against=0)(torch.tensor([[2.0, 5.0, 1.0]]))
        tensor([3.])
    """
    return ClassContrast(classes, against, 1.0)


def finer(classes: Classes = None, *, share: float = 0.6, similar: int = 3) -> Callable[[Any], torch.Tensor]:
    r"""Explains the difference between a class and the classes that are most similar to it (Finer-CAM).

    .. math:: y = z_c - \gamma \operatorname{mean}_{j \in S(c)} z_j

    S(c) are the classes whose logits are nearest to the logit of c in the first forward pass.

    Args:
        classes: classes as ``target=`` takes them; by default the predicted class of each image.
        share: :math:`\gamma`, the share of the mean logit that is subtracted, zero or more.
        similar: number of similar classes, one or more. If the model has fewer other classes, all of them are
            used.

    Returns:
        A target for any method. With :class:`camkit.GradCAM` it is the method of the paper. A call with it
        raises a ``ValueError`` if the model has fewer than two classes.

    Raises:
        ValueError: if ``similar`` or ``share`` is out of range.
        TypeError: if ``similar`` is not an int, or ``share`` is not a number.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.finer(0, share=0.5, similar=1)(torch.tensor([[5.0, 4.0, 1.0]]))
        tensor([3.])

    References:
        Zhang et al., *Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation*,
        CVPR 2025.
    """
    checks.positive("similar", similar)
    checks.not_negative("share", share)
    return ClassContrast(classes, None, share, similar)
