"""What works on each of torchvision's models, as docs/models.md shows it.

``python -m helpers.models_table``, run in ``tests``, runs every model with random weights and writes that
page; with names, such as ``resnet18 fcn_resnet50``, it prints their rows. A long test holds the page to the
code.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import camkit
from camkit import Inputs, targets
from helpers.families import randomize, without_initialisation

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# What works on which model

All of `torchvision.models.list_models()`, run with random weights by `python -m helpers.models_table` in
`tests`, with nothing configured but the target: a class; for segmentation one class's pixels, for detectors
the sum of the scores, for RAFT the size of the flow. A test holds this page to the code.

- **layer**: where a map is made if none is named, with its channels and size for the input given, and its
  layout if that is not channels first.
- **CAM**: exact as the model is. **surgery**: the layer where `attach_gap_head` ends the trunk.
- **gradient**: `GradCAM` and all that weigh the activation by a gradient.
- **activation**: `EigenCAM` and the like.
- **masks**: `ScoreCAM`, `AblationCAM` and the like (two channels were tried).
- **LIFT**: `LIFTCAM`; *about* where it warns that contributions do not sum to the change of the score.
- **relevance**: `RelevanceCAM`; *about* where it warns that relevance is lost.
- **LeGrad**: the number of blocks.

A dash: an error says why not; on detectors, which choose boxes by numbers, LIFT and relevance were not tried.
RAFT's flow is made of many passes of one block, so a layer is to be named: `context_encoder`. Quantized
models are here as `quantize=True` makes them: nothing in them has a gradient.
"""
WAYS = ("gradient", "activation", "masks", "LIFT", "relevance", "LeGrad")
COLUMNS = ["model", "input", "layer", "CAM", "surgery", *WAYS]
VIDEO = ("mc3", "mvit", "r2plus1d", "r3d", "s3d", "swin3d")
DETECTION = ("rcnn", "fcos", "retinanet", "ssd")
SEGMENTATION = ("deeplab", "fcn_", "lraspp")


