"""Makes the :class:`camkit.Evidence` that a method receives from a forward pass."""

from typing import Any

from torch import Tensor, nn

from camkit import Evidence, Inputs
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.passes.evidence import gather


def evidence_at(
    model: nn.Module, x: Tensor, layer: str, target: Any = 1, *, gradient: bool = False
) -> Evidence:
    """The evidence at one layer of a model that is in evaluation mode."""
    place = locate(DryRun.of(model, (2, *x.shape[1:])), layer)
    return gather(model, Inputs(x), target, [place], gradient=gradient)[0]
