"""Tensors in nested tuples, lists, dicts and dataclasses: what models return and functions take."""

import copy
import dataclasses
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


def mapped(function: Callable[[torch.Tensor], torch.Tensor], nested: Any) -> Any:
    """``nested`` with ``function`` of every tensor in the tensor's place."""
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, dict):
        new = copy.copy(nested)
        for key, value in nested.items():
            new[key] = mapped(function, value)
        return new
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(mapped(function, value) for value in nested))
    if isinstance(nested, list | tuple):
        return type(nested)(tuple(mapped(function, value) for value in nested))
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        fields = [field.name for field in dataclasses.fields(nested) if field.init]
        return dataclasses.replace(nested, **{n: mapped(function, getattr(nested, n)) for n in fields})
    return nested


def detached(nested: Any) -> Any:
    """``nested`` with every tensor in it out of the graph."""
    return mapped(torch.Tensor.detach, nested)


def split(nested: Any, size: int, total: int) -> list[Any]:
    """A model's output for ``total`` images as one such output for each ``size`` of them.

    Tensors are cut along their first dimension, and so is a list of one dict per image, as detectors return
    it; what has not a row per image is in every part.
    """
    parts = [slice(start, start + size) for start in range(0, total, size)]
    if isinstance(nested, list) and len(nested) == total and all(isinstance(item, dict) for item in nested):
        return [nested[part] for part in parts]

    def cut(tensor: torch.Tensor, part: slice) -> torch.Tensor:
        return tensor[part] if tensor.ndim and len(tensor) == total else tensor

    return [mapped(lambda tensor, part=part: cut(tensor, part), nested) for part in parts]  # type: ignore[misc]
