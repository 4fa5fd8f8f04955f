"""The inputs of a model: the images, and everything else that its forward pass takes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from camkit._tools import checks
from camkit._tools.nested import map_leaves
from camkit.model.modules import require_numbers

#: The type of ``x``: images, or several inputs of which one is the images. The model gets the entries of a
#: tuple by position, and those of a dict by name.
Input = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]


class UnfitError(ValueError):
    """An error whose reason is known: the images do not fit the model, or its output holds no tensor.

    After any other error of a forward pass, a dry run starts again with numbers instead of shapes. After this
    one it does not, because numbers would not help.
    """


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call of the model.

    Attributes:
        given: the inputs as the user gave them: a tensor, or a tuple or dict.
        place: where in ``given`` the images are: an index or a name; ``None`` if ``given`` is the images.
        argument: the name of the user's argument, for error messages.
        modules: every module of the model that the inputs were checked for; empty before the check.
    """

    given: Any
    place: int | str | None = None
    argument: str = "x"
    modules: Sequence[nn.Module] = field(default=(), repr=False)

    @classmethod
    def of(cls, x: Input) -> "Inputs":
        """Finds the images: the first floating-point tensor with spatial dimensions, ``(N, C, *spatial)``.

        Raises:
            TypeError: if ``x`` is not a tensor, tuple or dict, or if it holds no images.
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
        """Finds the images as :meth:`of` does, and checks that they are a batch that can be explained.

        Args:
            x: the inputs.
            modules: every module of the model, the model itself first.

        Raises:
            ValueError: if the images have no batch dimension, are empty or hold NaN or infinity, or if the
                images or the model are on the meta device.
            TypeError: if ``x`` is not a tensor, tuple or dict, or if its images are not floats.
        """
        inputs = cls.of(x)
        _require_batch(inputs.images, modules)
        return replace(inputs, modules=modules)

    @property
    def images(self) -> torch.Tensor:
        """The images, ``(N, C, *spatial)``."""
        found: torch.Tensor = self.given if self.place is None else self.given[self.place]
        return found

    @property
    def size(self) -> tuple[int, ...]:
        """The spatial size of the images, such as ``(H, W)``.

        Raises:
            ValueError: if they have no spatial dimensions.
        """
        images = self.images
        if images.ndim < 3:
            expected = "inputs with a spatial size, (N, C, H, W)"
            raise ValueError(checks.error_message("x", expected, checks.shape_of(images)))
        return tuple(images.shape[2:])

    def with_images(self, images: torch.Tensor) -> Any:
        """Returns the inputs with other images, and fits every other tensor to them.

        - A tensor with one row per image gets as many rows as there are new images: the rows of the batch are
          repeated, in order.
        - A tensor that ends in the spatial size of the images, such as a mask, becomes zeros of the new size
          if the size changes. A dry run changes the size and needs no content. A :class:`camkit.View` that
          changes the size loses the content too.
        - Every tensor moves to the device of the new images.

        Args:
            images: the new images, ``(M, C, *spatial)``.

        Returns:
            The new inputs in the form of the old ones, a tensor, a tuple or a dict.
        """
        if self.place is None:
            return images

        def fitted(other: torch.Tensor) -> torch.Tensor:
            count, size = self.images.shape[0], self.images.shape[2:]
            other = other.to(images.device)
            if other.shape[-len(size) :] == size != images.shape[2:]:
                other = other.new_zeros(*other.shape[: -len(size)], *images.shape[2:])
            if other.ndim and len(other) == count != len(images):
                times = math.ceil(len(images) / count)
                other = other.repeat(times, *[1] * (other.ndim - 1))[: len(images)]
            return other

        others = {place: value for place, value in _items(self.given).items() if place != self.place}
        filled = {self.place: images, **map_leaves(fitted, others)}
        # The images come first in this dict, so put the entries of a tuple back in their order.
        return tuple(filled[i] for i in range(len(filled))) if isinstance(self.given, tuple) else filled

    def run(self, model: nn.Module, images: torch.Tensor) -> Any:
        """Runs the model on these inputs with other images, and returns its output.

        Args:
            model: the model.
            images: the images, ``(M, C, *spatial)``; see :meth:`with_images` for the other inputs.

        Raises:
            ValueError: for images with another dtype, device or number of channels than the model takes.
            Exception: any other error of the model's forward pass.
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
        """Describes the inputs: the dtype and shape of each tensor, and the value of everything else.

        A model may take another path for other inputs, so a dry run is reused only for inputs of the same
        description. If the images are the only input, the description is empty.
        """
        return "" if self.place is None else repr(map_leaves(_kind, _items(self.given)))


def _mismatch_message(argument: str, model: nn.Module, images: torch.Tensor, error: str) -> str | None:
    """Explains an error of torch if the reason is that the images do not fit the model.

    Args:
        argument: the name of the user's argument.
        model: the model that raised the error.
        images: the images that it was run on.
        error: the text of torch's error.

    Returns:
        A message about the images; ``None`` if the error seems to have another reason.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) == 1 and images.device not in devices:
        return checks.error_message(argument, f"images on {devices.pop()}, where the model is", images.device)
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(types) == 1 and images.dtype not in types and "type" in error:
        return checks.error_message(
            argument, f"{types.pop()}, the type of the model's parameters", images.dtype
        )
    # torch: "... expected input[2, 1, 12, 10] to have 3 channels, but got 1 channels instead". The shape in
    # the message shows whether it is about the images or about a tensor deeper in the model.
    channels = re.search(r"to have (\d+) channels", error)
    if channels and str(list(images.shape)) in error:
        expected = f"{channels[1]} channels for {type(model).__name__}"
        got = f"{images.shape[1]}, in {checks.shape_of(images.shape[1:])}"
        hint = "the channels come first" if images.shape[-1] == int(channels[1]) else ""
        return checks.error_message(argument, expected, got, hint)
    return None


def _items(given: tuple[Any, ...] | Mapping[str, Any]) -> dict[Any, Any]:
    """Returns the inputs by their index or name."""
    return dict(given) if isinstance(given, Mapping) else dict(enumerate(given))


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {checks.shape_of(value)}"
    return type(value).__name__


# Number of dimensions of a batch for each convolution, and the names of these dimensions.
_BATCH_NDIM = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_AXES = {3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, T, H, W)"}


def _require_batch(x: torch.Tensor, modules: Sequence[nn.Module]) -> None:
    """Raises unless ``x`` is a batch of finite numbers that the first convolution can take."""
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
    # Summing is quicker than testing every value, and the sum is not finite if a value is NaN or infinity. It
    # may also overflow on finite values, so test every value before the images are refused.
    if not math.isfinite(x.sum().item()) and not x.isfinite().all():
        raise ValueError(checks.error_message("x", "finite values", "NaN or infinity"))
    expected = next(
        (ndim for m in modules for kind, ndim in _BATCH_NDIM.items() if isinstance(m, kind)),
        None,
    )
    # torch's convolutions also accept one image without a batch dimension. The layers after them would take
    # its channels for a batch.
    if expected is not None and x.ndim == expected - 1:
        got, hint = f"shape {checks.shape_of(x)}", "add the batch with x[None]"
        raise ValueError(checks.error_message("x", f"a batch {_AXES[expected]}", got, hint))
