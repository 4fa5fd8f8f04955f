"""The networks of the benchmark, and for each library the calls that are measured.

All libraries explain the predicted class of the same images at the same layer of the same network; further
calls of camkit explain ten classes. Objects are created and hooks attached before the clock starts, and
removed before the next turn. Every call includes the forward pass and, where it explains the predicted class,
the choice of that class.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
from timing import Contestant, as_contestant
from torch import Tensor, nn
from torchvision.models import get_model

import camkit

LIBRARIES = ("camkit", "pytorch-grad-cam", "torchcam", "captum")
CAMKIT, PYTORCH_GRAD_CAM, TORCHCAM, CAPTUM = LIBRARIES
#: The name of Grad-CAM written by hand, without any library and without checks.
BY_HAND = "by hand"
#: For each method the name of its class, in each library that has the method.
METHODS = {
    "CAM": {CAMKIT: "CAM", TORCHCAM: "CAM"},
    "Grad-CAM": {CAMKIT: "GradCAM", PYTORCH_GRAD_CAM: "GradCAM", TORCHCAM: "GradCAM", CAPTUM: "LayerGradCam"},
    "Grad-CAM++": {CAMKIT: "GradCAMPlusPlus", PYTORCH_GRAD_CAM: "GradCAMPlusPlus", TORCHCAM: "GradCAMpp"},
    "XGrad-CAM": {CAMKIT: "XGradCAM", PYTORCH_GRAD_CAM: "XGradCAM", TORCHCAM: "XGradCAM"},
    "HiResCAM": {CAMKIT: "HiResCAM", PYTORCH_GRAD_CAM: "HiResCAM"},
    "LayerCAM": {CAMKIT: "LayerCAM", PYTORCH_GRAD_CAM: "LayerCAM", TORCHCAM: "LayerCAM"},
    "Eigen-CAM": {CAMKIT: "EigenCAM", PYTORCH_GRAD_CAM: "EigenCAM"},
}
#: Further calls of camkit: Grad-CAM resized to the input's size, and ten classes at once.
HEATMAPS, TEN_CAM, TEN_GRADCAM = "Grad-CAM, heatmaps", "CAM, 10 classes", "Grad-CAM, 10 classes"


def build_network(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a network of torchvision with random parameters and activations of a usual magnitude.

    Its BatchNorm layers hold the statistics of random images. The head of an untrained ViT is all zeros and
    gets random weights.
    """
    torch.manual_seed(0)
    model = get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # The running statistics become those of the single batch below.
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 224, 224))
    return model.eval().to(device, dtype)


def cam_applies(model: nn.Module, x: Tensor) -> bool:
    """Returns whether CAM explains the network without a change to its head."""
    try:
        camkit.CAM(model)(x)
    except ValueError:
        return False
    return True


def prepare_forward(model: nn.Module, x: Tensor) -> Contestant:
    """Prepares the baseline: one forward pass in inference mode."""

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return as_contestant(call)


def prepare_camkit(method: Callable[..., object], x: Tensor, target: Any = None) -> Contestant:
    """Prepares a method of camkit."""
    return as_contestant(lambda: method(x, target))


def prepare_pooling(net: nn.Module, x: Tensor) -> dict[str, Contestant]:
    """Prepares the calls of camkit that are measured only on a network that CAM explains."""
    cam, gradcam, ten = camkit.CAM(net), camkit.GradCAM(net), [list(range(10))] * len(x)
    return {
        f"{CAMKIT}: CAM": prepare_camkit(cam, x),
        f"{CAMKIT}: {TEN_CAM}": prepare_camkit(cam, x, ten),
        f"{CAMKIT}: {TEN_GRADCAM}": prepare_camkit(gradcam, x, ten),
    }


