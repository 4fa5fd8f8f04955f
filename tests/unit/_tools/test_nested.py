"""Nested outputs of models: mapping, detaching and splitting the tensors that they hold."""

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from camkit._tools.nested import detach_all, map_leaves, split, tensors_in


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Output:
    logits: Any
    name: str = "a"
    double: Any = field(init=False)

    def __post_init__(self) -> None:
        self.double = self.logits * 2


@dataclass(frozen=True)
class Frozen:
    logits: Any


def plain(nested: Any) -> Any:
    """Replaces tensors by lists of numbers, so that two nested values can be compared with ``==``."""
    if isinstance(nested, Tensor):
        return nested.tolist()
    if isinstance(nested, dict):
        return type(nested), [(key, plain(value)) for key, value in nested.items()]
    if isinstance(nested, list | tuple):
        return type(nested), [plain(value) for value in nested]
    if isinstance(nested, Output | Frozen):
        return type(nested), plain(vars(nested))
    return nested


def rows(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


#: Functions that put a tensor into an output of each kind that models return.
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t,
    "dict": lambda t: {"b": t, "a": 3, 0: [t]},
    "ordered dict": lambda t: OrderedDict(b=t, a=None),
    "tuple": lambda t: (t, "b"),
    "list": lambda t: [t, (t, [])],
    "named tuple": lambda t: Pair(None, t),
    "torch's named tuple": lambda t: torch.return_types.max((t, t)),
    "dataclass": lambda t: Output(t, "b"),
    "frozen dataclass": lambda t: Frozen({"a": Pair(1, [t])}),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
def test_mapped(make: Callable[[Tensor], Any]) -> None:
    nested = make(rows(1, 2))
    assert plain(map_leaves(lambda t: t + 1, nested)) == plain(make(rows(2, 3)))
    assert plain(nested) == plain(make(rows(1, 2)))


def test_what_is_no_tensor_is_handed_on() -> None:
    other = object()
    assert map_leaves(torch.neg, {"a": [other]})["a"][0] is other
    assert map_leaves(torch.neg, Output) is Output  # a class itself is not a dataclass object
    assert list(tensors_in([other, Output, "a", None])) == []


@kinds
def test_detached(make: Callable[[Tensor], Any]) -> None:
    leaf = rows(1, 2).requires_grad_()
    found = detach_all(make(leaf * 2))
    assert plain(found) == plain(make(rows(2, 4)))
    assert not any(tensor.requires_grad for tensor in tensors_in(found))


def test_tensors_in_their_order() -> None:
    a, b, c, d = (torch.tensor(number) for number in range(4))
    nested = {"z": a, "a": (Pair([b], c), "x"), "b": [Output(d)]}
    assert [tensor.item() for tensor in tensors_in(nested)] == [0, 1, 2, 3, 6]
    assert next(tensors_in(nested)) is a


@kinds
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_split(make: Callable[[Tensor], Any], size: int) -> None:
    numbers = [float(number) for number in range(6)]
    parts = split(make(rows(*numbers)), size, 6)
    assert len(parts) == 6 // size
    for i, part in enumerate(parts):
        assert plain(part) == plain(make(rows(*numbers[i * size : (i + 1) * size])))


def test_what_has_no_row_per_image_is_in_every_part() -> None:
    loss, prototypes = torch.tensor(6.0), torch.rand(5, 6)
    for i, part in enumerate(split({"y": rows(0, 1, 2), "loss": loss, "more": (prototypes, 3)}, 1, 3)):
        assert part["y"].tolist() == [[i]]
        assert part["loss"] is loss
        assert part["more"][0] is prototypes
    for part in split([loss, prototypes], 1, 3):
        assert part[0] is loss
        assert part[1] is prototypes


@pytest.mark.parametrize("counts", [[3, 0, 1, 9], [3, 0, 4, 1], [4, 4, 4, 4]])
def test_a_list_of_one_dict_per_image_is_cut(counts: list[int]) -> None:
    """The same holds for an image with as many detections as there are images."""
    found = [{"scores": torch.rand(n), "boxes": torch.rand(n, 4)} for n in counts]
    first, second = split(found, 2, 4)
    assert all(map(operator.is_, [*first, *second], found))
    assert (len(first), len(second)) == (2, 2)


def test_a_list_of_one_tensor_per_image_is_cut() -> None:
    masks = [torch.rand(5, 7), torch.rand(6, 2), torch.rand(1, 1)]
    assert all(part[0] is mask for part, mask in zip(split(masks, 1, 3), masks, strict=True))


def test_a_list_of_as_many_batches_as_images_is_cut_image_by_image() -> None:
    levels = [rows(0, 1, 2), rows(3, 4, 5), rows(6, 7, 8)]
    assert [plain(part)[1] for part in split(levels, 1, 3)] == [
        [[[0]], [[3]], [[6]]],
        [[[1]], [[4]], [[7]]],
        [[[2]], [[5]], [[8]]],
    ]


def test_a_list_of_dicts_that_are_not_one_per_image() -> None:
    levels = [{"y": rows(0, 1, 2)}, {"y": rows(3, 4, 5)}]
    assert [[level["y"].tolist() for level in part] for part in split(levels, 1, 3)] == [
        [[[0]], [[3]]],
        [[[1]], [[4]]],
        [[[2]], [[5]]],
    ]
