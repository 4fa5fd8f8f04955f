"""Trains a network by its recipe and records its loss and accuracy after every epoch."""

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
"""torchvision's preprocessing; all three published networks use its mean and standard deviation."""

EVALUATION_BATCH = 32
"""Pictures per forward pass when a network is evaluated or its maps are scored."""


@dataclass(frozen=True)
class Score:
    """Loss and accuracy of a network on a set of pictures.

    Attributes:
        loss: mean cross entropy per picture, in nats.
        accuracy: share of pictures whose most probable class is the true one, in [0, 1].
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class History:
    """The scores of a network over the epochs.

    All losses are cross entropies without label smoothing, even if the recipe smooths its labels.

    Attributes:
        train: one score per epoch, averaged over its steps while the network still changes.
        test: one score per epoch, measured after the epoch.
    """

    train: list[Score]
    test: list[Score]


def normalized(images: Tensor, device: torch.device) -> Tensor:
    """Normalise pictures with ImageNet's mean and standard deviation.

    Args:
        images: uint8, shape ``(N, 3, H, W)``.
        device: device of the network.

    Returns:
        float32, shape ``(N, 3, H, W)``, on ``device``.
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
    """Train a network in place by its recipe.

    Args:
        network: the network to train, on ``device``.
        train_set: pictures to train on.
        test_set: pictures to evaluate on after every epoch.
        epochs: passes over the training pictures, at least 1.
        seed: seed of the order of the pictures, of the augmentation and of dropout.
        device: device to compute on.

    Returns:
        The scores of every epoch.
    """
    recipe, model = network.recipe, network.model
    torch.manual_seed(seed)
    optimizer = recipe.optimizer([p for p in model.parameters() if p.requires_grad])
    steps = math.ceil(len(train_set) / recipe.batch_size)
    # The learning rate changes after every step, so the recipe gets fractions of an epoch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.lr_factor(step / steps, epochs)
    )
    history = History([], [])
    with progress_bar(f"training {network.name}", epochs * steps, "step") as bar:
        for _ in range(epochs):
            model.train()  # After the first epoch, `evaluate` has left it in evaluation mode.
            # Sums stay on the device; reading them after every step would wait for the GPU.
            loss_sum = torch.zeros((), device=device)
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
                # Record the loss without label smoothing, so that recipes can be compared.
                loss_sum += F.cross_entropy(logits.detach(), labels, reduction="sum")
                hits += (logits.detach().argmax(1) == labels).sum()
                bar.update()
            count = len(train_set)
            history.train.append(Score(loss_sum.item() / count, hits.item() / count))
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
    """Compute loss and accuracy of a network in evaluation mode.

    Args:
        model: the network, on ``device``; it is left in evaluation mode.
        pictures: at least one picture.
        device: device to compute on.

    Returns:
        The score over all pictures.
    """
    model.eval()
    # Collect all logits first: the mean of batch means would weigh a smaller last batch too much.
    logits = torch.cat(
        [
            model(normalized(batch.images, device)).cpu()
            for batch in pictures.batches(EVALUATION_BATCH)
        ]
    )
    hits = logits.argmax(1) == pictures.labels
    loss = F.cross_entropy(logits, pictures.labels)
    return Score(loss.item(), hits.float().mean().item())
