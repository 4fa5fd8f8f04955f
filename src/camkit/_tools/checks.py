"""Checks of arguments, and the wording that all error messages and warnings share.

Each check raises an error that names the argument if its value is wrong. Otherwise it returns nothing, except
for :func:`index`, which returns the value.
"""

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch


def error_message(name: str, expected: str, got: object, hint: str = "") -> str:
    """Formats an error message as ``name: expected ..., got ...; hint``.

    Args:
        name: the argument, by its name in the user's call.
        expected: a description of the values that are allowed.
        got: the value, or a description of it.
        hint: how to correct the call, if that is known.
    """
    return f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else "")


def shape_of(tensor: torch.Tensor | Sequence[int]) -> str:
    """Writes a shape, or the shape of a tensor, as ``2 x 3 x 224 x 224``."""
    return " x ".join(str(n) for n in getattr(tensor, "shape", tensor)) or "a single number"


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises a ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(error_message(name, f"one of {', '.join(map(repr, choices))}", repr(value)))


def close_matches(name: str, names: Sequence[str]) -> str:
    """Returns a hint with the names most similar to ``name``; empty if there is none."""
    # Also suggest names with the same last part: a user who writes 'layer4.bn2' may mean 'layer4.1.bn2'.
    tail = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close += [n for n in names if n.rpartition(".")[2] == tail and n not in close][-2:]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def tensor(name: str, value: object) -> None:
    """Raises a ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(error_message(name, "a tensor", type(value).__name__))


def warn(message: str) -> None:
    """Issues a warning that points to the user's line of code that called camkit."""
    # A warning usually points to the line that issues it. That line is inside camkit and would not help the
    # user, so count the frames up to the first one outside camkit.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "camkit":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


#: The wording for progress= in errors.
PROGRESS = "a function that wraps an iterable, such as tqdm.tqdm"


def positive(name: str, value: object) -> None:
    """Raises a ``TypeError`` or ``ValueError`` unless ``value`` is an int above zero."""
    if index(name, value) < 1:
        raise ValueError(error_message(name, "a positive number", value))


def index(name: str, value: object) -> int:
    """Returns ``value`` if it is an int, and raises a ``TypeError`` otherwise."""
    # Python's bool is a kind of int, but as a number it is almost certainly a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(error_message(name, "an int", type(value).__name__))
    return value


def seed(value: object) -> None:
    """Raises a ``TypeError`` or ``ValueError`` unless ``value`` is an int, zero or more."""
    if index("seed", value) < 0:
        raise ValueError(error_message("seed", "zero or more", value))


def lengths(name: str, expected: str, value: object, count: int | None = None) -> None:
    """Raises a ``TypeError`` or ``ValueError`` unless ``value`` is a list or tuple of positive ints.

    Args:
        name: the argument, by its name in the user's call.
        expected: a description of the lengths that are allowed, for the message.
        value: the argument.
        count: how many lengths there must be; any number if it is ``None``.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(n, Integral) for n in value):
        raise TypeError(error_message(name, expected, repr(value)))
    if count not in (None, len(value)) or min(value, default=0) < 1:
        raise ValueError(error_message(name, expected, value))


def optional_function(name: str, expected: str, value: object) -> None:
    """Raises a ``TypeError`` unless ``value`` is ``None`` or can be called."""
    if value is not None and not callable(value):
        raise TypeError(error_message(name, expected, type(value).__name__))


def not_negative(name: str, value: object) -> None:
    """Raises a ``TypeError`` or ``ValueError`` unless ``value`` is a finite number, zero or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(error_message(name, "a number", type(value).__name__))
    if not 0 <= value < float("inf"):
        raise ValueError(error_message(name, "a finite number, zero or more", value))
