"""Where pytorch-grad-cam, captum and torchcam are right, camkit agrees with them, up to their rescaling.

Where a peer departs from the paper, a comment says how, and the test chooses the case in which it does not.
"""

import copy
from typing import Any

import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import camkit
from helpers.peers import LAYERS, SCALE, SHAPES, Targets, case, close, inputs, network, scaled, small


def by_largest(maps: Tensor) -> Tensor:
    return maps / maps.amax((1, 2), keepdim=True)


def up_to_sign(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    signs = (ours * theirs).flatten(1).sum(1).sign()[:, None, None]
    close(ours, theirs * signs, tolerance)


def peer(kind: Any, model: nn.Module, layer: str, x: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """pytorch-grad-cam's own call: its map before it is cut off at zero, resized and scaled, and after."""
    kept: list[Any] = []
    with kind(model, [model.get_submodule(layer)]) as cam:
        its_own = cam.get_cam_image

        def get_cam_image(*args: Any) -> Any:
            kept.append(its_own(*args))
            return kept[-1]

        cam.get_cam_image = get_cam_image
        final = cam(x.clone().requires_grad_(), targets)
    (raw,) = kept
    return torch.as_tensor(raw).double(), torch.as_tensor(final).double()


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM", "XGradCAM", "LayerCAM", "GradCAMPlusPlus"])
def test_gradient_methods_of_pytorch_grad_cam(method: str, name: str, layer: str) -> None:
    model, x, classes = case(name, layer)
    theirs, ours = scaled(classes)
    raw, final = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    explained = getattr(camkit, method)(model, layer)(x, ours)
    # Only XGradCAM and GradCAMPlusPlus add an epsilon.
    tolerance = {"XGradCAM": 1e-5, "GradCAMPlusPlus": 1e-5}.get(method, 1e-12)
    close(explained.maps, raw if method == "HiResCAM" else raw.relu(), tolerance)
    if method != "HiResCAM":  # which it cuts off at zero before it scales
        close(explained.heatmaps(), final, 1e-4 if tolerance > 1e-12 else 1e-6)


def test_hirescams_positive_part_is_pytorch_grad_cams_picture() -> None:
    model, x, classes = case("vgg16", "features.29")
    theirs, ours = scaled(classes)
    _, final = peer(pytorch_grad_cam.HiResCAM, model, "features.29", x, theirs)
    maps = camkit.HiResCAM(model, "features.29")(x, ours).maps.relu()
    resized = F.interpolate(maps[:, None], x.shape[2:], mode="bilinear")[:, 0]
    close(camkit.normalize(resized), final, 1e-6)


class Centred(nn.Module):
    """Each channel less its mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("method", "layer"), [("EigenCAM", "layer4"), ("EigenCAM", "layer1"), ("EigenGradCAM", "layer4")]
)
def test_eigen_methods_of_pytorch_grad_cam(method: str, layer: str) -> None:
    """pytorch-grad-cam centres each channel, as Eigen-CAM's paper does not, and leaves the sign open.

    Of centred channels both have the same directions, and so have they of centred channels times a gradient
    that is the same everywhere. There are more channels than positions in layer4, and fewer in layer1.
    """
    model = copy.deepcopy(network("resnet18"))
    setattr(model, layer, nn.Sequential(model.get_submodule(layer), Centred()))
    x = inputs(*SHAPES["resnet18"])
    theirs, ours = scaled([3, 8])
    raw, _ = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    up_to_sign(getattr(camkit, method)(model, layer)(x, ours).maps, raw, 1e-6)  # it gives float32
    model = network("resnet18")
    raw, _ = peer(getattr(pytorch_grad_cam, method), model, layer, x, theirs)
    with pytest.raises(AssertionError, match="off by"):
        up_to_sign(getattr(camkit, method)(model, layer)(x, ours).maps, raw, 0.1)


@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_kpca_cam_of_pytorch_grad_cam(name: str, layer: str) -> None:
    """The same up to the sign, which pytorch-grad-cam leaves open."""
    model, x, classes = case(name, layer)
    raw, _ = peer(pytorch_grad_cam.KPCA_CAM, model, layer, x, scaled(classes)[0])
    up_to_sign(camkit.KPCACAM(model, layer)(x, classes).maps, raw, 1e-6)  # it gives float32


@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_kpca_cam_of_pytorch_grad_cam_with_a_gamma(gamma: float) -> None:
    def kind(*args: Any) -> Any:
        return pytorch_grad_cam.KPCA_CAM(*args, gamma=gamma)

    model, x = network("vgg16"), inputs(*SHAPES["vgg16"])
    raw, _ = peer(kind, model, "features.21", x, scaled([3, 8])[0])
    up_to_sign(camkit.KPCACAM(model, "features.21", gamma=gamma)(x).maps, raw, 1e-6)


@pytest.mark.parametrize("head", [nn.Tanh(), nn.SiLU(), nn.Softplus()], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("rest", [False, True], ids=["logit", "ReST"])
def test_shapley_cam_of_pytorch_grad_cam(head: nn.Module, rest: bool) -> None:
    """With a smooth head, and with the paper's own target: logit less cross-entropy."""
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), head, nn.Linear(8, 4))
    x, classes = inputs(3, 3, 10, 8), [0, 2, 3]
    theirs, ours = scaled(classes)
    if rest:
        theirs = [ClassifierOutputReST(c) for c in classes]

        def ours(y: Tensor) -> Tensor:
            chosen = torch.tensor(classes)
            return y[range(3), classes] - F.cross_entropy(y, chosen, reduction="none")

    raw, _ = peer(pytorch_grad_cam.ShapleyCAM, model, "0", x, theirs)
    maps = camkit.ShapleyCAM(model, "0")(x, ours).maps
    close(maps, raw.relu(), 1e-12)
    with pytest.raises(AssertionError, match="off by"):  # there is a curvature to correct for
        close(camkit.GradCAM(model, "0")(x, ours).maps, raw.relu(), 1e-3)


