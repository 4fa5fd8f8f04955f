"""What a model is called with: images, and whatever else goes in beside them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from camkit._tools import checks
from camkit._tools.nested import map_leaves
from camkit.model.modules import require_numbers

#: What explainers take for ``x``: images, or several inputs of which one is the images. A tuple goes into the
#: model by position, a dict by name.
Input = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]


class UnfitError(ValueError):
    """Images that a model cannot take, or an output of no use, for a reason that is known."""


@dataclass(frozen=True)
class Inputs:
    """Everything that one call of the model takes.

    Attributes:
        given: as the user gave it.
        place: where in it the images are: an index, a name, or ``None`` where there is nothing else.
        argument: what the user calls it.
    """

    given: Any
    place: int | str | None = None
    argument: str = "x"

    @classmethod
    def of(cls, x: Input) -> "Inputs":
        """Finds the images: the first tensor of floats with a spatial size.

        Raises:
            TypeError: if ``x`` is no input, or holds no images.
        """
        if isinstance(x, torch.Tensor):
            return cls(x)
        if not isinstance(x, tuple | Mapping):
            hint = "torch.stack makes one of several images" if isinstance(x, list) else ""
            expected = "a tensor, or a tuple or dict of the model's inputs"
            raise TypeError(checks.error_message("x", expected, type(x).__name__, hint))
        items = _items(x)
        for place, value in items.items():
            if isinstance(value, torch.Tensor) and value.ndim > 2 and value.is_floating_point():
                return cls(x, place)
        got = ", ".join(f"{place!r}: {_kind(value)}" for place, value in items.items()) or "nothing"
        raise TypeError(checks.error_message("x", "images among the inputs, floats (N, C, H, W)", got))

    @classmethod
    def checked(cls, x: Input, modules: Sequence[nn.Module]) -> "Inputs":
        """As :meth:`of`, if the images are a batch of numbers, for a model of these modules.

        Raises:
            ValueError: for images without a batch, without numbers, or for a model without them.
            TypeError: if ``x`` is no input, or holds no images.
        """
        inputs = cls.of(x)
        batch(modules, inputs.images)
        return inputs

    @property
    def images(self) -> torch.Tensor:
        """The images, ``(N, C, *size)``."""
        found: torch.Tensor = self.given if self.place is None else self.given[self.place]
        return found

    @property
    def size(self) -> tuple[int, ...]:
        """The images' spatial size.

        Raises:
            ValueError: if they have none.
        """
        images = self.images
        if images.ndim < 3:
            expected = "inputs with a spatial size, (N, C, H, W)"
            raise ValueError(checks.error_message("x", expected, checks.shape_of(images)))
        return tuple(images.shape[2:])

    def with_images(self, images: torch.Tensor) -> Any:
        """What was given, with other images and as many rows of everything else that has one per image.

        The rows are those of the batch again and again. What has the images' size gets that of the new ones,
        without content: only a dry run changes it. All is on the new images' device.
        """
        if self.place is None:
            return images

        def fitted(other: torch.Tensor) -> torch.Tensor:
            count, size = self.images.shape[0], self.images.shape[2:]
            other = other.to(images.device)
            if other.shape[-len(size) :] == size != images.shape[2:]:
                other = other.new_zeros(*other.shape[: -len(size)], *images.shape[2:])
            if other.ndim and len(other) == count != len(images):
                times = -(-len(images) // count)
                other = other.repeat(times, *[1] * (other.ndim - 1))[: len(images)]
            return other

        rest = {place: value for place, value in _items(self.given).items() if place != self.place}
        filled = {self.place: images, **map_leaves(fitted, rest)}
        given = self.given
        return tuple(map(filled.get, range(len(given)))) if isinstance(given, tuple) else filled

    def run(self, model: nn.Module, images: torch.Tensor) -> Any:
        """The model's output for other images, or for these.

        Raises:
            ValueError: for images of another type, device or number of channels than the model takes.
            Exception: whatever else the model raises.
        """
        given = self.with_images(images)
        try:
            if isinstance(given, dict):
                return model(**given)
            return model(*given) if isinstance(given, tuple) else model(given)
        except RuntimeError as error:
            reason = _mismatch_message(self.argument, model, images, str(error))
            if reason is None:
                raise
            raise UnfitError(reason) from error

    def signature(self) -> str:
        """What the model's way may depend on, beside the images' size."""
        return "" if self.place is None else repr({k: _described(v) for k, v in _items(self.given).items()})


def _mismatch_message(argument: str, model: nn.Module, images: torch.Tensor, error: str) -> str | None:
    """The error_message about images that do not fit the model, if that is what torch's error is about."""
    devices = {p.device for p in model.parameters()}
    if len(devices) == 1 and images.device not in devices:
        return checks.error_message(argument, f"images on {devices.pop()}, where the model is", images.device)
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(types) == 1 and images.dtype not in types and "type" in error:
        return checks.error_message(
            argument, f"{types.pop()}, the type of the model's parameters", images.dtype
        )
    channels = re.search(r"to have (\d+) channels", error)
    if channels and str(list(images.shape)) in error:
        expected = f"{channels[1]} channels for {type(model).__name__}"
        got = f"{images.shape[1]}, in {checks.shape_of(images.shape[1:])}"
        hint = "the channels come first" if images.shape[-1] == int(channels[1]) else ""
        return checks.error_message(argument, expected, got, hint)
    return None


def _items(given: tuple[Any, ...] | Mapping[str, Any]) -> dict[Any, Any]:
    return dict(given) if isinstance(given, Mapping) else dict(enumerate(given))


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {checks.shape_of(value)}"
    return type(value).__name__


def _described(value: Any) -> str:
    described = map_leaves(_kind, value)
    return described if isinstance(described, str) else repr(described)


_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_AXES = {3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, T, H, W)"}


def batch(modules: Sequence[nn.Module], x: torch.Tensor) -> None:
    """Raise unless ``x`` is images with a batch dimension, as the first convolution takes, of numbers."""
    if not x.is_floating_point():
        hint = "transforms such as weights.transforms() make floats of a picture"
        raise TypeError(checks.error_message("x", "floats", x.dtype, hint))
    if x.is_meta:
        raise ValueError(checks.error_message("x", "numbers", "a tensor on the meta device"))
    require_numbers(modules)
    if x.numel() == 0:
        raise ValueError(
            checks.error_message("x", "a batch that is not empty", f"shape {checks.shape_of(x)}")
        )
    # The sum tells most quickly; it may overflow by itself.
    if not math.isfinite(x.sum().item()) and not x.isfinite().all():
        raise ValueError(checks.error_message("x", "finite values", "NaN or infinity"))
    expected = next(
        (ndim for m in modules for kind, ndim in _CONVOLUTIONS.items() if isinstance(m, kind)),
        None,
    )
    # torch's convolutions take a single image too, and what follows them then reads it wrongly.
    if expected is not None and x.ndim == expected - 1:
        axes = _AXES[expected]
        raise ValueError(
            checks.error_message(
                "x", f"a batch {axes}", f"shape {checks.shape_of(x)}", "add the batch with x[None]"
            )
        )
