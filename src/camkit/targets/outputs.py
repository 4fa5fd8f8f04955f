"""Targets for models that return something other than logits: segmentation, detections, embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from camkit._tools import checks


def pixels(mask: torch.Tensor | np.ndarray[Any, Any], category: int) -> Callable[[Any], torch.Tensor]:
    r"""Explains a category of a segmentation, summed over a set of pixels.

    .. math:: y = \sum_{(i, j) \in \text{mask}} z_{c, i, j}

    The output of the model is ``(N, classes, H, W)``, with the scores z of every class at every pixel.

    Args:
        mask: bools, true at the pixels to sum over: ``(H, W)`` for all images, or ``(N, H, W)``. The size is
            that of the output.
        category: index of the class c.

    Returns:
        A target. If the output is a dict, as torchvision's segmentation models return it, use
        ``key("out", pixels(mask, category))``. A call with it raises a ``TypeError`` if the output is not
        ``(N, classes, H, W)``, and a ``ValueError`` if the mask or the category does not fit the output.

    Raises:
        ValueError: if the mask is not of bools, or has no pixel for some image.
        TypeError: if ``category`` is not an int.

    Example:
        >>> import camkit, torch
        >>> mask = torch.tensor([[True, False], [True, False]])
        >>> camkit.targets.pixels(mask, 1)(torch.ones(1, 3, 2, 2))
        tensor([2.])

    References:
        Vinogradova et al., *Towards Interpretable Semantic Segmentation via Gradient-weighted Class
        Activation Mapping*, AAAI 2020.
    """
    chosen = torch.as_tensor(mask)
    checks.index("category", category)
    if chosen.dtype != torch.bool or chosen.ndim not in (2, 3):
        got = f"{chosen.dtype}, {checks.shape_of(chosen)}"
        raise ValueError(checks.error_message("mask", "bools (H, W) or (N, H, W)", got))
    if not chosen.flatten(-2).any(-1).all():
        raise ValueError(checks.error_message("mask", "at least one pixel per image", "an empty mask"))

    def score(output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            got = checks.shape_of(output) if isinstance(output, torch.Tensor) else type(output).__name__
            expected = "a model with output (N, classes, H, W)"
            hint = "of a dict of outputs take one with camkit.targets.key"
            raise TypeError(checks.error_message("target", expected, got, hint))
        if not 0 <= category < output.shape[1]:
            expected = f"a category in [0, {output.shape[1]})"
            raise ValueError(checks.error_message("category", expected, category))
        if chosen.shape[-2:] != output.shape[-2:] or (chosen.ndim == 3 and len(chosen) != len(output)):
            size = checks.shape_of(output.shape[-2:])
            expected = f"the output's size {size}, for all or each of {len(output)} images"
            raise ValueError(checks.error_message("mask", expected, checks.shape_of(chosen)))
        inside = chosen.to(output.device).expand(len(output), *output.shape[-2:])
        # Use where() and not a product, which would turn an infinite score outside the mask into NaN.
        return torch.where(inside, output[:, category], 0).sum((1, 2))

    return score


def box(corners: Sequence[float] | torch.Tensor, label: int) -> Callable[[Any], torch.Tensor]:
    r"""Explains one box of a detector, by the detection that matches it best.

    .. math:: y = \max_{j:\, l_j = l} s_j \operatorname{IoU}(b_j, b)

    The maximum is over the detections j that have the label l. The score of each is multiplied by the overlap
    of its box with the box b, the intersection over union. If there is no such detection, as may happen while
    a method masks the input, the result is zero.

    Args:
        corners: the box b as ``(x1, y1, x2, y2)`` with x1 < x2 and y1 < y2: ``(4,)`` for all images, or one
            per image ``(N, 4)``.
        label: the label l of the box.

    Returns:
        A target for models that return one dict per image, with ``boxes``, ``labels`` and ``scores``, as
        torchvision's detectors do. A call with it raises a ``TypeError`` for another output, and a
        ``ValueError`` if the number of boxes is not that of the images.

    Raises:
        ValueError: if ``corners`` is not a box, or not one per image.
        TypeError: if ``label`` is not an int.

    Example:
        >>> import camkit, torch
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
        >>> found = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
        >>> camkit.targets.box((0, 0, 4, 2), label=1)([found])
        tensor([0.5000])

    References:
        Petsiuk et al., *Black-box Explanation of Object Detectors via Saliency Maps*, CVPR 2021. Their
        similarity also compares the probabilities of all classes.
    """
    wanted = torch.as_tensor(corners)
    checks.index("label", label)
    if wanted.ndim not in (1, 2) or wanted.shape[-1] != 4 or not (wanted[..., 2:] > wanted[..., :2]).all():
        expected = "(x1, y1, x2, y2) with x1 < x2 and y1 < y2, or one such per image"
        raise ValueError(checks.error_message("corners", expected, wanted.tolist()))

    def score(output: Any) -> torch.Tensor:
        keys = {"boxes", "labels", "scores"}
        per_image = output if isinstance(output, list | tuple) else [None]  # None fails the check below
        if not all(isinstance(found, dict) and keys <= found.keys() for found in per_image):
            expected = "a detector, whose output per image is a dict with boxes, labels and scores"
            raise TypeError(checks.error_message("target", expected, type(output).__name__))
        if wanted.ndim == 2 and len(wanted) != len(output):
            raise ValueError(checks.error_message("corners", f"{len(output)} boxes", len(wanted)))
        rows = wanted.expand(len(output), 4)
        return torch.stack([best(found, one) for found, one in zip(output, rows, strict=True)])

    def best(found: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        boxes = found["boxes"]
        fits = _iou(boxes, one.to(boxes)) * found["scores"] * (found["labels"] == label)
        # Append a zero, the score if nothing is detected: the maximum of an empty tensor would raise.
        return torch.cat([fits, fits.new_zeros(1)]).amax()

    return score


def _iou(boxes: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes ``(M, 4)`` with one box ``(4,)``, as ``(M,)``."""
    # The sides of the intersection, zero if the boxes lie apart.
    sides = (torch.minimum(boxes[:, 2:], one[2:]) - torch.maximum(boxes[:, :2], one[:2])).clamp(min=0)
    shared = sides.prod(1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + (one[2:] - one[:2]).prod() - shared)


def similarity(embedding: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    r"""Explains why an image resembles another one: the cosine similarity of their embeddings.

    .. math:: y = \frac{f \cdot e}{\lVert f \rVert \, \lVert e \rVert}

    The output f of the model is an embedding ``(N, D)``.

    Args:
        embedding: the embedding e to compare with: ``(D,)`` for all images, or one per image ``(N, D)``.

    Returns:
        A target, with scores in [-1, 1]. A call with it raises a ``ValueError`` if the output is not
        ``(N, D)``, or if ``embedding`` does not fit it.

    Raises:
        TypeError: if ``embedding`` is not a tensor.

    Example:
        >>> import camkit, torch
        >>> camkit.targets.similarity(torch.tensor([2.0, 0.0]))(torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])
    """
    checks.tensor("embedding", embedding)

    def score(output: Any) -> torch.Tensor:
        is_embedding = isinstance(output, torch.Tensor) and output.ndim == 2
        if not is_embedding or embedding.shape not in (output.shape[1:], output.shape):
            got = checks.shape_of(output) if isinstance(output, torch.Tensor) else type(output).__name__
            expected = f"a model with output (N, D) for an embedding of {checks.shape_of(embedding)}"
            raise ValueError(checks.error_message("target", expected, got))
        return torch.cosine_similarity(output, embedding.to(output).expand_as(output), dim=1)

    return score