def test_ablation_cam_of_pytorch_grad_cam() -> None:
    """Where the smallest activation is zero; pytorch-grad-cam puts -1e7 for a channel where it is not."""
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), nn.ReLU(), nn.Linear(8, 4))
    x = inputs(3, 3, 10, 8)
    classes = camkit.AblationCAM(model, "0")(x, [[0, 1, 2, 3]] * 3).maps.amax((2, 3)).argmax(1).tolist()
    raw, final = peer(pytorch_grad_cam.AblationCAM, model, "0", x, [lambda y, c=c: y[c] for c in classes])  # type: ignore[misc]
    explained = camkit.AblationCAM(model, "0")(x, classes)
    close(explained.maps, raw.relu(), 1e-5)  # its scores are float32
    close(explained.heatmaps(), final, 1e-4)


def test_score_cam_of_pytorch_grad_cam() -> None:
    """pytorch-grad-cam takes a softmax of the scores over the channels.

    Of scores that are logarithms of p it is p by its sum, so that maps are proportional. And it lets corners
    meet when it resizes, so that the layer has the input's resolution here.
    """
    model = small(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 20, 8), nn.ReLU(), nn.Linear(8, 4))
    x, classes = inputs(2, 3, 10, 8), [1, 3]
    theirs: Targets = [lambda y, c=c: y.log_softmax(0)[c] for c in classes]  # type: ignore[misc]
    raw, final = peer(pytorch_grad_cam.ScoreCAM, model, "0", x, theirs)
    explained = camkit.ScoreCAM(model, "0")(x, classes)
    close(by_largest(explained.maps), by_largest(raw.relu()), 1e-6)
    close(explained.heatmaps(), final, 1e-6)


