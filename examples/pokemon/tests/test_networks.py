from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet, vgg16, vgg19

from pokemon_cam.networks import paper_networks, small_networks
from pokemon_cam.weights import PUBLISHED, download_weights, read_weights

FILES: dict[str, Callable[[], nn.Module]] = {
    "vgg16-397923af.pth": vgg16,
    "alexnet-owt-7be5be79.pth": alexnet,
    "vgg19-dcbb9e9d.pth": vgg19,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with the published names and shapes, but constant values."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for file, make in FILES.items():
        # The shapes are enough; on the meta device the models take no memory.
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in make().state_dict().items()}
        # An expanded tensor is saved as a single number, which keeps the files small. The value
        # tells the tensors apart.
        state = {
            name: torch.tensor([0.01 * (i + 1)]).expand(shape)
            for i, (name, shape) in enumerate(shapes.items())
        }
        torch.save(state, folder / file)
    return folder


@pytest.mark.parametrize(
    ("name", "total", "trained"),
    [("VGG16-CAM", 14_714_688 + 3_591, 3_591), ("AlexNet-CAM", 2_469_696 + 1_799, 1_799)],
)
def test_cam_networks_train_the_papers_parameters(
    name: str, total: int, trained: int, checkpoints: Path
) -> None:
    network = paper_networks(partial(read_weights, checkpoints))[name](7, {})
    assert network.parameters == total
    assert network.trainable_parameters == trained
    assert (network.image_size, network.recipe.epochs, network.recipe.batch_size) == (224, 10, 1)


def test_vgg19_keeps_its_head_and_is_fine_tuned_completely(checkpoints: Path) -> None:
    network = paper_networks(partial(read_weights, checkpoints))["VGG19-Grad-CAM"](7, {})
    assert network.trainable_parameters == network.parameters
    # VGG19 with the last layer (4,096 weights and a bias per class) replaced: 1,000 classes to 7.
    assert network.parameters == 143_667_240 - 4097 * 1000 + 4097 * 7


def test_weights_come_from_the_files(checkpoints: Path) -> None:
    network = paper_networks(partial(read_weights, checkpoints))["AlexNet-CAM"](7, {})
    convolutions = [m for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    # The state dict holds a weight and a bias per convolution, so the weights are every other one.
    assert [m.weight.flatten()[0].item() for m in convolutions] == pytest.approx(
        [0.01, 0.03, 0.05, 0.07, 0.09]
    )
    explanation = network.explain(torch.rand(2, 3, 224, 224))
    assert explanation.maps.shape == (2, 6, 6)
    assert explanation.output.shape == (2, 7)


def test_recipe_of_the_paper(checkpoints: Path) -> None:
    recipe = paper_networks(partial(read_weights, checkpoints))["AlexNet-CAM"](7, {}).recipe
    optimizer = recipe.optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.001
    assert optimizer.defaults["momentum"] == 0.9
    assert [recipe.lr_factor(epoch, 10) for epoch in (0, 6.9, 7, 9.9)] == [1, 1, 0.1, 0.1]
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(recipe.augment(x), x)  # No augmentation.


def test_published_file_names() -> None:
    assert [str(w.url).rpartition("/")[2] for w in PUBLISHED.values()] == list(FILES)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    message = r"--weights: expected 'default', 'none' or a folder that holds vgg16-397923af.pth"
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path, VGG16_Weights.DEFAULT)


def test_invalid_checkpoint_is_reported(tmp_path: Path) -> None:
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"--weights: expected a checkpoint, got '.*vgg16"):
        read_weights(tmp_path, VGG16_Weights.DEFAULT)


def test_checkpoint_of_another_network_is_rejected(checkpoints: Path, tmp_path: Path) -> None:
    other = checkpoints / "vgg19-dcbb9e9d.pth"
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"--weights: expected alexnet-owt-.* to fit alexnet"):
        paper_networks(partial(read_weights, tmp_path))["AlexNet-CAM"](7, {})


def test_failed_download_suggests_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*'none'.*alexnet-owt-7be5be79.pth"):
        download_weights(AlexNet_Weights.DEFAULT)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_small_networks_train_all_parameters_and_keep_their_kind_of_head(name: str) -> None:
    builders = small_networks(64)
    network = builders[name](5, {"VGG16-CAM": builders["VGG16-CAM"](5, {})})
    assert network.trainable_parameters == network.parameters < 1_000_000
    explanation = network.explain(torch.rand(2, 3, 64, 64))
    assert explanation.output.shape == (2, 5)
    assert explanation.maps.shape[0] == 2 and explanation.maps.shape[1] >= 4
    linear = [m for m in network.model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == (3 if name == "VGG19-Grad-CAM" else 1)


def test_small_vgg19_starts_from_the_trained_features() -> None:
    builders = small_networks(64)
    first = builders["VGG16-CAM"](5, {})
    last = builders["VGG19-Grad-CAM"](5, {"VGG16-CAM": first})
    taken = last.model.get_submodule("features").state_dict()
    for name, tensor in first.model.get_submodule("trunk.features").state_dict().items():
        assert torch.equal(taken[name], tensor), name
    # The features are copied; fine-tuning the second network must not change the first.
    torch.nn.init.zeros_(next(last.model.parameters()))
    assert next(first.model.parameters()).any()


def test_cam_of_a_small_network_averages_to_its_logit() -> None:
    network = small_networks(64)["VGG16-CAM"](5, {})
    network.model.eval()
    explanation = network.explain(torch.rand(2, 3, 64, 64))
    bias = next(m for m in network.model.modules() if isinstance(m, nn.Linear)).bias
    # CAM: the logit is the spatial mean of the map, plus the bias of the linear layer.
    logits = explanation.maps.mean((1, 2)) + bias[explanation.output.argmax(1)]
    assert torch.allclose(logits, explanation.output.amax(1), atol=1e-5)


def test_one_cycle_rises_and_falls() -> None:
    recipe = small_networks(64)["AlexNet-CAM"](5, {}).recipe
    factors = [recipe.lr_factor(10 * i / 100, 10) for i in range(100)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1)
    assert 0 < peak < 50  # The factor falls for longer than it rises.
    assert factors[0] < 0.1 and factors[-1] < 0.1
    assert min(factors) >= 0


def test_augmentation_mirrors_about_half_of_the_pictures() -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 3, 4, 4)
    y = small_networks(64)["AlexNet-CAM"](5, {}).recipe.augment(x)
    kept = (y == x).flatten(1).all(1)
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    # 100 are expected, with a standard deviation of 7.
    assert 60 < int(mirrored.sum()) < 140
