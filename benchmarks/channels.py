"""Compares Score-CAM of a few channels (the option ``channels=``) with Score-CAM of all channels.

``python benchmarks/channels.py`` trains a ResNet-18 on the drawn creatures of ``examples/pokemon``, which
must be installed, and prints its accuracy and a Markdown table. Each cell compares two maps: the map from a
few channels and the map from all channels. It shows their Pearson correlation over the 7 x 7 positions, as
the mean over new pictures with the lowest in brackets. The percentage is the share of pictures where both
maps have their maximum at the same position. One column uses the channels that vary most, the other the same
number of channels chosen at random.
"""

import argparse

import torch
from pokemon_cam.creatures import draw_set
from pokemon_cam.training import normalized
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import ResNet, resnet18

import camkit
from camkit import Evidence

SIZE = 224
COUNTS = (8, 16, 32, 64, 128)


class RandomChannelsScoreCAM(camkit.ScoreCAM):
    """Score-CAM of channels chosen at random, as the control."""

    def scored_channels(self, evidence: Evidence) -> Tensor:
        """Returns the feature maps of random channels, the same channels for every image."""
        chosen = torch.randperm(evidence.activation.shape[1])[: self.channels]
        return evidence.activation[:, chosen]


def train_network(pictures: int, epochs: int, seed: int) -> tuple[ResNet, Tensor]:
    """Returns a trained ResNet-18, and pictures that it was not trained on."""
    drawn = draw_set(pictures, seed=seed, size=SIZE // 2)  # Half the size trains in a quarter of the time.
    unseen = draw_set(24, seed=seed + 1, size=SIZE)
    torch.manual_seed(seed)
    model = resnet18(num_classes=len(drawn.classes))
    steps = epochs * (pictures // 32)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        if step % (pictures // 32) == 0:
            order = torch.randperm(pictures)
        rows = order[32 * (step % (pictures // 32)) :][:32]
        x, labels = normalized(drawn.images[rows], torch.device("cpu")), drawn.labels[rows]
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        scheduler.step()
    x = normalized(unseen.images, torch.device("cpu"))
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == unseen.labels).float().mean().item()
    print(f"ResNet-18, accuracy {accuracy:.3f} on {len(x)} new pictures\n")
    return model, x


def compare_maps(found: Tensor, full: Tensor) -> str:
    """Returns the mean and lowest correlation of maps ``(N, h, w)``, and the share with the same maximum."""
    ours, theirs = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (found, full))
    correlation = F.cosine_similarity(ours, theirs)
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    return f"{correlation.mean().item():.3f} ({correlation.min().item():.2f}), {100 * same:.0f}%"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=1120, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training pictures")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, x = train_network(given.pictures, given.epochs, given.seed)

    def explain(method: camkit.Explainer) -> Tensor:
        return torch.cat([method(image[None]).maps for image in x])

    full = explain(camkit.ScoreCAM(model))
    print("| channels of 512 | those that vary most | chosen at random |\n|---|---|---|")
    for count in COUNTS:
        kinds = (camkit.ScoreCAM, RandomChannelsScoreCAM)
        best, chance = (explain(kind(model, channels=count)) for kind in kinds)
        print(f"| {count} | {compare_maps(best, full)} | {compare_maps(chance, full)} |", flush=True)


if __name__ == "__main__":
    main()
