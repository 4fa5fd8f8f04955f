"""Tensors in nested tuples, lists, dicts and dataclasses: what models return and functions take."""

import copy
import dataclasses
from collections.abc import Iterator
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


def detached(nested: Any) -> Any:
    """``nested`` with every tensor in it out of the graph."""
    if isinstance(nested, torch.Tensor):
        return nested.detach()
    if isinstance(nested, dict):
        new = copy.copy(nested)
        for key, value in nested.items():
            new[key] = detached(value)
        return new
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*map(detached, nested))
    if isinstance(nested, list | tuple):
        return type(nested)(tuple(map(detached, nested)))
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        fields = [field.name for field in dataclasses.fields(nested) if field.init]
        return dataclasses.replace(nested, **{name: detached(getattr(nested, name)) for name in fields})
    return nested