def test_fullgrad_of_pytorch_grad_cam(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-grad-cam scales every channel for itself, the authors' program and camkit a layer's together.

    Here it has to scale them together too; gradients, biases and sums are its own.
    """

    def together(products: Any, size: tuple[int, int]) -> Any:
        maps = torch.as_tensor(products)
        low, high = (f((1, 2, 3), keepdim=True) for f in (maps.amin, maps.amax))
        return F.interpolate((maps - low) / (high - low), size[::-1], mode="bilinear").numpy()

    model, x = network("resnet18"), inputs(*SHAPES["resnet18"])
    theirs, ours = scaled([3, 8])
    explained = camkit.FullGrad(model)(x, ours)
    with pytorch_grad_cam.FullGrad(model, []) as cam:
        apart = torch.as_tensor(cam(x, theirs)).double()
        monkeypatch.setattr(pytorch_grad_cam.fullgrad_cam, "scale_accross_batch_and_channels", together)
        close(explained.heatmaps(), torch.as_tensor(cam(x, theirs)).double(), 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        close(explained.heatmaps(), apart, 1e-2)


def test_fem_as_the_paper_has_it() -> None:
    """Fuad et al. sum the binary maps of strong positions, weighted by the channels' means.

    pytorch-grad-cam's FEM sums the activation instead, weighed by the share of positions that are strong: it
    is another map.
    """
    model, x = network("vgg16"), inputs(*SHAPES["vgg16"])
    features = model.get_submodule("features.21")
    kept: list[Tensor] = []
    handle = features.register_forward_hook(lambda module, args, out: kept.append(out))
    model(x)
    handle.remove()
    expected = torch.zeros(2, *kept[0].shape[2:], dtype=torch.float64)
    for image, result in zip(kept[0], expected, strict=True):
        for channel in image:
            values = channel.flatten().tolist()
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            for i, row in enumerate(channel.tolist()):
                for j, value in enumerate(row):
                    result[i, j] += mean if value >= mean + 2 * deviation else 0
    maps = camkit.FEM(model, "features.21")(x).maps
    close(maps, expected, 1e-12)
    raw, _ = peer(pytorch_grad_cam.FEM, model, "features.21", x, scaled([0, 0])[0])
    shares = torch.stack(
        [(a > a.mean() + 2 * a.std(correction=0)).double().mean() for a in kept[0].flatten(0, 1)]
    )
    close((shares.reshape(2, -1, 1, 1) * kept[0]).sum(1), raw, 1e-12)
    with pytest.raises(AssertionError, match="off by"):
        close(camkit.normalize(maps), camkit.normalize(raw), 0.1)


@pytest.mark.parametrize("method", ["GradCAM", "XGradCAM", "LayerCAM"])
@pytest.mark.parametrize(("name", "layer"), LAYERS[::2])
def test_gradient_methods_of_torchcam(method: str, name: str, layer: str) -> None:
    """Its GradCAMpp sums g^3 A where the paper has g^3 times the sum of A, and then divides a copy."""
    model, x, classes = case(name, layer)
    with getattr(torchcam.methods, method)(model, layer) as cam:
        output = model(x.clone().requires_grad_())
        (theirs,) = cam(classes, SCALE * output, normalized=False)
    ours = getattr(camkit, method)(model, layer)(x, scaled(classes)[1]).maps
    close(ours, theirs, 1e-6 if method == "XGradCAM" else 1e-12)  # which adds an epsilon


def test_cam_of_torchcam() -> None:
    model, x = network("resnet18"), inputs(*SHAPES["resnet18"])
    with torchcam.methods.CAM(model, "layer4", "fc") as cam:
        model(x)
        (theirs,) = cam([3, 8], normalized=False)
    close(camkit.CAM(model)(x, [3, 8]).maps, theirs, 1e-12)


def test_score_cam_of_torchcam() -> None:
    """torchcam takes a softmax of the differences to the score of the input over the channels.

    Of logarithms of p it is p by its sum, so that maps are proportional. And it scales the activation to
    [0, 1] before it resizes, not after it; where each side is three times as long both are the same.
    """
    model = small(nn.Flatten(), nn.Linear(7 * 32, 8), nn.ReLU(), nn.Linear(8, 4), stride=3, channels=7)
    x, classes = inputs(2, 3, 24, 12), [1, 3]
    targets: Any = [lambda y, c=c: y.log_softmax(0)[c] for c in classes]
    with torchcam.methods.ScoreCAM(model, "0") as cam, torch.no_grad():
        model(x)
        (theirs,) = cam(targets=targets, normalized=False)
    close(by_largest(camkit.ScoreCAM(model, "0")(x, classes).maps), by_largest(theirs), 1e-8)


def test_legrad_of_torchcam() -> None:
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    x, classes = inputs(2, 3, 32, 32), [1, 4]
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    with torchcam.methods.LeGrad(model, list(blocks)) as cam:
        model(x)
        (theirs,) = cam(classes, normalized=False)
    close(camkit.LeGrad(model)(x, classes).maps, theirs, 1e-12)


def test_guided_backpropagation_of_pytorch_grad_cam() -> None:
    model, x = copy.deepcopy(network("vgg16")), inputs(*SHAPES["vgg16"])
    ours = camkit.guided_backprop(model, x, [3, 8])
    guided = pytorch_grad_cam.GuidedBackpropReLUModel(model)
    theirs = [guided(x[n : n + 1].clone(), c) for n, c in enumerate([3, 8])]
    close(ours, torch.stack([torch.as_tensor(each).permute(2, 0, 1) for each in theirs]), 1e-12)
