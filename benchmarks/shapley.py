"""Compares the channel weights of several methods with the exact Shapley values of the channels.

``python benchmarks/shapley.py`` prints a Markdown table. A cell shows the correlation over the channels as
the mean over images and networks; the lowest mean of a single network is in brackets. The networks are
trained to classify the directions of noisy waves.

The players of the game are the channels of a layer. For a coalition of channels the script sets all other
channels to zero at the layer; the score of the predicted class is then the worth of the coalition. It runs
the head for all coalitions.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import Evidence, Explainer, maps
from camkit.methods import activation, gradient, relevance
from camkit.methods.perturbation import Perturbing

CLASSES = 6
METHODS = (
    camkit.LIFTCAM,
    camkit.AblationCAM,
    camkit.XGradCAM,
    camkit.ShapleyCAM,
    camkit.GradCAM,
    camkit.GradCAMPlusPlus,
    camkit.ScoreCAM,
    camkit.RandomCAM,
)
#: Side of the grid after average pooling, and activation function of the head.
HEADS: dict[str, tuple[int, type[nn.Module]]] = {
    "global pooling, ReLU": (1, nn.ReLU),
    "global pooling, SiLU": (1, nn.SiLU),
    "4 × 4 positions, ReLU": (4, nn.ReLU),
}


def draw_waves(count: int) -> tuple[Tensor, Tensor]:
    """Returns noisy waves ``(N, 1, 16, 16)`` and the classes of their directions ``(N,)``."""
    classes, phase = torch.randint(CLASSES, (count,)), 2 * math.pi * torch.rand(count, 1, 1)
    angle = (classes * math.pi / CLASSES)[:, None, None]
    at = torch.arange(16) - 7.5
    along = at[:, None] * angle.sin() + at * angle.cos()
    return ((1.2 * along + phase).cos() + 0.7 * torch.randn(count, 16, 16))[:, None].double(), classes


def train_network(channels: int, grid: int, function: type[nn.Module], steps: int) -> nn.Sequential:
    """Returns a trained network of two convolutions, average pooling and two hidden layers."""
    features = nn.Sequential(
        nn.Conv2d(1, channels, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
    )
    hidden = [
        nn.Linear(channels * grid**2, 24),
        function(),
        nn.Linear(24, 24),
        function(),
        nn.Linear(24, CLASSES),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten(), *hidden)
    model = nn.Sequential(features, head).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        x, classes = draw_waves(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
    return model.eval()


@dataclass(eq=False, kw_only=True)
class Shapley(Perturbing):
    """A CAM method that weighs the channels by their exact Shapley values.

    The head runs once for every coalition.
    """

    formula = r"\sum_k \phi_k A^k"
    paper = "Shapley, Contributions to the Theory of Games II, 1953"
    passes = "1 forward; the head 2^C times"

    def map(self, evidence: Evidence) -> Tensor:
        """Returns the signed maps ``(N, K, *spatial)``."""
        activation = evidence.activation
        images, channels = activation.shape[:2]
        # Bit k of a coalition's number tells whether channel k is in the coalition. ``inside`` is (2^C, C).
        numbers = torch.arange(2**channels)
        inside = (numbers[:, None] >> torch.arange(channels)) & 1 > 0

        def rescore(chunk: range) -> Tensor:
            coalitions = inside[chunk.start : chunk.stop, None, :, None, None]
            return evidence.rescore(torch.where(coalitions, activation, 0))

        worth = self.in_chunks(rescore, len(numbers), images)
        # Shapley's formula weighs the gain of adding a channel to a coalition by the size of the coalition.
        # No channel can be added to the coalition of all channels: its entry is a zero that is never read.
        by_size = [1 / (channels * math.comb(channels - 1, size)) for size in range(channels)]
        shares = worth.new_tensor([*by_size, 0.0])[inside.sum(1)][:, None, None]
        values = []
        for k in range(channels):
            without = numbers[~inside[:, k]]
            gains = worth[without | 1 << k] - worth[without]
            values.append((shares[without] * gains).sum(0))
        return maps.weighted_sum(torch.stack(values, 2), activation)


def channel_weights(method: Callable[..., Explainer], model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Returns the channel weights ``(N, C)`` that a method passes to ``weighted_sum``."""
    kept: list[Tensor] = []
    its_own = maps.weighted_sum

    def weighted_sum(weights: Tensor, activation: Tensor) -> Tensor:
        kept.append(weights)
        return its_own(weights, activation)

    with ExitStack() as stack:
        for module in (maps, activation, gradient, relevance):
            stack.enter_context(mock.patch.object(module, "weighted_sum", weighted_sum))
        method(model, "0")(x, classes)
    (found,) = kept
    return found[:, 0]


def correlations(model: nn.Sequential, count: int) -> dict[str, float]:
    """Returns the correlation of each method's weights with the exact values, as the mean over new images."""
    x, _ = draw_waves(count)
    with torch.no_grad():
        at, classes = model[0](x), model(x).argmax(1)
    exact = channel_weights(Shapley, model, x, classes)
    contestants = {method.__name__: channel_weights(method, model, x, classes) for method in METHODS}
    # A Shapley value is a share of the score. Grad-CAM's weight is a gradient, a score per unit of
    # activation; multiplied by the sum of the channel, it becomes a share of the score as well.
    contestants["GradCAM, weight × sum of the channel"] = contestants["GradCAM"] * at.sum((2, 3))

    def correlation(given: Tensor) -> float:
        ours, theirs = (v - v.mean(1, keepdim=True) for v in (given, exact))
        return F.cosine_similarity(ours, theirs).mean().item()

    return {name: correlation(given) for name, given in contestants.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the first network")
    parser.add_argument("--networks", type=int, default=5, help="number of networks; each has the next seed")
    parser.add_argument("--images", type=int, default=20, help="images per network")
    parser.add_argument(
        "--channels", type=int, default=8, help="channels at the layer: 2^C coalitions are run"
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps; 0 for random networks")
    given = parser.parse_args()
    torch.set_num_threads(1)  # More threads would slow these tiny networks down.
    columns: dict[str, dict[str, list[float]]] = {}
    for head, (grid, function) in HEADS.items():
        columns[head] = {}
        for seed in range(given.seed, given.seed + given.networks):
            torch.manual_seed(seed)
            found = correlations(train_network(given.channels, grid, function, given.steps), given.images)
            for name, value in found.items():
                columns[head].setdefault(name, []).append(value)
    print("| weights of |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = [f"{sum(c[name]) / given.networks:.3f} ({min(c[name]):.2f})" for c in columns.values()]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