def prepare_all(model: nn.Module, x: Tensor) -> dict[str, Contestant]:
    """Prepares all calls of all libraries, and returns them by name: ``"library: method"``."""
    gradcam = camkit.GradCAM(model)
    layer = gradcam(x).layer
    pooled = cam_applies(model, x)
    found = prepare_pooling(model, x) if pooled else {}
    found[f"{CAMKIT}: {HEATMAPS}"] = as_contestant(lambda: gradcam(x).heatmaps())
    for method, kinds in METHODS.items():
        if method != "CAM":
            found[f"{CAMKIT}: {method}"] = prepare_camkit(getattr(camkit, kinds[CAMKIT])(model), x)
        if kind := kinds.get(PYTORCH_GRAD_CAM):
            found[f"{PYTORCH_GRAD_CAM}: {method}"] = prepare_pytorch_grad_cam(kind, model, layer, x)
        if (kind := kinds.get(TORCHCAM)) and (method != "CAM" or pooled):
            found[f"{TORCHCAM}: {method}"] = prepare_torchcam(kind, model, layer, x)
    found[f"{CAPTUM}: Grad-CAM"] = prepare_captum(model, layer, x)
    found[f"{BY_HAND}: Grad-CAM"] = prepare_by_hand(model, layer, x)
    return found


def reshape_function(model: nn.Module, layer: str) -> Callable[[Tensor], Tensor] | None:
    """Returns the ``reshape_transform`` that the other libraries need for a transformer, or None."""
    name = type(model).__name__
    if name == "VisionTransformer":
        return lambda tokens: tokens[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    if name == "SwinTransformer" and layer != "permute":  # The layer `permute` itself returns (N, C, H, W).
        return lambda positions: positions.permute(0, 3, 1, 2)
    return None


def prepare_pytorch_grad_cam(
    kind: str, model: nn.Module, layer: str, x: Tensor, **settings: Any
) -> Contestant:
    """Prepares a method of pytorch-grad-cam, which returns heatmaps of the input's size."""

    @contextlib.contextmanager
    def attached() -> Iterator[Callable[[], object]]:
        reshape = reshape_function(model, layer)
        cam = getattr(pytorch_grad_cam, kind)(model, [model.get_submodule(layer)], reshape)
        vars(cam).update(settings)  # Options such as the batch size are attributes, not arguments.
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # Hides the progress bar.
                yield lambda: cam(x, None)
        finally:
            cam.activations_and_grads.release()
            model.zero_grad()

    return attached


def prepare_torchcam(kind: str, model: nn.Module, layer: str, x: Tensor, **settings: Any) -> Contestant:
    """Prepares a method of torchcam, which returns normalised maps. Its user must run the forward pass."""
    needs_gradient = issubclass(getattr(torchcam.methods, kind), torchcam.methods.gradient._GradCAM)
    if kind == "CAM":
        heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        settings["fc_layer"] = heads[-1]

    @contextlib.contextmanager
    def attached() -> Iterator[Callable[[], object]]:
        reshape = reshape_function(model, layer)
        with getattr(torchcam.methods, kind)(model, layer, reshape_transform=reshape, **settings) as cam:

            def call() -> object:
                with torch.set_grad_enabled(needs_gradient):
                    scores = model(x)
                return cam(scores.argmax(1).tolist(), scores)

            yield call

    return attached


def prepare_captum(model: nn.Module, layer: str, x: Tensor) -> Contestant:
    """Prepares Captum's Grad-CAM, which returns raw maps, after a forward pass that chooses the class."""
    cam = captum.attr.LayerGradCam(model, model.get_submodule(layer))

    def call() -> object:
        with torch.inference_mode():
            predicted = model(x).argmax(1)
        # Clone the classes, because autograd refuses a tensor that was made in inference mode.
        return cam.attribute(x, target=predicted.clone())

    return as_contestant(call)


def prepare_by_hand(model: nn.Module, layer: str, x: Tensor) -> Contestant:
    """Prepares Grad-CAM by hand: a graph from the layer to the scores, and one gradient at the layer."""
    reshape = reshape_function(model, layer) or (lambda output: output)

    @contextlib.contextmanager
    def attached() -> Iterator[Callable[[], object]]:
        leaves: list[Tensor] = []

        def take(module: nn.Module, args: object, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            torch.set_grad_enabled(True)  # Only the layers after this one build a graph.
            return leaves[-1].clone()  # Otherwise an in-place operation would change the leaf.

        def call() -> Tensor:
            leaves.clear()
            with torch.no_grad():
                scores = model(x)
            score = scores.amax(1).sum()
            gradient, activation = map(reshape, (*torch.autograd.grad(score, leaves[0]), leaves[0].detach()))
            return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()

        handle = model.get_submodule(layer).register_forward_hook(take)
        try:
            yield call
        finally:
            handle.remove()

    return attached
