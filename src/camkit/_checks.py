"""Argument checks, all in one wording: what it is about, what was expected, what came."""

import difflib
import itertools
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import nn

from camkit._modules import has_meta


def complaint(name: str, expected: str, got: object, hint: str = "") -> str:
    """The one wording of every error: ``name: expected ..., got ...; hint``."""
    return f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else "")


def shape_of(tensor: torch.Tensor | Sequence[int]) -> str:
    """A shape as ``2 x 3 x 224 x 224``."""
    return " x ".join(str(n) for n in getattr(tensor, "shape", tensor)) or "a single number"


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(complaint(name, f"one of {', '.join(map(repr, choices))}", repr(value)))


def close_matches(name: str, names: Sequence[str]) -> str:
    """A hint that lists the names most like ``name``; empty where none is."""
    # Somebody who gives 'layer4.bn2' means 'layer4.1.bn2': the same last part counts as like it.
    tail = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close += [n for n in names if n.rpartition(".")[2] == tail and n not in close][-2:]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def module(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(complaint(name, "a torch.nn.Module", type(value).__name__))


def tensor(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(complaint(name, "a tensor", type(value).__name__))


def has_numbers(modules: Sequence[nn.Module]) -> None:
    """Raise a ``ValueError`` if a tensor of a model's modules, the model first, is on the meta device."""
    if has_meta(modules):
        tensors = itertools.chain(modules[0].named_parameters(), modules[0].named_buffers())
        empty = next(name for name, tensor in tensors if tensor.is_meta)
        hint = "load_state_dict(..., assign=True) gives them"
        raise ValueError(complaint("model", "weights", f"{empty!r} on the meta device", hint))


_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_AXES = {3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, T, H, W)"}


def batch(modules: Sequence[nn.Module], x: torch.Tensor) -> None:
    """Raise unless ``x`` is images with a batch dimension, as the first convolution takes, of numbers."""
    if not x.is_floating_point():
        hint = "transforms such as weights.transforms() make floats of a picture"
        raise TypeError(complaint("x", "floats", x.dtype, hint))
    if x.is_meta:
        raise ValueError(complaint("x", "numbers", "a tensor on the meta device"))
    has_numbers(modules)
    if x.numel() == 0:
        raise ValueError(complaint("x", "a batch that is not empty", f"shape {shape_of(x)}"))
    # The sum tells most quickly; it may overflow by itself.
    if not math.isfinite(x.sum().item()) and not x.isfinite().all():
        raise ValueError(complaint("x", "finite values", "NaN or infinity"))
    expected = next(
        (ndim for m in modules for kind, ndim in _CONVOLUTIONS.items() if isinstance(m, kind)),
        None,
    )
    # torch's convolutions take a single image too, and what follows them then reads it wrongly.
    if expected is not None and x.ndim == expected - 1:
        axes = _AXES[expected]
        raise ValueError(
            complaint("x", f"a batch {axes}", f"shape {shape_of(x)}", "add the batch with x[None]")
        )


def warn(message: str) -> None:
    """Warn, as of the line outside camkit that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def positive(name: str, value: object) -> None:
    """Raise unless ``value`` is an int above zero."""
    index(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(complaint(name, "a positive number", value))


def index(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(complaint(name, "an int", type(value).__name__))


def seed(value: object) -> None:
    """Raise unless ``value`` is an int from zero on."""
    index("seed", value)
    if value < 0:  # type: ignore[operator]
        raise ValueError(complaint("seed", "zero or more", value))


def lengths(name: str, expected: str, value: object, count: int | None = None) -> None:
    """Raise unless ``value`` is positive ints, so many if it is told."""
    if not isinstance(value, list | tuple) or not all(isinstance(n, Integral) for n in value):
        raise TypeError(complaint(name, expected, repr(value)))
    if count not in (None, len(value)) or min(value, default=0) < 1:
        raise ValueError(complaint(name, expected, value))


def not_negative(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number from zero on."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(complaint(name, "a number", type(value).__name__))
    if not 0 <= value < float("inf"):
        raise ValueError(complaint(name, "a finite number, zero or more", value))
