"""Tensors inside nested tuples, lists, dicts and dataclasses, as models return them and take them."""

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch


def tensors_in(nested: object) -> Iterator[torch.Tensor]:
    """Yields every tensor in a nested value, in order. The value may also be a tensor itself."""
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
    """Copies a nested value and replaces every leaf in it by the result of a function.

    Args:
        function: function from a leaf to its replacement.
        nested: tuples, lists, dicts and dataclasses, or a leaf. It is not changed.
        is_leaf: whether a value is a leaf; by default, tensors are. Anything else that is not a container is
            kept as it is.

    Returns:
        A value of the same structure and types.
    """
    if is_leaf(nested):
        return function(nested)
    if isinstance(nested, dict):
        new = copy.copy(nested)  # keeps the type, such as OrderedDict or the output class of a library
        for key, value in nested.items():
            new[key] = map_leaves(function, value, is_leaf)
        return new
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        # A named tuple takes its fields one by one; other tuples and lists take one iterable.
        return type(nested)(*(map_leaves(function, value, is_leaf) for value in nested))
    if isinstance(nested, list | tuple):
        return type(nested)(tuple(map_leaves(function, value, is_leaf) for value in nested))
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        # replace() computes fields that __init__ does not take anew from the others.
        names = [field.name for field in dataclasses.fields(nested) if field.init]
        new_values = {name: map_leaves(function, getattr(nested, name), is_leaf) for name in names}
        return dataclasses.replace(nested, **new_values)
    return nested


def detach_all(nested: Any) -> Any:
    """Copies a nested value with every tensor in it detached from the graph."""
    return map_leaves(torch.Tensor.detach, nested)


def split(nested: Any, size: int, total: int) -> list[Any]:
    """Splits the output of a model for a batch into outputs for parts of the batch.

    Tensors with one row per image are cut along their first dimension. A list with one item per image, as
    detectors return it, is cut as well. Anything else is repeated in every part.

    Args:
        nested: the output for the whole batch.
        size: number of images of each part.
        total: number of images of the batch, a multiple of ``size``.

    Returns:
        One output for each part, in order.
    """

    def has_one_entry_per_image(value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return value.ndim > 0 and len(value) == total
        # Compare the exact type: a named tuple is also a tuple, but its number of fields is fixed.
        if not isinstance(value, list | tuple) or type(value) not in (list, tuple) or len(value) != total:
            return False
        # A list of feature maps may by chance have as many entries as the batch has images. Its tensors have
        # one row per image, so cut the tensors instead of the list. A list of dicts is the output of a
        # detector, one dict per image, and is always cut itself: a tensor in it may have as many rows as the
        # batch has images, but these rows are detections.
        holds_batches = any(tensor.ndim and len(tensor) == total for tensor in tensors_in(value))
        return not holds_batches or all(isinstance(item, dict) for item in value)

    parts = [slice(start, start + size) for start in range(0, total, size)]
    return [map_leaves(operator.itemgetter(part), nested, has_one_entry_per_image) for part in parts]
