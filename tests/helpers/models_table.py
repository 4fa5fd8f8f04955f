"""The table in docs/models.md, which shows the methods that work on each model of torchvision.

``python -m helpers.models_table``, run in ``tests``, runs every model with random weights and writes that
page. With names of models, such as ``resnet18 fcn_resnet50``, it only prints their rows.
``models/test_torchvision.py`` compares the page with new runs: a few models in a quick test, all others in a
slow one.
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
HEAD = """# Methods that work on each model

The table lists the methods that work on each model of `torchvision.models.list_models()`, with random
weights. `python -m helpers.models_table`, run in the folder `tests`, writes this page, and a test compares
the table with the code.

Only the target is given, and for RAFT also the layer. The target is a class; for segmentation it is the
pixels of one class, for detectors the sum of the scores plus 0.001 times the sum of the box coordinates, and
for RAFT the sum of the squares of the last flow. *yes* in a column means that its methods work.

- **layer**: the layer at which a map is made by default. It is followed by its channels and spatial size for
  the given input, and by its layout unless that is channels first.
- **CAM**: `CAM` on the model as it is.
- **surgery**: the last layer of the trunk that `attach_gap_head` makes.
- **gradient**: `GradCAM`, which stands for all methods that weight the activation by a gradient.
- **activation**: `EigenCAM`, which stands for all methods that use only the activation.
- **masks**: `ScoreCAM` and `AblationCAM`, each with two channels. They stand for all methods that mask the
  input or leave out channels.
- **LIFT**: `LIFTCAM`. *about* means a warning that the contributions do not sum to the change of the score.
- **relevance**: `RelevanceCAM`. *about* means a warning that relevance is lost.
- **LeGrad**: the number of blocks that `LeGrad` explains.

A dash means that the method raises an error that states the reason. Some dashes mean that nothing was tried:
`LIFTCAM` and `RelevanceCAM` on detectors, which select boxes by their scores, and `attach_gap_head` on RAFT,
which takes two images.

RAFT computes its flow by running one block many times, so a layer has to be named: `context_encoder`. The
quantized models are made with `quantize=True`. Nothing in them has a gradient.
"""
WAYS = ("gradient", "activation", "masks", "LIFT", "relevance", "LeGrad")
COLUMNS = ["model", "input", "layer", "CAM", "surgery", *WAYS]
VIDEO = ("mc3", "mvit", "r2plus1d", "r3d", "s3d", "swin3d")
DETECTION = ("rcnn", "fcos", "retinanet", "ssd")
SEGMENTATION = ("deeplab", "fcn_", "lraspp")


def build(name: str) -> nn.Module:
    """A model with random weights; a quantized model keeps those that torchvision gives it."""
    if name.startswith("quantized_"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized without calibration; deprecated
            model: nn.Module = torchvision.models.get_model(name, weights=None, quantize=True)
        return model.eval()
    own: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if any(part in name for part in (*DETECTION, *SEGMENTATION)):
        own["weights_backbone"] = None
    if any(part in name for part in DETECTION):  # random heads find very many boxes: limit them
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
    """An input for a model, and a target."""
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
    """The sum of squares of RAFT's last flow, for each image."""
    return output[-1].square().sum((1, 2, 3))


def detected(output: list[dict[str, Tensor]]) -> Tensor:
    """The sum of a detector's scores, plus a small share of its boxes in case that no score is high."""
    return torch.stack([found["scores"].sum() + 1e-3 * found["boxes"].sum() for found in output])


class TwoChannels:
    """Scores only two channels, and uses the second score for all other channels."""

    def in_chunks(self, rescore: Callable[[range], Tensor], count: int, images: int) -> Tensor:
        two = rescore(range(2))
        return torch.cat([two, two[-1:].expand(count - 2, *two.shape[1:])])


class ScoreCAM(TwoChannels, camkit.ScoreCAM):
    """Score-CAM that scores two channels."""


class AblationCAM(TwoChannels, camkit.AblationCAM):
    """Ablation-CAM that scores two channels."""


def tried(method: Any, model: nn.Module, x: Any, target: Any) -> tuple[camkit.Explanation | None, str]:
    """The explanation, or ``None`` if the method refuses; and the cell: ``yes``, ``about`` or a dash."""
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
    if target is not detected:  # a detector selects boxes by numbers after the layer
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
    """The name, shape and layout of the layer that camkit finds; for RAFT of ``context_encoder``."""
    layer = "context_encoder" if type(model).__name__ == "RAFT" else None
    place = camkit.EigenCAM(model, layer)._locate(Inputs.of(x))[0]
    shape, layout = "×".join(map(str, (place.channels, *place.size))), str(place.layout)
    return f"`{place.name}` {shape}" + ("" if layout == "channels first" else f", {layout}")


def surgery_of(model: nn.Module, x: Any) -> str:
    """The layer where the trunk ends; a dash if surgery refuses the model, or if it takes several inputs.

    Asserts that the maps of the new network are exact: their mean plus the bias is the logit.
    """
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
    """The text of the whole page."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return HEAD + "\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main() -> None:
    """Prints the rows of the given models; writes the page if there are rows of all models."""
    names = sys.argv[1:] or torchvision.models.list_models()
    rows = []
    for name in names:
        rows.append(row(name))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if len(names) == len(torchvision.models.list_models()):
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
