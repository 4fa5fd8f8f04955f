"""Trains one network and keeps its curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VGG16_Weights
from torchvision.transforms.functional import normalize

from pokemon_cam.networks import Network
from pokemon_cam.pictures import PictureSet
from pokemon_cam.progress import progress_bar

PRESET = VGG16_Weights.DEFAULT.transforms()
"""torchvision's preprocessing; its mean and std are those of all three published networks."""

_EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Score:
    """How well a network tells the classes apart.

    Attributes:
        loss: mean cross entropy per picture, in nats.
        accuracy: share of pictures whose most probable class is theirs, in [0, 1].
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class History:
    """One score per epoch.

    Losses are plain cross entropies, also where the recipe smooths its labels.

    Attributes:
        train: over the epoch's own steps, so while the network still changes.
        test: after the epoch.
    """

    train: list[Score]
    test: list[Score]


def normalized(images: Tensor, device: torch.device) -> Tensor:
    """Pictures as a network expects them.

    Args:
        images: uint8, shape ``(N, 3, H, W)``.
        device: where the network is.

    Returns:
        float32, shape ``(N, 3, H, W)``, with ImageNet's mean and deviation taken out.
    """
    x: Tensor = normalize(images.to(device).float() / 255, PRESET.mean, PRESET.std)
    return x


def train(
    network: Network,
    train_set: PictureSet,
    test_set: PictureSet,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
) -> History:
    """Train a network by its recipe; it is changed in place.

    Args:
        network: on ``device``.
        train_set: pictures to learn from.
        test_set: pictures to score after every epoch; nothing is learnt from them.
        epochs: passes over the training pictures, at least 1.
        seed: seed of the order of the pictures and of all chance in the steps.
        device: where to compute.

    Returns:
        The curves.
    """
    recipe, model = network.recipe, network.model
    torch.manual_seed(seed)
    optimizer = recipe.optimizer([p for p in model.parameters() if p.requires_grad])
    steps = math.ceil(len(train_set) / recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.rate(step / steps, epochs)
    )
    history = History([], [])
    with progress_bar(f"training {network.name}", epochs * steps, "step") as bar:
        for _ in range(epochs):
            model.train()
            losses = torch.zeros((), device=device)
            hits = torch.zeros((), device=device)
            shuffled = train_set.subset(torch.randperm(len(train_set)))
            for batch in shuffled.batches(recipe.batch_size):
                x = recipe.augment(normalized(batch.images, device))
                labels = batch.labels.to(device)
                logits = model(x)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses += F.cross_entropy(logits.detach(), labels, reduction="sum")
                hits += (logits.detach().argmax(1) == labels).sum()
                bar.update()
            count = len(train_set)
            history.train.append(Score(losses.item() / count, hits.item() / count))
            history.test.append(evaluate(model, test_set, device=device))
            bar.set_postfix(
                loss=f"{history.train[-1].loss:.3f}",
                accuracy=f"{history.train[-1].accuracy:.3f}",
                test_loss=f"{history.test[-1].loss:.3f}",
                test_accuracy=f"{history.test[-1].accuracy:.3f}",
            )
    return history


@torch.no_grad()
def evaluate(model: nn.Module, pictures: PictureSet, *, device: torch.device) -> Score:
    """Loss and accuracy of a network in evaluation mode.

    Args:
        model: on ``device``; left in evaluation mode.
        pictures: at least one.
        device: where to compute.

    Returns:
        The score over all pictures.
    """
    model.eval()
    logits = torch.cat(
        [
            model(normalized(batch.images, device)).cpu()
            for batch in pictures.batches(_EVALUATION_BATCH)
        ]
    )
    hits = logits.argmax(1) == pictures.labels
    loss = F.cross_entropy(logits, pictures.labels)
    return Score(loss.item(), hits.float().mean().item())
