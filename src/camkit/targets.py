"""Targets: what turns a model's output into one score per explained thing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from camkit import _checks

#: What ``target=`` takes: nothing, a class, a class or several per image, or a function of the output.
Target = (
    int
    | Sequence[int]
    | Sequence[Sequence[int]]
    | np.ndarray[Any, Any]
    | torch.Tensor
    | Callable[[Any], torch.Tensor]
    | None
)


def class_indices(target: Target, output: object) -> torch.Tensor:
    """The classes that ``target`` names, as an index tensor ``(N,)`` or ``(N, K)``.

    Args:
        target: ``None`` for each image's predicted class, an int for all images, N ints, or N x K ints.
        output: the model's output, logits ``(N, classes)``.

    Raises:
        ValueError: for a class out of range, and for a wrong number of targets.
        TypeError: for a target or an output of another kind.
    """
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        got = (
            f"an output of {_checks.shape_of(output)}"
            if isinstance(output, torch.Tensor)
            else f"an output of type {type(output).__name__}"
        )
        hint = "give target= a function from the output to one score per image"
        raise TypeError(_checks.complaint("target", "a model with logits (N, classes)", got, hint))
    if target is None:
        return output.detach().argmax(1)
    count, classes = output.shape
    if isinstance(target, torch.Tensor):
        indices = target.detach()
    else:
        try:
            indices = torch.as_tensor(np.asarray(target))
        except (TypeError, ValueError) as error:
            expected = "an int, N ints, N x K ints or a function of the output"
            got = repr(target) if isinstance(target, str | list | tuple) else type(target).__name__
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


def scores(target: Target, output: Any, count: int) -> tuple[torch.Tensor, Any]:
    """The scores that ``target`` gives, ``(N,)`` or ``(N, K)``, and the target as it is reported.

    Args:
        target: see :func:`class_indices`; or a function from the model's output to such scores.
        output: the model's output.
        count: number of images, N.

    Raises:
        ValueError: for a class out of range, and for a wrong number of targets or scores.
        TypeError: for a target or an output of another kind.
    """
    if not callable(target):
        indices = class_indices(target, output)
        rows = indices.reshape(count, -1)
        return output.gather(1, rows).reshape(indices.shape), indices
    result = target(output)
    if not isinstance(result, torch.Tensor):
        raise TypeError(
            _checks.complaint("target", "a function that returns a tensor", type(result).__name__)
        )
    if result.ndim not in (1, 2) or len(result) != count:
        expected = f"a function that returns {count} or {count} x K scores for {count} images"
        raise ValueError(_checks.complaint("target", expected, _checks.shape_of(result) or "a single number"))
    return result, target
