"""Argument checks, all in one wording: what it is about, what was expected, what came."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch


def error_message(name: str, expected: str, got: object, hint: str = "") -> str:
    """The one wording of every error: ``name: expected ..., got ...; hint``."""
    return f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else "")


def shape_of(tensor: torch.Tensor | Sequence[int]) -> str:
    """A shape as ``2 x 3 x 224 x 224``."""
    return " x ".join(str(n) for n in getattr(tensor, "shape", tensor)) or "a single number"


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(error_message(name, f"one of {', '.join(map(repr, choices))}", repr(value)))


def close_matches(name: str, names: Sequence[str]) -> str:
    """A hint that lists the names most like ``name``; empty where none is."""
    # Somebody who gives 'layer4.bn2' means 'layer4.1.bn2': the same last part counts as like it.
    tail = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close += [n for n in names if n.rpartition(".")[2] == tail and n not in close][-2:]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def tensor(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(error_message(name, "a tensor", type(value).__name__))


def warn(message: str) -> None:
    """Warn, as of the line outside camkit that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "camkit":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def positive(name: str, value: object) -> None:
    """Raise unless ``value`` is an int above zero."""
    index(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(error_message(name, "a positive number", value))


def index(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(error_message(name, "an int", type(value).__name__))


def seed(value: object) -> None:
    """Raise unless ``value`` is an int from zero on."""
    index("seed", value)
    if value < 0:  # type: ignore[operator]
        raise ValueError(error_message("seed", "zero or more", value))


def lengths(name: str, expected: str, value: object, count: int | None = None) -> None:
    """Raise unless ``value`` is positive ints, so many if it is told."""
    if not isinstance(value, list | tuple) or not all(isinstance(n, Integral) for n in value):
        raise TypeError(error_message(name, expected, repr(value)))
    if count not in (None, len(value)) or min(value, default=0) < 1:
        raise ValueError(error_message(name, expected, value))


def not_negative(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number from zero on."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(error_message(name, "a number", type(value).__name__))
    if not 0 <= value < float("inf"):
        raise ValueError(error_message(name, "a finite number, zero or more", value))
