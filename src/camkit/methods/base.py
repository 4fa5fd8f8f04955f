"""The result of every method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from camkit import maps
from camkit._tools import checks


@dataclass(frozen=True)
class Explanation:
    """One explanation of a batch.

    Attributes:
        maps: raw maps, unnormalised, at the layer's resolution: ``(N, h, w)``, or ``(N, K, h, w)`` where
            K targets per image were asked for.
        output: the model's own output in that very pass.
        target: what was explained, as ``target=`` takes it: the classes, ``(N,)`` or ``(N, K)``; or what
            was given, with its classes settled.
        layer: name of the layer; the names of several, ``"layer3, layer4"``.
        input_size: spatial size of the input.
        parts: of several layers that were fused, each one's explanation, from the shallowest layer on.
        classes: the classes that the target is about, ``(N,)`` or ``(N, K)``, if it is about classes.
    """

    maps: torch.Tensor
    output: Any
    target: Any
    layer: str
    input_size: tuple[int, ...]
    parts: tuple["Explanation", ...] = ()
    classes: torch.Tensor | None = None

    def heatmaps(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """The maps at the input's size, each scaled to [0, 1] by its own minimum and maximum.

        Args:
            size: another size, ``(H, W)``.

        Returns:
            Shape ``(N, H, W)`` or ``(N, K, H, W)``, in [0, 1]; a constant map is all zeros.

        Raises:
            ValueError: if a map holds NaN or infinity, or if ``size`` is not one.
        """
        dims = len(self.input_size)
        size = self.input_size if size is None else size
        checks.lengths("size", f"{dims} positive lengths", size, dims)
        return maps.normalize(maps.resize(self.maps, size), dims=len(size))
