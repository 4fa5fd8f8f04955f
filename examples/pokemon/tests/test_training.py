from dataclasses import replace

import pytest
import torch
from torch import nn

from pokemon_cam.networks import Network, small_networks
from pokemon_cam.pictures import PictureSet
from pokemon_cam.training import evaluate, normalized, train

CPU = torch.device("cpu")


def make_coloured(count: int) -> PictureSet:
    """Return noisy pictures whose class is their brightest channel."""
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 150  # Adds to one channel of each picture.
    return PictureSet(images, labels, ("red", "green", "blue"))


def make_network() -> Network:
    """Return an untrained network, the same in every call."""
    torch.manual_seed(0)
    network = small_networks(64)["AlexNet-CAM"](3, {})
    # A smaller batch gives several steps per epoch on few pictures.
    return replace(network, recipe=replace(network.recipe, batch_size=8))


def test_training_learns_and_records_every_epoch() -> None:
    network = make_network()
    history = train(network, make_coloured(48), make_coloured(24), epochs=3, seed=0, device=CPU)
    assert len(history.train) == len(history.test) == 3
    assert history.train[-1].loss < history.train[0].loss
    assert history.test[-1].accuracy == 1
    assert history.test[-1] == evaluate(network.model, make_coloured(24), device=CPU)


def test_training_follows_its_seed() -> None:
    one, again, other = (
        train(make_network(), make_coloured(16), make_coloured(6), epochs=1, seed=s, device=CPU)
        for s in (0, 0, 1)
    )
    assert one == again
    assert one != other


def test_evaluation_is_the_mean_over_all_pictures() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[2.0, 0.0, 0.0]]).expand(len(x), 3)

    # 100 pictures make three full batches and a last one of four; 34 are of the predicted class.
    score = evaluate(Constant(), make_coloured(100), device=CPU)
    assert score.accuracy == pytest.approx(34 / 100)
    logits = torch.tensor([2.0, 0.0, 0.0]).log_softmax(0)
    expected = -(34 * logits[0] + 66 * logits[1]) / 100
    assert score.loss == pytest.approx(expected.item(), abs=1e-5)


def test_normalised_pictures() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    black, white = normalized(images, CPU).flatten(1)
    assert black.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert white.tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
