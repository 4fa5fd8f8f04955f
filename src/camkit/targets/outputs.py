"""Targets for outputs other than logits: segmentation, detection, embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from camkit._tools import checks


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
    checks.index("label", label)
    if wanted.ndim not in (1, 2) or wanted.shape[-1] != 4 or not (wanted[..., 2:] > wanted[..., :2]).all():
        expected = "(x1, y1, x2, y2) with x1 < x2 and y1 < y2, or one such per image"
        raise ValueError(checks.error_message("corners", expected, wanted.tolist()))

    def score(output: Any) -> torch.Tensor:
        keys = {"boxes", "labels", "scores"}
        per_image = output if isinstance(output, list | tuple) else [None]
        if not all(isinstance(found, dict) and keys <= found.keys() for found in per_image):
            expected = "a detector, whose output per image is a dict with boxes, labels and scores"
            raise TypeError(checks.error_message("target", expected, type(output).__name__))
        if wanted.ndim == 2 and len(wanted) != len(output):
            raise ValueError(checks.error_message("corners", f"{len(output)} boxes", len(wanted)))
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
    checks.tensor("embedding", embedding)

    def score(output: Any) -> torch.Tensor:
        fits = isinstance(output, torch.Tensor) and output.ndim == 2
        if not fits or embedding.shape not in (output.shape[1:], output.shape):
            got = checks.shape_of(output) if isinstance(output, torch.Tensor) else type(output).__name__
            expected = f"a model with output (N, D) for an embedding of {checks.shape_of(embedding)}"
            raise ValueError(checks.error_message("target", expected, got))
        return torch.cosine_similarity(output, embedding.to(output).expand_as(output), dim=1)

    return score