def build(name: str) -> nn.Module:
    """A model with random weights; a quantized one as torchvision makes it."""
    if name.startswith("quantized_"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a quantization without calibration, and of its deprecation
            model: nn.Module = torchvision.models.get_model(name, weights=None, quantize=True)
        return model.eval()
    own: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if any(part in name for part in (*DETECTION, *SEGMENTATION)):
        own["weights_backbone"] = None
    if any(part in name for part in DETECTION):  # random numbers in their heads are boxes without end
        if "ssd" not in name:
            own |= {"min_size": 160, "max_size": 256}
        if "rcnn" in name:
            own |= {"box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20}
        model = torchvision.models.get_model(name, weights=None, **own)
        return model.eval()
    with without_initialisation():
        model = torchvision.models.get_model(name, weights=None, **own)
    return randomize(model)


def example(name: str) -> tuple[Any, Any]:
    """An input, and a target."""
    torch.manual_seed(0)
    if name.startswith("raft"):
        return (torch.rand(1, 3, 128, 160), torch.rand(1, 3, 128, 160)), flow
    if any(name.startswith(kind) for kind in VIDEO):
        side = 112 if name.startswith(("mc3", "r2plus1d", "r3d", "swin3d")) else 224
        return torch.rand(1, 3, 16, side, side), 1
    if any(part in name for part in DETECTION):
        return torch.rand(1, 3, 160, 192), detected
    if any(part in name for part in SEGMENTATION):
        mask = torch.ones(128, 160, dtype=torch.bool)
        return torch.rand(1, 3, 128, 160), targets.key("out", targets.pixels(mask, 1))
    side = 299 if "inception_v3" in name else 224
    return torch.rand(1, 3, side, side), 1


def flow(output: list[Tensor]) -> Tensor:
    """The size of RAFT's last flow."""
    return output[-1].square().sum((1, 2, 3))


def detected(output: list[dict[str, Tensor]]) -> Tensor:
    """The sum of a detector's scores, and of its boxes, so that there is something where no score is high."""
    return torch.stack([found["scores"].sum() + 1e-3 * found["boxes"].sum() for found in output])


class TwoChannels:
    """Scores two channels only, and gives all other channels the score of the second."""

    def in_chunks(self, rescore: Callable[[range], Tensor], count: int, images: int) -> Tensor:
        two = rescore(range(2))
        return torch.cat([two, two[-1:].expand(count - 2, *two.shape[1:])])


class ScoreCAM(TwoChannels, camkit.ScoreCAM):
    """Score-CAM of two channels."""


class AblationCAM(TwoChannels, camkit.AblationCAM):
    """Ablation-CAM of two channels."""


def tried(method: Any, model: nn.Module, x: Any, target: Any) -> tuple[camkit.Explanation | None, str]:
    """An explanation and how it went: ``yes``, ``about`` or a dash."""
    layer = (
        {"layer": "context_encoder"} if type(model).__name__ == "RAFT" and method is not camkit.CAM else {}
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            explanation = method(model, **layer)(x, target)
        except (ValueError, TypeError) as error:
            if not any(str(error).startswith(f"{name}: expected") for name in ("model", "layer", "target")):
                raise
            return None, "–"
    assert torch.isfinite(explanation.maps).all()
    return explanation, "about" if any("CAM:" in str(warning.message) for warning in told) else "yes"


def row(name: str) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    model, (x, target) = build(name), example(name)
    size = Inputs.of(x).images.shape[1:]
    found, activation = tried(camkit.EigenCAM, model, x, target)
    explanation, gradient = tried(camkit.GradCAM, model, x, target)
    layer = "–"
    if found is not None:
        layer = shown(model, x)
    _, cam = tried(camkit.CAM, model, x, target)
    masks = {tried(method, model, x, target)[1] for method in (ScoreCAM, AblationCAM)}
    lift = relevance = "–"
    if target is not detected:  # the part of a detector after the layer chooses boxes by their numbers
        _, lift = tried(camkit.LIFTCAM, model, x, target)
        _, relevance = tried(camkit.RelevanceCAM, model, x, target)
    legrad, blocks = tried(camkit.LeGrad, model, x, target)
    if legrad is not None:
        blocks = str(max(1, len(legrad.parts)))
    surgery = surgery_of(model, x)
    cells = [gradient, activation, "yes" if masks == {"yes"} else "–", lift, relevance, blocks]
    assert explanation is None or explanation.layer == (found.layer if found else None)
    return [f"`{name}`", "×".join(map(str, size)), layer, cam, surgery, *cells]


def shown(model: nn.Module, x: Any) -> str:
    """Name, shape and layout of the layer that is found."""
    layer = "context_encoder" if type(model).__name__ == "RAFT" else None
    place = camkit.EigenCAM(model, layer)._find_locations(Inputs.of(x))[0]
    shape, layout = "×".join(map(str, (place.channels, *place.size))), str(place.layout)
    return f"`{place.name}` {shape}" + ("" if layout == "channels first" else f", {layout}")


def surgery_of(model: nn.Module, x: Any) -> str:
    """The layer where the trunk ends; checks that the maps of the new network average to its logits."""
    if not isinstance(x, Tensor):
        return "–"
    try:
        net = camkit.attach_gap_head(model, 2, input_shape=x.shape[1:])
    except (ValueError, TypeError) as error:
        if not any(str(error).startswith(f"{name}: expected") for name in ("model", "layer")):
            raise
        return "–"
    logits, maps = net.class_maps(x)
    pooled = maps.flatten(2).mean(2) + net.head.linear.bias
    torch.testing.assert_close(pooled, logits, rtol=1e-3, atol=1e-3 * float(maps.abs().max()))
    return f"`{net.layer}`"


def page(rows: list[list[str]]) -> str:
    """The whole page."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return HEAD + "\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main() -> None:
    """Writes the page, or prints some rows."""
    names = sys.argv[1:] or torchvision.models.list_models()
    rows = []
    for name in names:
        rows.append(row(name))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if len(names) == len(torchvision.models.list_models()):
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
