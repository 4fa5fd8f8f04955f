"""The evidence of one forward pass, as methods get it."""

from typing import Any

from torch import Tensor, nn

from camkit import Evidence, Inputs
from camkit.layers.dryrun import DryRun
from camkit.layers.location import locate
from camkit.passes.evidence import gather


def evidence_at(
    model: nn.Module, x: Tensor, layer: str, target: Any = 1, *, gradient: bool = False
) -> Evidence:
    """The evidence of a model in evaluation mode at one layer."""
    place = locate(DryRun.of(model, (2, *x.shape[1:])), layer)
    return gather(model, Inputs(x), target, [place], gradient=gradient)[0]
