"""Methods that run the model again, on masked inputs or with channels left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from camkit import maps
from camkit._tools import checks, noise
from camkit.layers.dryrun import DryRun
from camkit.layers.location import Location
from camkit.layers.search import find_stages
from camkit.methods.explainer import Explainer
from camkit.passes.evidence import Evidence
from camkit.targets.binding import softmax


@dataclass(eq=False, kw_only=True)
class Perturbing(Explainer):
    """Base class of the methods that take many passes, usually one for each channel.

    For the shared arguments, see :class:`camkit.Explainer`.

    Args:
        chunk_size: the largest number of images in one pass, which bounds the memory. Each pass takes at
            least one copy of the batch. A method that runs only the head checks this shortcut in one pass of
            two copies of the batch (three copies of a batch of one image), whatever ``chunk_size`` is.
        progress: a function that wraps an iterable with a length and reports the progress, such as
            ``tqdm.tqdm``.

    Raises:
        ValueError: if ``chunk_size`` is not positive.
        TypeError: if ``chunk_size`` is not an int, or ``progress`` is not a function.
    """

    needs_gradient = False

    chunk_size: int = 32
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("chunk_size", self.chunk_size)
        checks.optional_function("progress", checks.PROGRESS, self.progress)

    def copies_per_pass(self, images: int) -> int:
        """Returns how many copies of a batch of N images go into one pass."""
        return max(1, self.chunk_size // images)

    def in_chunks(self, rescore: Callable[[range], torch.Tensor], count: int, images: int) -> torch.Tensor:
        """Calls ``rescore`` for the numbers 0 to ``count - 1``, as many at a time as fit into one pass.

        Args:
            rescore: the function from a range of M numbers to their scores, ``(M, N, K)``.
            count: how many numbers there are.
            images: the number of images in the batch, N.

        Returns:
            The scores of all numbers, ``(count, N, K)``.
        """
        size = min(self.copies_per_pass(images), count)
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        shown = chunks if self.progress is None else self.progress(chunks)
        scores: list[torch.Tensor] = [rescore(chunk) for chunk in shown]
        return torch.cat(scores)


@dataclass(eq=False, kw_only=True)
class MaskingInput(Perturbing):
    """Base class of the methods that mask the input with each channel of the activation.

    For ``chunk_size`` and ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared
    arguments, see :class:`camkit.Explainer`.

    Args:
        channels: how many channels to use. For each image these are the channels that vary most over the
            positions; the others get no weight. By default all channels are used.

    Raises:
        ValueError: if ``channels`` is not positive.
        TypeError: if ``channels`` is not an int.
    """

    # Masks per channel. SS-CAM and IS-CAM average over several.
    samples = 1

    channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            checks.positive("channels", self.channels)

    def scored_channels(self, evidence: Evidence) -> torch.Tensor:
        """Returns the C channels of the activation that get a score, ``(N, C, *spatial)``."""
        activation = evidence.activation
        if self.channels is None or self.channels >= activation.shape[1]:
            return activation
        # A channel that varies little adds about the same value at every position of the map.
        spread = activation.flatten(2).var(2, correction=0)
        chosen = spread.topk(self.channels, 1).indices.sort(1).values
        return torch.stack([image[rows] for image, rows in zip(activation, chosen, strict=True)])

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Returns masks ``(M, N, *size)`` in [0, 1]: number i is sample ``i // C`` of channel ``i % C``."""
        return to_masks(evidence, activation[:, [i % activation.shape[1] for i in chunk]])

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        activation = self.scored_channels(evidence)
        scores = self.masked_scores(
            evidence, activation.shape[1], lambda chunk: self.masks(evidence, activation, chunk)
        )
        return maps.weighted_sum(scores, activation).relu()

    def masked_scores(
        self, evidence: Evidence, channels: int, masks: Callable[[range], torch.Tensor]
    ) -> torch.Tensor:
        """Returns the score of the masked input for each channel, averaged over samples, ``(N, K, C)``.

        If the target is classes, the scores are softmax probabilities.
        """
        x, probability = evidence.x, evidence.bound.with_formula(softmax)

        def rescore(chunk: range) -> torch.Tensor:
            # Masks are in single precision or better. The model takes only images of the type of x.
            outputs = evidence.outputs_of_images(x * masks(chunk)[:, :, None].to(x))
            return torch.stack([probability(output).reshape(len(x), -1) for output in outputs])

        scores = self.in_chunks(rescore, self.samples * channels, len(x))
        return scores.reshape(self.samples, channels, len(x), -1).mean(0).permute(1, 2, 0)


