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
    """What the methods of many passes share: how many images go into one, and a progress bar.

    Args:
        chunk_size: the most images in one pass, which bounds the memory; at least one copy of the batch, and
            two or three where the head alone is to run.
        progress: shows how far it got: a function that wraps an iterable with a length, such as
            ``tqdm.tqdm``.
    """

    chunk_size: int = 32
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None

    needs_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("chunk_size", self.chunk_size)
        if self.progress is not None and not callable(self.progress):
            expected = "a function that wraps an iterable, such as tqdm.tqdm"
            raise TypeError(checks.error_message("progress", expected, type(self.progress).__name__))

    def copies_a_pass(self, images: int) -> int:
        """How many copies of a batch of N images go into one pass."""
        return max(1, self.chunk_size // images)

    def in_chunks(self, rescore: Callable[[range], torch.Tensor], count: int, images: int) -> torch.Tensor:
        """What ``rescore`` gives for the numbers below ``count``, as many at a time as one pass takes.

        Args:
            rescore: from M numbers to the scores ``(M, N, K)``.
            count: how many there are.
            images: N.

        Returns:
            Shape ``(count, N, K)``.
        """
        size = min(self.copies_a_pass(images), count)
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        shown = chunks if self.progress is None else self.progress(chunks)
        scores: list[torch.Tensor] = [rescore(chunk) for chunk in shown]
        return torch.cat(scores)


@dataclass(eq=False, kw_only=True)
class MaskingInput(Perturbing):
    """What the methods share that look at the input behind masks made of each channel.

    Args:
        channels: how many channels to score, for each image those that vary most over its positions; the
            others have no weight. All if not given.
    """

    channels: int | None = None

    samples = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            checks.positive("channels", self.channels)

    def scored(self, evidence: Evidence) -> torch.Tensor:
        """The channels that are scored, C of them, ``(N, C, *spatial)``."""
        activation = evidence.activation
        if self.channels is None or self.channels >= activation.shape[1]:
            return activation
        spread = activation.flatten(2).var(2, correction=0)
        chosen = spread.topk(self.channels, 1).indices.sort(1).values
        return torch.stack([image[rows] for image, rows in zip(activation, chosen, strict=True)])

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Masks ``(M, N, *size)``: number i is sample ``i // C`` of channel ``i % C``."""
        return to_masks(evidence, activation[:, [i % activation.shape[1] for i in chunk]])

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        activation = self.scored(evidence)
        scores = self.masked_scores(
            evidence, activation.shape[1], lambda chunk: self.masks(evidence, activation, chunk)
        )
        return maps.weighted_sum(scores, activation).relu()

    def masked_scores(
        self, evidence: Evidence, channels: int, masks: Callable[[range], torch.Tensor]
    ) -> torch.Tensor:
        """Means over samples of the probabilities, or scores, of the input behind masks, ``(N, K, C)``."""
        x, probability = evidence.x, evidence.bound.with_formula(softmax)

        def rescore(chunk: range) -> torch.Tensor:
            outputs = evidence.outputs_of_images(x * masks(chunk)[:, :, None].to(x))
            return torch.stack([probability(output).reshape(len(x), -1) for output in outputs])

        scores = self.in_chunks(rescore, self.samples * channels, len(x))
        return scores.reshape(self.samples, channels, len(x), -1).mean(0).permute(1, 2, 0)


class ScoreCAM(MaskingInput):
    r"""Score-CAM: the activation weighed by the score of the input that each channel masks.

    .. math::
        H^k = \operatorname{minmax}(\operatorname{up}(A^k)), \qquad w_k = p_c(x \odot H^k), \qquad
        M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big)

    with :math:`p_c` the softmax probability of the class. A target that is no class is a score as it is.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        channels: how many channels to score, for each image those that vary most; all if not given.
        chunk_size: the most images in one pass, which bounds the memory.
        progress: a function that wraps an iterable and shows how far it got, such as ``tqdm.tqdm``.

    Departs from the paper: its algorithm 1 also subtracts the score of a baseline and takes a softmax over
    the channels, which its section on normalisation and the authors' program do not.

    References:
        Wang et al., *Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks*, CVPR
        Workshops 2020.
    """

    formula = r"\mathrm{ReLU} \sum_k p_c(x \odot H(A^k)) A^k,\; H(A) = \mathrm{minmax}(\mathrm{up}(A))"
    paper = "Wang et al., CVPRW 2020"
    passes = "1 + C forward"


@dataclass(eq=False, kw_only=True)
class SSCAM(MaskingInput):
    r"""SS-CAM: Score-CAM with scores that are means over noisy masks.

    .. math::
        w_k = \frac{1}{n} \sum_{m=1}^n p_c\big(x \odot H(A^k + \epsilon_m)\big), \qquad
        H(A) = \operatorname{minmax}(\operatorname{up}(A)), \qquad
        M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big)

    with :math:`p_c` the softmax probability of the class. A target that is no class is a score as it is.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        channels: how many channels to score, for each image those that vary most; all if not given.
        chunk_size: the most images in one pass, which bounds the memory.
        progress: a function that wraps an iterable and shows how far it got, such as ``tqdm.tqdm``.
        samples: number n of noisy masks of each channel.
        std: standard deviation of the noise, in units of the activation.
        seed: seed of the noise, which is the same for every image. The global random state is left alone.

    Departs from the paper: as Score-CAM. Of the paper's two variants it is the one that adds the noise to the
    activation.

    References:
        Wang et al., *SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization*, 2020.
    """

    samples: int = 35
    std: float = 2.0
    seed: int = 0

    formula = r"\mathrm{ReLU} \sum_k \mathrm{mean}_m\, p_c(x \odot H(A^k + \epsilon_m)) A^k"
    paper = "Wang et al., 2020"
    passes = "1 + nC forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)
        checks.not_negative("std", self.std)
        checks.seed(self.seed)

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Masks of the channels with noise."""
        channels, *size = activation.shape[1:]
        added = [noise.normal(size, activation, self.seed, i) for i in chunk]
        noisy = activation[:, [i % channels for i in chunk]] + self.std * torch.stack(added)
        return to_masks(evidence, noisy)


@dataclass(eq=False, kw_only=True)
class ISCAM(MaskingInput):
    r"""IS-CAM: Score-CAM with scores that are means along the way from no mask to the whole one.

    .. math::
        w_k = \frac{1}{n} \sum_{m=1}^n p_c\big(\tfrac{m}{n}\, x \odot H^k\big), \qquad
        M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big)

    with :math:`H^k` and :math:`p_c` as in Score-CAM. A target that is no class is a score as it is.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        channels: how many channels to score, for each image those that vary most; all if not given.
        chunk_size: the most images in one pass, which bounds the memory.
        progress: a function that wraps an iterable and shows how far it got, such as ``tqdm.tqdm``.
        samples: number n of steps.

    Departs from the paper: as Score-CAM.

    References:
        Naidu et al., *IS-CAM: Integrated Score-CAM for axiomatic-based explanations*, 2020.
    """

    samples: int = 10

    formula = r"\mathrm{ReLU} \sum_k \mathrm{mean}_m\, p_c(\tfrac{m}{n} x \odot H(A^k)) A^k"
    paper = "Naidu et al., 2020"
    passes = "1 + nC forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("samples", self.samples)

    def masks(self, evidence: Evidence, activation: torch.Tensor, chunk: range) -> torch.Tensor:
        """Masks of the channels, scaled by the step."""
        whole = super().masks(evidence, activation, chunk)
        channels = activation.shape[1]
        steps = whole.new_tensor([(i // channels + 1) / self.samples for i in chunk])
        return whole * steps.reshape(-1, *[1] * (whole.ndim - 1))


class AblationCAM(Perturbing):
    r"""Ablation-CAM: the activation weighed by how much of the score goes when a channel is left out.

    .. math::
        w_k = \frac{y - y_k}{y}, \qquad M = \operatorname{ReLU}\Big(\sum_k w_k A^k\Big)

    with :math:`y_k` the score where channel k is zero. Of tokens, the ones beside the grid stay as they are.
    If the score itself is zero, so are the weights. A channel that is zero in the whole batch has no effect,
    and is not asked for.

    Args:
        model: any module.
        layer: the layer to make maps at, by name or as the module; or several.
        fuse: how the maps of several layers become one: ``"mean"``, ``"product"`` or ``"hierarchical"``.
        chunk_size: the most images in one pass, which bounds the memory.
        progress: a function that wraps an iterable and shows how far it got, such as ``tqdm.tqdm``.

    Departs from the paper: nothing. Where the score is negative, the weights turn their sign with it.

    References:
        Desai and Ramaswamy, *Ablation-CAM: Visual Explanations for Deep Convolutional Network via
        Gradient-free Localization*, WACV 2020, equations 3 and 4.
    """

    formula = r"\mathrm{ReLU} \sum_k \frac{y - y_k}{y} A^k"
    paper = "Desai and Ramaswamy, WACV 2020"
    passes = "1 forward; the head C times"

    def map(self, evidence: Evidence) -> torch.Tensor:
        """The raw maps ``(N, K, *spatial)``, never negative."""
        activation, scores = evidence.activation, evidence.scores[:, :, None]
        images = len(activation)
        # To leave out what is zero in all images changes nothing, and a ReLU leaves many such channels.
        (channels,) = activation.flatten(2).any(2).any(0).nonzero(as_tuple=True)
        # The same memory for every pass: to copy what stays as it is would cost more than the head does.
        rows, edited = evidence.editable_copies(min(self.copies_a_pass(images), max(1, len(channels))))

        def rescore(chunk: range) -> torch.Tensor:
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
    r"""Poly-CAM: the map of the deepest layer, refined from one layer to the next by the finer ones.

    .. math::
        I^l = \operatorname{ReLU}\Big(\sum_k w^l_k A^{l,k}\Big), \qquad
        P^l = \frac{I^l}{\operatorname{up}(\operatorname{down}(I^l))} \odot \operatorname{up}(P^{l+1})

    with down to the size of layer l + 1. The weights are how much of the softmax probability a channel's mask
    keeps, and how much is lost with it,

    .. math::
        w^+_k = p_c(x \odot H^k), \qquad
        w^-_k = \operatorname{ReLU}\big(p_c(x) - p_c(x \odot (1 - H^k))\big), \qquad
        w^\pm_k = \operatorname{ReLU}\big(p_c(x) + p_c(x \odot H^k) - p_c(x \odot (1 - H^k))\big)

    with :math:`H^k` as in Score-CAM. A target that is no class is a score as it is.

    Args:
        model: any module.
        layer: the layers, or one; if not given, the last one of each resolution before it is reduced.
        channels: how many channels to score, for each image those that vary most; all if not given.
        chunk_size: the most images in one pass, which bounds the memory.
        progress: a function that wraps an iterable and shows how far it got, such as ``tqdm.tqdm``.
        weights: which of them: ``"+"``, ``"-"`` or ``"+-"``.

    Departs from the paper: the masks are scaled by their minimum and maximum, where the authors' program
    cuts off outliers.

    References:
        Englebert et al., *Poly-CAM: High resolution class activation map for convolutional neural networks*,
        ICPR 2022.
    """

    weights: str = "+-"
    # Its own formula joins the layers, so that there is nothing to choose.
    fuse: str = field(default="mean", init=False, repr=False)

    formula = r"P^l = \frac{I^l}{\mathrm{up}(\mathrm{down}(I^l))} \odot \mathrm{up}(P^{l+1})"
    paper = "Englebert et al., ICPR 2022"
    passes = "1 + 2C forward a layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("weights", self.weights, ("+", "-", "+-"))

    def find(self, dry: DryRun) -> list[Location]:
        """The last layer of each resolution, up to the one that Grad-CAM looks at."""
        return find_stages(dry)

    def map(self, evidence: Evidence) -> torch.Tensor:
        """One layer's I, ``(N, K, *spatial)``."""
        activation = self.scored(evidence)
        channels = activation.shape[1]

        def kept(chunk: range) -> torch.Tensor:
            return self.masks(evidence, activation, chunk)

        def lost(chunk: range) -> torch.Tensor:
            return 1 - self.masks(evidence, activation, chunk)

        weights = torch.zeros_like(evidence.scores)[:, :, None]
        if self.weights != "-":
            weights = weights + self.masked_scores(evidence, channels, kept)
        if self.weights != "+":
            whole = evidence.bound.with_formula(softmax)(evidence.output).reshape(evidence.scores.shape)
            weights = weights + whole[:, :, None] - self.masked_scores(evidence, channels, lost)
        return maps.weighted_sum(weights.relu(), activation).relu()

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """P of the finest layer."""
        *finer, found = parts
        for part in reversed(finer):
            size = part.shape[2:]
            local = maps.resize(maps.resize(part, found.shape[2:]), size)
            found = maps.safe_divide(part, local) * maps.resize(found, size)
        return found


def to_masks(evidence: Evidence, channels: torch.Tensor) -> torch.Tensor:
    """Channels ``(N, M, *spatial)`` as masks of the input in [0, 1], ``(M, N, *size)``."""
    return maps.normalize(evidence.resize(channels), len(evidence.x.shape[2:])).transpose(0, 1)
