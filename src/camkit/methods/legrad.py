"""LeGrad, which looks at the attention of a transformer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from camkit import maps
from camkit._tools import checks
from camkit.backward.gradients import gradients
from camkit.layers.attention import attention_blocks
from camkit.layers.dryrun import DryRun
from camkit.layers.location import Location
from camkit.methods.explainer import Explainer
from camkit.passes.attention import recorded_attention
from camkit.passes.evidence import Evidence


@dataclass(eq=False)
class LeGrad(Explainer):
    r"""LeGrad: how the score of each block's tokens depends on the block's attention.

    .. math::
        E^l_j = \operatorname{mean}_{h, i} \operatorname{ReLU}
        \Big(\frac{\partial s^l}{\partial a^l_{h i j}}\Big), \qquad
        M = \operatorname{mean}_l E^l

    with :math:`a^l_{hij}` how much, in head h of block l, token i attends to token j, and :math:`s^l` the
    score that the model's head gives to the mean token of block l. The map has the positions of the patches
    j.

    Args:
        model: a transformer of blocks with one attention over all tokens in each.
        layer: the blocks, or one; all if not given.

    Raises:
        ValueError: at the call, if a block is none such.

    Departs from the paper: nothing, before the map is normalised. A head that reads one token reads the mean
    token, as in the authors' program.

    References:
        Bousselham et al., *LeGrad: An Explainability Method for Vision Transformers via Feature Formation
        Sensitivity*, 2024, equations 5 to 9.
    """

    # The mean over blocks is part of the formula, so that there is nothing to choose.
    fuse: str = field(default="mean", init=False, repr=False)

    formula = r"\mathrm{mean}_l\, \mathrm{mean}_{h, i}\, \mathrm{ReLU}(\partial s^l / \partial a^l_{h i j})"
    paper = "Bousselham et al., 2024"
    passes = "2 forward; of each block the head, forward and backward"
    needs_gradient = True
    gradient_in_first_pass = False

    def find(self, dry: DryRun) -> list[Location]:
        """Every block."""
        blocks = attention_blocks(dry)
        if not blocks:
            expected = "a transformer of blocks with one attention over all tokens in each"
            raise ValueError(checks.error_message("model", expected, dry.kind, "layer= names a block"))
        return blocks

    def map(self, evidence: Evidence) -> torch.Tensor:
        """One block's E, ``(N, K, *spatial)``, never negative."""
        return self.map_each([evidence])[0]

    def map_each(self, evidences: Sequence[Evidence]) -> list[torch.Tensor]:
        """Each block's E, of one pass that keeps every block's attention."""
        first, places = evidences[0], [evidence.location for evidence in evidences]
        last = max([*places, *attention_blocks(first.location.dry)], key=lambda place: place.value)
        names = dict.fromkeys([*(place.name for place in places), last.name])
        with recorded_attention(first.model, list(names), len(first.x)) as found:
            first.run(first.x)
        after_all = replace(first, location=last, layer_output=found[last.name][1])
        return [_sensitivity(after_all, place, *found[place.name]) for place in places]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean over the blocks."""
        return torch.stack([*parts]).mean(0)


def _sensitivity(
    after_all: Evidence, place: Location, attentions: list[torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    """E of one block, of its attention and the tokens that it gives."""
    length = tokens.shape[1]
    if len(attentions) != 1 or attentions[0].shape[-1] != length:
        shapes = ", ".join(checks.shape_of(a.shape[-2:]) for a in attentions) or "none"
        expected = f"a block with one attention over its {length} tokens"
        raise ValueError(checks.error_message("layer", expected, f"{place.name!r} with {shapes}"))
    with torch.enable_grad():
        mean = tokens.mean(1, keepdim=True).expand_as(tokens)
        scores = after_all.score(*after_all.outputs_of_rows(mean))
    each = gradients(scores, attentions[0], place.name, keep=True)  # (N, K, heads, L, L)
    columns = maps.at_least_float32(each).relu().mean((2, 3)).reshape(-1, length, 1)
    return place.layout.channels_first(columns).reshape(*scores.shape, *place.size)
