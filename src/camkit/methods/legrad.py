"""LeGrad, which explains a transformer by the gradient with respect to its attention."""

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
    r"""LeGrad: averages the positive gradients with respect to the attention weights over heads and blocks.

    Here :math:`a^l_{hij}` is the weight with which, in head h of block l, token i attends to token j.
    :math:`s^l` is the score that the model's head gives to the mean of the tokens after block l. The map M
    has one position for each token j of the grid of patches, and is never negative.

    The model must be a transformer of differentiable blocks, each with one attention over all tokens. By
    default all blocks are explained; ``layer`` selects some of them. For the shared arguments, see
    :class:`camkit.Explainer`. LeGrad takes no ``fuse``, because its formula combines the blocks.

    Raises:
        ValueError: at the call, if a block has another kind of attention.

    Departs from the paper: nothing, before the map is normalised. If the model's head reads only one token,
    it reads the mean token instead, as in the authors' program.

    References:
        Bousselham et al., *LeGrad: An Explainability Method for Vision Transformers via Feature Formation
        Sensitivity*, 2024, equations 5 to 9.
    """

    formula = (
        r"M = \operatorname{mean}_l E^l, \qquad E^l_j = \operatorname{mean}_{h, i} "
        r"\operatorname{ReLU}\Big(\frac{\partial s^l}{\partial a^l_{h i j}}\Big)"
    )
    paper = "Bousselham et al., 2024"
    passes = "2 forward; of each block the head, forward and backward"
    gradient_in_first_pass = False

    # Not an argument: the formula takes the mean over the blocks.
    fuse: str = field(default="mean", init=False, repr=False)

    def find(self, dry: DryRun) -> list[Location]:
        """Returns every block with attention.

        Raises:
            ValueError: if there is none.
        """
        blocks = attention_blocks(dry)
        if not blocks:
            expected = "a transformer of blocks with one attention over all tokens in each"
            raise ValueError(checks.error_message("model", expected, dry.kind, "layer= names a block"))
        return blocks

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns E of one block, ``(N, K, *spatial)``, which is never negative."""
        return self.map_each([evidence])[0]

    def map_each(self, evidences: Sequence[Evidence]) -> list[torch.Tensor]:
        """Returns E of each block, from one forward pass that records the attention of every block."""
        first, places = evidences[0], [evidence.location for evidence in evidences]
        last = max([*places, *attention_blocks(first.location.dry)], key=lambda place: place.value)
        names = dict.fromkeys([*(place.name for place in places), last.name])
        with recorded_attention(first.model, list(names), len(first.x)) as found:
            first.run(first.x)
        # With evidence at the last block, only the head runs for the mean tokens of each block.
        at_last_block = replace(first, location=last, layer_output=found[last.name][1])
        return [_sensitivity(at_last_block, place, *found[place.name]) for place in places]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the mean over the blocks."""
        return torch.stack([*parts]).mean(0)


def _sensitivity(
    at_last_block: Evidence, place: Location, attentions: list[torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    """Returns E of one block ``(N, K, *spatial)``.

    Args:
        at_last_block: the evidence whose head gives the scores.
        place: the block.
        attentions: the attention weights that were recorded in the block, each ``(N, heads, L, L)``.
        tokens: the output of the block, ``(N, L, C)``, in a graph that begins at the attention weights.

    Raises:
        ValueError: if the block has not exactly one attention, over all of its tokens.
    """
    length = tokens.shape[1]
    if len(attentions) != 1 or attentions[0].shape[-1] != length:
        shapes = ", ".join(checks.shape_of(a.shape[-2:]) for a in attentions) or "none"
        expected = f"a block with one attention over its {length} tokens"
        raise ValueError(checks.error_message("layer", expected, f"{place.name!r} with {shapes}"))
    with torch.enable_grad():
        # Put the mean token in the place of every token, so that the head reads it whichever token it picks.
        mean = tokens.mean(1, keepdim=True).expand_as(tokens)
        scores = at_last_block.score(*at_last_block.outputs_of_rows(mean))
    each = gradients(scores, attentions[0], place.name, keep=True)  # (N, K, heads, L, L)
    columns = maps.at_least_float32(each).relu().mean((2, 3)).reshape(-1, length, 1)
    # The layout drops the class and register tokens, and arranges the others as the grid of patches.
    return place.layout.channels_first(columns).reshape(*scores.shape, *place.size)
