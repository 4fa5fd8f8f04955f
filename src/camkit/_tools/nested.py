"""Tensors in nested tuples, lists, dicts and dataclasses: what models return and functions take."""

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch


def tensors_in(nested: object) -> Iterator[torch.Tensor]:
    """Every tensor in there, in order."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from tensors_in(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        yield from tensors_in([getattr(nested, field.name) for field in dataclasses.fields(nested)])


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def map_leaves(
    function: Callable[[Any], Any], nested: Any, is_leaf: Callable[[object], bool] = _is_tensor
) -> Any:
    """``nested`` with ``function`` of every leaf in its place; tensors are leaves, if not told otherwise."""
    if is_leaf(nested):
        return function(nested)
    if isinstance(nested, dict):
        new = copy.copy(nested)
        for key, value in nested.items():
            new[key] = map_leaves(function, value, is_leaf)
        return new
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(map_leaves(function, value, is_leaf) for value in nested))
    if isinstance(nested, list | tuple):
        return type(nested)(tuple(map_leaves(function, value, is_leaf) for value in nested))
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        names = [field.name for field in dataclasses.fields(nested) if field.init]
        new_values = {name: map_leaves(function, getattr(nested, name), is_leaf) for name in names}
        return dataclasses.replace(nested, **new_values)
    return nested


def detach_all(nested: Any) -> Any:
    """``nested`` with every tensor in it out of the graph."""
    return map_leaves(torch.Tensor.detach, nested)


def split(nested: Any, size: int, total: int) -> list[Any]:
    """A model's output for ``total`` images as one such output for each ``size`` of them.

    Tensors are cut along their first dimension, and so is a list of one thing per image, as detectors return
    it; what has not a row per image is in every part.
    """

    def is_row_by_row(value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return value.ndim > 0 and len(value) == total
        if type(value) not in (list, tuple) or len(value) != total:  # type: ignore[arg-type]
            return False
        rows = any(tensor.ndim and len(tensor) == total for tensor in tensors_in(value))
        return not rows or all(isinstance(item, dict) for item in value)  # type: ignore[attr-defined]

    parts = [slice(start, start + size) for start in range(0, total, size)]
    return [map_leaves(operator.itemgetter(part), nested, is_row_by_row) for part in parts]
