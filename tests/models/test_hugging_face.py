"""Models of Hugging Face's transformers, small and with random weights, with nothing configured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import camkit
from camkit import targets
from helpers.families import randomize
from helpers.zoo import CLASSES, Found, explained_right

SMALL = (64, 96)  # not square, so that rows are not taken for columns
GRID = (48, 64)  # 3 x 4 patches of 16


class What(NamedTuple):
    """A part of the output to explain, as a target and as a function to scores ``(N, K)``."""

    target: Any
    score: Callable[[Any], Tensor]


def classes(entry: str) -> What:
    """Five columns of an entry."""
    return What(targets.key(entry, CLASSES), lambda output: output[entry][:, :5])


def category(size: tuple[int, int]) -> What:
    """All pixels of one category of a segmentation."""
    everywhere = torch.ones(size, dtype=torch.bool)
    target = targets.key("logits", targets.pixels(everywhere, 1))
    return What(target, lambda output: output.logits[:, 1].sum((1, 2))[:, None])


def _class_token(output: Any) -> Tensor:
    token: Tensor = output.last_hidden_state[:, 0, :5]
    return token


def _first_box(output: Any) -> Tensor:
    scores: Tensor = output.logits[:, 0, :5]
    return scores


LOGITS, POOLED = classes("logits"), classes("pooler_output")
CLASS_TOKEN, FIRST_BOX = What(_class_token, _class_token), What(_first_box, _first_box)


class Row(NamedTuple):
    """A model, its configuration, the layer that should be found on it, its input size and its target."""

    name: str
    options: dict[str, Any]
    found: Found
    size: tuple[int, int] = SMALL
    what: What = LOGITS
    variant: str = ""

    @property
    def id(self) -> str:
        return f"{self.name} {self.variant}".strip()


SHALLOW: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LABELS: dict[str, Any] = {"num_labels": 5}
VIT: dict[str, Any] = {**SHALLOW, **LABELS, "intermediate_size": 48, "image_size": GRID, "patch_size": 16}
SQUARE: dict[str, Any] = {**VIT, "image_size": 64}
DINO: dict[str, Any] = {**SHALLOW, **LABELS, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
STAGES: dict[str, Any] = {**LABELS, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
SWIN: dict[str, Any] = {
    **LABELS,
    "image_size": (128, 192),
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 4,
}
PYRAMID: dict[str, Any] = {
    **LABELS,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
}


def vit(name: str, layer: str, reads: tuple[int, int], options: Any = VIT, **rest: Any) -> Row:
    return Row(name, options, Found(layer, 32, (3, 4), reads), GRID, **rest)


def dino(name: str, layer: str, reads: tuple[int, int], options: Any = DINO, **rest: Any) -> Row:
    return Row(name, options, Found(layer, 32, (3, 4), reads), (42, 56), **rest)


QUICK = [
    vit("ViTForImageClassification", "vit.layers.2.layernorm_before", (1, 0)),
    vit("DeiTForImageClassificationWithTeacher", "deit.layers.2.layernorm_before", (2, 0)),
    dino(
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers.layernorm",
        (5, 0),
        {**DINO, "num_register_tokens": 4},
    ),
    Row(
        "ResNetForImageClassification",
        {**STAGES, "embedding_size": 8},
        Found("resnet.encoder.stages.3", 32, (2, 3)),
    ),
    Row("ConvNextForImageClassification", STAGES, Found("convnext.encoder.stages.3", 32, (2, 3))),
]

CLASSIFIERS = [
    vit(
        "ViTForImageClassification",
        "vit.layers.2.layernorm_before",
        (1, 0),
        {**VIT, "attn_implementation": "eager"},
        variant="eager",
    ),
    vit("DeiTForImageClassification", "deit.layers.2.layernorm_before", (2, 0)),
    vit("IJepaForImageClassification", "ijepa.layernorm", (0, 0)),
    vit("ViTMSNForImageClassification", "vit.layers.2.layernorm_before", (1, 0)),
    vit("BeitForImageClassification", "beit.layernorm", (1, 0)),
    vit(
        "BeitForImageClassification",
        "beit.layers.2.layernorm_before",
        (1, 0),
        {**VIT, "use_mean_pooling": False},
        variant="class token",
    ),
    vit("Data2VecVisionForImageClassification", "data2vec_vision.layernorm", (1, 0)),
    # The class token beside the mean of the patches.
    dino("Dinov2ForImageClassification", "dinov2.layernorm", (1, 0)),
    Row(
        "CLIPForImageClassification",
        {"vision_config": SQUARE, **LABELS},
        Found("vision_model.encoder.layers.2", 32, (4, 4), (1, 0)),
        (64, 64),
    ),
    Row(
        "SiglipForImageClassification",
        {"vision_config": SQUARE, **LABELS},
        Found("vision_model.post_layernorm", 32, (4, 4), (0, 0)),
        (64, 64),
    ),
    Row("SwinForImageClassification", SWIN, Found("swin.layernorm", 64, (4, 6), (0, 0)), (128, 192)),
    Row("Swinv2ForImageClassification", SWIN, Found("swinv2.layernorm", 64, (4, 6), (0, 0)), (128, 192)),
    Row("ConvNextV2ForImageClassification", STAGES, Found("convnextv2.encoder.stages.3", 32, (2, 3))),
    Row(
        "RegNetForImageClassification",
        {**STAGES, "embedding_size": 8, "groups_width": 8},
        Found("regnet.encoder.stages.3", 32, (2, 3)),
    ),
    Row(
        "BitForImageClassification",
        {**STAGES, "embedding_size": 32, "num_groups": 8, "hidden_sizes": [64, 64, 128, 128]},
        Found("bit.norm", 128, (2, 3)),
    ),
    Row("PoolFormerForImageClassification", STAGES, Found("norm", 32, (2, 3))),
    Row(
        "MobileViTForImageClassification",
        {**LABELS, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 40, 64]},
        Found("mobilevit.conv_1x1_exp", 64, (4, 6)),
        (128, 192),
    ),
    Row(
        "MobileViTV2ForImageClassification",
        {**LABELS, "width_multiplier": 0.5},
        Found("mobilevitv2.encoder.layer.4", 256, (4, 6)),
        (128, 192),
    ),
    Row(
        "MobileNetV1ForImageClassification",
        {**LABELS, "depth_multiplier": 0.25},
        Found("mobilenet_v1.layer.25", 256, (2, 3)),
    ),
    Row(
        "MobileNetV2ForImageClassification",
        {**LABELS, "depth_multiplier": 0.35},
        Found("mobilenet_v2.conv_1x1", 1280, (2, 3)),
    ),
    Row(
        "EfficientNetForImageClassification",
        {**LABELS, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
        Found("efficientnet.encoder.top_activation", 320, (2, 3)),
    ),
    Row("SegformerForImageClassification", PYRAMID, Found("segformer.stages.3", 32, (2, 3))),
    Row(
        "CvtForImageClassification",
        {**LABELS, "embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
        Found("cvt.encoder.stages.2.layers.2.layernorm_before", 48, (4, 6), (1, 0)),
    ),
    Row(
        "LevitForImageClassification",
        {
            **LABELS,
            "image_size": 128,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        Found("levit.encoder.stages.2", 64, (2, 2), (0, 0)),
        (128, 128),
    ),
    Row(
        "PvtForImageClassification",
        {**PYRAMID, "image_size": 96},
        Found("pvt.encoder.block.3.0.layer_norm_1", 32, (3, 3), (1, 0)),
        (96, 96),
    ),
    Row(
        "PvtV2ForImageClassification",
        PYRAMID,
        Found("pvt_v2.encoder.layers.3.layer_norm", 32, (2, 3), (0, 0)),
    ),
    Row(
        "FocalNetForImageClassification",
        {**LABELS, "embed_dim": 8, "depths": [1, 1, 1, 1]},
        Found("focalnet.layernorm", 64, (2, 3), (0, 0)),
    ),
    Row(
        "SwiftFormerForImageClassification",
        {**LABELS, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]},
        Found("norm", 48, (2, 3)),
    ),
    Row("TextNetForImageClassification", LABELS, Found("textnet.encoder.stages.3", 512, (2, 3))),
    Row("HGNetV2ForImageClassification", LABELS, Found("encoder.stages.3", 2048, (2, 3))),
    Row(
        "TimmWrapperForImageClassification",
        {**LABELS, "architecture": "test_resnet"},
        Found("timm_model.layer4", 96, (2, 3)),
    ),
]

#: Models whose first output is tokens, and whose explained output comes after them.
BACKBONES = [
    vit("ViTModel", "layers.2.layernorm_before", (1, 0), what=POOLED),
    vit("ViTModel", "layers.2.layernorm_before", (1, 0), what=CLASS_TOKEN, variant="class token"),
    dino("Dinov2Model", "encoder.layer.2.norm1", (1, 0), what=POOLED),
    Row(
        "DINOv3ViTModel",
        {**SQUARE, "num_register_tokens": 4},
        Found("model.layer.2.norm1", 32, (3, 4), (5, 0)),
        GRID,
        POOLED,
    ),
    Row("DINOv3ConvNextModel", STAGES, Found("model.stages.3", 32, (2, 3)), what=POOLED),
    Row(
        "CLIPVisionModel", SQUARE, Found("encoder.layers.2.layer_norm1", 32, (4, 4), (1, 0)), (64, 64), POOLED
    ),
    Row(
        "CLIPVisionModelWithProjection",
        {**SQUARE, "projection_dim": 16},
        Found("vision_model.encoder.layers.2.layer_norm1", 32, (4, 4), (1, 0)),
        (64, 64),
        classes("image_embeds"),
    ),
    Row("SiglipVisionModel", SQUARE, Found("post_layernorm", 32, (4, 4), (0, 0)), (64, 64), POOLED),
]

#: The last features are the inputs of the classifier, not its scores.
SEGMENTATION = [
    Row(
        "SegformerForSemanticSegmentation",
        {**PYRAMID, "decoder_hidden_size": 16},
        Found("decode_head.activation", 16, (16, 24)),
        what=category((16, 24)),
    ),
    Row(
        "BeitForSemanticSegmentation",
        {
            **VIT,
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "pool_scales": [1, 2],
            "use_auxiliary_head": False,
        },
        Found("decode_head.fpn_bottleneck", 32, (12, 16)),
        GRID,
        category((12, 16)),
    ),
    Row(
        "MobileNetV2ForSemanticSegmentation",
        {**LABELS, "depth_multiplier": 0.35},
        Found("segmentation_head.conv_projection", 256, (2, 3)),
        what=category((2, 3)),
    ),
    Row(
        "DPTForSemanticSegmentation",
        {
            **SQUARE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 16,
            "use_auxiliary_head": False,
        },
        Found("head.head.2", 16, (32, 32)),
        (64, 64),
        category((64, 64)),
    ),
    Row(
        "UperNetForSemanticSegmentation",
        {
            **LABELS,
            "backbone_config": {
                "model_type": "convnext",
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 16,
            "use_auxiliary_head": False,
        },
        Found("decode_head.fpn_bottleneck", 16, (16, 24)),
        what=category(SMALL),
    ),
]

DETECTORS = [
    Row(
        "YolosForObjectDetection",
        {**VIT, "image_size": list(GRID), "num_detection_tokens": 20},
        Found("vit.encoder.layer.2.layernorm_before", 32, (3, 4), (1, 20)),
        GRID,
        FIRST_BOX,
    ),
    Row(
        "DetrForObjectDetection",
        {
            **LABELS,
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage4"],
            },
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 8,
        },
        Found("model.encoder.layers.1", 32, (2, 3), (0, 0)),
        what=FIRST_BOX,
    ),
]


def build(row: Row) -> Any:
    kind: Any = getattr(transformers, row.name)
    return randomize(kind(kind.config_class(**row.options))).double()


def check(row: Row) -> None:
    x = torch.randn(2, 3, *row.size).double()
    explained_right(build(row), x, row.found, *row.what)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.id)
def test_of_hugging_face(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [*CLASSIFIERS, *BACKBONES, *SEGMENTATION, *DETECTORS], ids=lambda row: row.id)
def test_all_of_hugging_face(row: Row) -> None:
    check(row)


def test_the_key_of_the_logits_is_enough() -> None:
    model, x = build(QUICK[0]), torch.randn(2, 3, *GRID).double()
    explanation = camkit.GradCAM(model)(x, "logits")
    assert explanation.classes is not None
    assert explanation.classes.tolist() == model(x).logits.argmax(1).tolist()
    expected = camkit.GradCAM(model)(x, targets.key("logits", explanation.classes)).maps
    torch.testing.assert_close(explanation.maps, expected, rtol=0, atol=0)


def test_inputs_by_name() -> None:
    """At another size than the model was made for, which it takes only if it is told so."""
    row = QUICK[0]._replace(options=SQUARE)
    found = Found("vit.layers.2.layernorm_before", 32, (5, 6), (1, 0))
    inputs = {"pixel_values": torch.randn(2, 3, 80, 96).double(), "interpolate_pos_encoding": True}
    explanation = explained_right(build(row), inputs, found, *LOGITS)
    assert explanation.heatmaps().shape == (2, 5, 80, 96)