class ScoreCAM(MaskingInput):
    r"""Score-CAM: weights each channel of the activation by the score of the input masked with that channel.

    Here :math:`A^k` is channel k of the activation, x the input, and M the map. The mask :math:`H^k` is the
    channel, resized to the input (up) and scaled to [0, 1] (minmax). :math:`p_c` is the softmax probability
    of the target class. A target other than classes keeps its own score.

    For ``channels``, see :class:`~camkit.methods.perturbation.MaskingInput`; for ``chunk_size`` and
    ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared arguments, see
    :class:`camkit.Explainer`.

    Departs from the paper: its algorithm 1 also subtracts the score of a baseline and takes a softmax over
    the channels. Its section on normalisation and the authors' program do not, and neither does camkit.

    References:
        Wang et al., *Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks*, CVPR
        Workshops 2020.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), \qquad w_k = p_c(x \odot H^k), "
        r"\qquad H^k = \operatorname{minmax}\big(\operatorname{up}(A^k)\big)"
    )
    paper = "Wang et al., CVPRW 2020"
    passes = "1 + C forward"


@dataclass(eq=False, kw_only=True)
class SSCAM(MaskingInput):
    r"""SS-CAM: Score-CAM with scores averaged over noisy masks.

    Here :math:`A^k` is channel k of the activation, x the input, :math:`\epsilon_m` normal noise, and M the
    map. The mask :math:`H^k_m` is the noisy channel, resized to the input (up) and scaled to [0, 1] (minmax).
    :math:`p_c` is the softmax probability of the target class. A target other than classes keeps its own
    score.

    For ``channels``, see :class:`~camkit.methods.perturbation.MaskingInput`; for ``chunk_size`` and
    ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared arguments, see
    :class:`camkit.Explainer`.

    Args:
        samples: number n of noisy masks for each channel, at least 1.
        std: standard deviation of the noise, in units of the activation.
        seed: seed of the noise, at least 0. All images get the same noise. The global random state does not
            change.

    Departs from the paper: as :class:`camkit.ScoreCAM` does. Of the paper's two variants, this is the one
    that adds the noise to the activation.

    References:
        Wang et al., *SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization*, 2020.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), "
        r"\qquad w_k = \frac{1}{n} \sum_{m=1}^n p_c(x \odot H^k_m), "
        r"\qquad H^k_m = \operatorname{minmax}\big(\operatorname{up}(A^k + \epsilon_m)\big)"
    )
    paper = "Wang et al., 2020"
    passes = "1 + nC forward"

    samples: int = 35
    std: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)
        checks.not_negative("std", self.std)
        checks.seed(self.seed)

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Returns masks ``(M, N, *size)`` of the channels with noise."""
        channels, *size = activation.shape[1:]
        # The number of the mask is part of the seed, so that the noise does not depend on chunk_size.
        added = [noise.normal(size, activation, self.seed, i) for i in chunk]
        noisy = activation[:, [i % channels for i in chunk]] + self.std * torch.stack(added)
        return to_masks(evidence, noisy)


@dataclass(eq=False, kw_only=True)
class ISCAM(MaskingInput):
    r"""IS-CAM: Score-CAM with scores averaged over n steps from a faint mask to the whole one.

    Here :math:`A^k` is channel k of the activation, x the input, and M the map. The mask :math:`H^k` is the
    channel, resized to the input (up) and scaled to [0, 1] (minmax). :math:`p_c` is the softmax probability
    of the target class. A target other than classes keeps its own score.

    For ``channels``, see :class:`~camkit.methods.perturbation.MaskingInput`; for ``chunk_size`` and
    ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared arguments, see
    :class:`camkit.Explainer`.

    Args:
        samples: number n of steps, at least 1.

    Departs from the paper: as :class:`camkit.ScoreCAM` does.

    References:
        Naidu et al., *IS-CAM: Integrated Score-CAM for axiomatic-based explanations*, 2020.
    """

    formula = (
        r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), "
        r"\qquad w_k = \frac{1}{n} \sum_{m=1}^n p_c\big(\tfrac{m}{n}\, x \odot H^k\big), "
        r"\qquad H^k = \operatorname{minmax}\big(\operatorname{up}(A^k)\big)"
    )
    paper = "Naidu et al., 2020"
    passes = "1 + nC forward"

    samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Returns masks ``(M, N, *size)`` of the channels, scaled by the step."""
        whole = super().masks(evidence, activation, chunk)
        # Numbers below C are the first step, from C to 2C - 1 the second, and so on.
        channels = activation.shape[1]
        steps = whole.new_tensor([(i // channels + 1) / self.samples for i in chunk])
        return whole * steps.reshape(-1, *[1] * (whole.ndim - 1))


class AblationCAM(Perturbing):
    r"""Ablation-CAM: weights each channel of the activation by the share of the score lost without it.

    Here :math:`A^k` is channel k of the activation, y the score, :math:`y_k` the score with channel k set to
    zero, and M the map. Tokens outside the grid are left unchanged. If the score itself is zero, all weights
    are zero. A channel that is zero in the whole batch has no effect, so that no pass is run for it.

    For ``chunk_size`` and ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared
    arguments, see :class:`camkit.Explainer`.

    Departs from the paper: nothing. If the score is negative, its sign also turns the sign of the weights.

    References:
        Desai and Ramaswamy, *Ablation-CAM: Visual Explanations for Deep Convolutional Network via
        Gradient-free Localization*, WACV 2020, equations 3 and 4.
    """

    formula = r"M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big), \qquad w_k = \frac{y - y_k}{y}"
    paper = "Desai and Ramaswamy, WACV 2020"
    passes = "1 forward; the head C times"

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns the raw maps ``(N, K, *spatial)``, which are never negative."""
        activation, scores = evidence.activation, evidence.scores[:, :, None]
        images = len(activation)
        # After a ReLU, many channels are zero in all images. Setting them to zero would change nothing.
        (channels,) = activation.flatten(2).any(2).any(0).nonzero(as_tuple=True)
        # All passes share this memory: copying the whole activation for each would cost more than the head.
        rows, edited = evidence.editable_copies(min(self.copies_per_pass(images), max(1, len(channels))))

        def rescore(chunk: range) -> torch.Tensor:
            # In copy m of the batch, set the m-th channel of the chunk to zero; restore it after the pass.
            left_out = torch.arange(len(chunk)), slice(None), channels[chunk.start : chunk.stop]
            kept = edited[left_out]
            edited[left_out] = 0
            found = evidence.rescore_rows(rows[: len(chunk) * images])
            edited[left_out] = kept
            return found

        without = scores.repeat(1, 1, activation.shape[1])
        if len(channels):
            without[:, :, channels] = self.in_chunks(rescore, len(channels), images).permute(1, 2, 0)
        evidence.require_reach(scores - without)
        weights = maps.safe_divide(scores - without, scores)
        return maps.weighted_sum(weights, activation).relu()


@dataclass(eq=False, kw_only=True)
class PolyCAM(MaskingInput):
    r"""Poly-CAM: refines the map of the deepest layer with the maps of finer layers, one after the other.

    Here :math:`A^{l,k}` is channel k of the activation of layer l, from the finest layer 1 to the deepest
    layer L. x is the input, and :math:`H^{l,k}` the mask that Score-CAM makes from :math:`A^{l,k}`. up
    resizes to the size of layer l, and down to that of layer l + 1. :math:`p_c` is the softmax probability of
    the target class. A target other than classes keeps its own score.

    The weight of a channel is the probability that its mask keeps, :math:`p_c(x \odot H^{l,k})`, plus the
    probability that is lost without it, :math:`p_c(x) - p_c(x \odot (1 - H^{l,k}))`. The argument ``weights``
    can select only one of the two.

    If ``layer`` is not given, the method uses the last layer of each resolution, down to the layer that
    Grad-CAM uses. For ``channels``, see :class:`~camkit.methods.perturbation.MaskingInput`; for
    ``chunk_size`` and ``progress``, see :class:`~camkit.methods.perturbation.Perturbing`. For the shared
    arguments, see :class:`camkit.Explainer`. Poly-CAM takes no ``fuse``, because its formula combines the
    layers.

    Args:
        weights: ``"+"`` for the kept probability, ``"-"`` for the lost one, or ``"+-"`` for their sum.

    Departs from the paper: the masks are scaled by their minimum and maximum, while the authors' program cuts
    off outliers.

    References:
        Englebert et al., *Poly-CAM: High resolution class activation map for convolutional neural networks*,
        ICPR 2022.
    """

    formula = (
        r"M = P^1, \qquad P^L = I^L, "
        r"\qquad P^l = \frac{I^l}{\operatorname{up}(\operatorname{down}(I^l))} \odot "
        r"\operatorname{up}(P^{l+1}), "
        r"\qquad I^l = \operatorname{ReLU}\Big(\sum_k w^l_k A^{l,k}\Big), "
        r"\qquad w^l_k = \operatorname{ReLU}\big("
        r"p_c(x \odot H^{l,k}) + p_c(x) - p_c(x \odot (1 - H^{l,k}))\big)"
    )
    paper = "Englebert et al., ICPR 2022"
    passes = "1 forward; 2C more for each layer"

    weights: str = "+-"
    # Not an argument: the formula combines the layers.
    fuse: str = field(default="mean", init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("weights", self.weights, ("+", "-", "+-"))

    def find(self, dry: DryRun) -> list[Location]:
        """Returns the last layer of each resolution, down to the layer that Grad-CAM uses."""
        return find_stages(dry)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """Returns I of one layer, ``(N, K, *spatial)``, which is never negative."""
        activation = self.scored_channels(evidence)
        channels = activation.shape[1]

        def kept(chunk: range) -> torch.Tensor:
            return self.masks(evidence, activation, chunk)

        def lost(chunk: range) -> torch.Tensor:
            return 1 - self.masks(evidence, activation, chunk)

        # No pass is run for the part that the weights leave out.
        weights = torch.zeros_like(evidence.scores)[:, :, None]
        if self.weights != "-":
            weights = weights + self.masked_scores(evidence, channels, kept)
        if self.weights != "+":
            whole = evidence.bound.with_formula(softmax)(evidence.output).reshape(evidence.scores.shape)
            weights = weights + whole[:, :, None] - self.masked_scores(evidence, channels, lost)
        return maps.weighted_sum(weights.relu(), activation).relu()

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns P of the finest layer."""
        *finer, found = parts
        for part in reversed(finer):
            size = part.shape[2:]
            # The quotient is the detail that this layer adds to its own map at the coarser resolution.
            local = maps.resize(maps.resize(part, found.shape[2:]), size)
            found = maps.safe_divide(part, local) * maps.resize(found, size)
        return found


def to_masks(evidence: Evidence, channels: torch.Tensor) -> torch.Tensor:
    """Returns channels ``(N, M, *spatial)`` as masks of the input in [0, 1], ``(M, N, *size)``."""
    return maps.normalize(evidence.resize(channels), len(evidence.x.shape[2:])).transpose(0, 1)
