"""Tensors in nested tuples, lists and dicts: what models return and functions take."""

from collections.abc import Iterator
from typing import Any

import torch


def tensors_in(nested: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and slices, in order."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from tensors_in(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from tensors_in(value)


def detached(nested: Any) -> Any:
    """``nested`` with every tensor in its tuples, lists and dicts out of the graph."""
    if isinstance(nested, torch.Tensor):
        return nested.detach()
    if isinstance(nested, dict):
        new = nested.copy()
        new.update((key, detached(value)) for key, value in nested.items())
        return new
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*map(detached, nested))
    if isinstance(nested, list | tuple):
        return type(nested)(map(detached, nested))
    return nested
