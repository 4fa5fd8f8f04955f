"""Models of timm, at least one of each family, with nothing configured."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

import camkit
from helpers.families import randomize, without_initialisation
from helpers.zoo import Found, explained_right

SMALL = (64, 96)  # not square, so that rows are not taken for columns


class Row(NamedTuple):
    """A model, the layer that should be found on it, its input size and the options to make it."""

    name: str
    found: Found
    size: tuple[int, int] = SMALL
    options: Mapping[str, Any] = MappingProxyType({})


def convolutional(name: str, layer: str, channels: int, size: tuple[int, int] = SMALL) -> Row:
    return Row(name, Found(layer, channels, (2, 3)), size)


def vit(name: str, layer: str, reads: tuple[int, int], patch: int = 16, **options: Any) -> Row:
    """Three small blocks on 3 x 4 patches."""
    size = (3 * patch, 4 * patch)
    return Row(name, Found(layer, 48, (3, 4), reads), size, {"img_size": size, **SHALLOW, **options})


SHALLOW = {"depth": 3, "embed_dim": 48, "num_heads": 4}

QUICK = [
    convolutional("test_resnet", "layer4", 96),
    convolutional("convnext_atto", "stages", 320),
    convolutional("efficientvit_b0", "head.in_conv", 1024),
    convolutional("mambaout_femto", "stages", 288)._replace(found=Found("stages", 288, (2, 3), "NHWC")),
    vit("vit_tiny_patch16_224", "blocks.2.norm1", (1, 0)),
    vit("vit_medium_patch16_reg4_gap_256", "blocks", (4, 0)),
    vit("deit_tiny_distilled_patch16_224", "blocks.2.norm1", (2, 0)),
]

CONVOLUTIONAL = [
    convolutional("resnet10t", "layer4", 512),
    convolutional("resnetv2_18", "norm", 512),
    convolutional("skresnet18", "layer4", 512),
    convolutional("resnest14d", "layer4", 2048),
    convolutional("ecaresnet26t", "layer4", 2048),
    convolutional("legacy_seresnet18", "layer4", 512),
    convolutional("res2net50_14w_8s", "layer4", 2048),
    convolutional("densenet121", "features", 1024),
    convolutional("dla46_c", "level5", 256),
    convolutional("dpn48b", "features", 832),
    convolutional("efficientnet_b0", "bn2", 1280),
    convolutional("efficientnetv2_rw_t", "bn2", 1024),
    convolutional("mobilenetv1_100", "blocks", 1024),
    convolutional("mobilenetv2_050", "bn2", 1280),
    convolutional("mobilenetv3_small_050", "blocks", 288),
    convolutional("mobilenetv4_conv_small", "blocks", 960),
    convolutional("mobilenetv4_hybrid_medium", "blocks", 960),
    convolutional("lcnet_050", "blocks", 256),
    convolutional("hardcorenas_a", "blocks", 960),
    convolutional("mnasnet_small", "bn2", 1280),
    convolutional("fbnetc_100", "bn2", 1984),
    convolutional("tinynet_e", "bn2", 1280),
    convolutional("convnextv2_atto", "stages", 320),
    convolutional("inception_next_atto", "stages", 320),
    convolutional("inception_v4", "features", 1536, (107, 139)),
    convolutional("xception41", "blocks", 2048),
    convolutional("legacy_xception", "act4", 2048),
    convolutional("nfnet_l0", "final_act", 2304),
    convolutional("regnetx_002", "s4", 368),
    convolutional("rexnet_100", "features", 1280),
    convolutional("hrnet_w18_small", "final_layer", 2048),
    convolutional("ghostnet_050", "blocks", 480),
    convolutional("ghostnetv2_100", "blocks", 960),
    convolutional("repghostnet_050", "blocks", 480),
    convolutional("repvgg_a0", "stages", 1280),
    convolutional("mobileone_s0", "stages", 1024),
    convolutional("tresnet_m", "body", 2048),
    convolutional("ese_vovnet19b_dw", "stages", 1024),
    convolutional("starnet_s1", "norm", 192),
    convolutional("rdnet_tiny", "dense_stages", 1040),
    convolutional("hgnet_tiny", "stages", 768),
    convolutional("hgnetv2_b0", "stages", 1024),
    convolutional("gernet_s", "final_conv", 1920),
    convolutional("cs3darknet_focus_s", "stages", 512),
    convolutional("darknet17", "stages", 1024),
    convolutional("cspresnet50", "stages", 1024),
    convolutional("fasternet_t0", "stages", 320),
    convolutional("lambda_resnet26t", "stages", 2048),
    convolutional("repvit_m0_9", "stages", 384),
    Row("convmixer_768_32", Found("blocks", 768, (9, 13))),
    # Seven by seven positions that a convolution makes one of.
    Row("vgg11", Found("features", 512, (7, 7)), (224, 224), {"mlp_ratio": 0.02}),
    # A stride of 64.
    Row("selecsls42b", Found("head", 1024, (4, 4)), (224, 224)),
    Row("shvit_s1", Found("stages", 320, (4, 4)), (224, 224)),
    convolutional("csatv2", "stages", 386, (128, 192)),
]

HYBRID = [
    convolutional("poolformer_s12", "stages", 512),
    convolutional("caformer_s18", "stages", 512),
    convolutional("convformer_s18", "stages", 512),
    convolutional("focalnet_tiny_srf", "norm", 768),
    convolutional("davit_tiny", "stages", 768),
    convolutional("pvt_v2_b0", "stages", 256),
    convolutional("swiftformer_xs", "norm", 220),
    convolutional("nextvit_small", "norm", 1024),
    convolutional("edgenext_xx_small", "stages", 168),
    convolutional("mobilevit_xxs", "final_conv", 320),
    # It works on a multiple of its patches, 2 x 4.
    Row("mobilevitv2_050", Found("stages", 256, (2, 4))),
    convolutional("fastvit_t8", "final_conv", 768),
    Row("visformer_tiny", Found("norm", 384, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("maxvit_tiny_tf_224", Found("stages", 512, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("maxvit_rmlp_pico_rw_256", Found("norm", 256, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("coatnet_pico_rw_224", Found("norm", 512, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("gcvit_xxtiny", Found("stages", 512, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("efficientformerv2_s0", Found("norm", 176, (2, 3)), SMALL, {"img_size": SMALL}),
    Row("efficientformer_l1", Found("norm", 448, (7, 7), (0, 0)), (224, 224)),
    Row("efficientvit_m0", Found("stages", 192, (2, 3)), (128, 192), {"img_size": (128, 192)}),
    Row("levit_128s", Found("stages", 384, (2, 3), (0, 0)), (128, 192), {"img_size": (128, 192)}),
    Row("levit_conv_128s", Found("stages", 384, (2, 3)), (128, 192), {"img_size": (128, 192)}),
    Row("tiny_vit_5m_224", Found("stages", 320, (7, 7)), (224, 224)),
    Row("botnet26t_256", Found("stages", 2048, (8, 8)), (256, 256)),
    Row("bat_resnext26ts", Found("stages", 2048, (8, 8)), (256, 256)),
    Row("halonet26t", Found("stages", 2048, (8, 8)), (256, 256)),
    # Pooled by attention.
    convolutional("resnet50_clip", "stages", 2048),
]

TRANSFORMERS = [
    vit("vit_base_patch32_clip_224", "blocks.2.norm1", (1, 0), 32),
    vit("vit_base_patch16_gap_224", "norm", (0, 0)),
    vit("vit_relpos_small_patch16_224", "norm", (0, 0)),
    vit("vit_small_patch14_reg4_dinov2", "blocks.2.norm1", (5, 0), 14),
    vit("vit_small_patch16_dinov3", "norm", (5, 0)),
    vit("vit_tiny_r_s16_p8_224", "blocks.2.norm1", (1, 0), 32),
    vit("vit_base_patch16_siglip_224", "norm", (0, 0)),
    vit("vit_pe_core_tiny_patch16_384", "norm", (1, 0)),
    vit("deit3_small_patch16_224", "blocks.2.norm1", (1, 0)),
    vit("eva02_tiny_patch14_224", "norm", (1, 0), 14),
    vit("beit_base_patch16_224", "norm", (1, 0)),
    vit("beitv2_base_patch16_224", "norm", (1, 0)),
    vit("samvit_base_patch16_224", "neck", (0, 0))._replace(found=Found("neck", 48, (3, 4))),
    vit("cait_xxs24_224", "blocks_token_only.1.norm1", (1, 0)),
    Row(
        "convit_tiny",
        Found("blocks.2.norm1", 48, (4, 4), (1, 0)),
        (64, 64),
        {"img_size": 64, "local_up_to_layer": 2, **SHALLOW, "embed_dim": 12},
    ),
    Row("vitamin_small_224", Found("blocks", 384, (4, 6), (0, 0)), SMALL, {"img_size": SMALL, "depth": 3}),
    Row(
        "swin_tiny_patch4_window7_224",
        Found("norm", 768, (2, 3), "NHWC"),
        SMALL,
        {"img_size": SMALL, "depths": (1, 1, 1, 1), "window_size": 4},
    ),
    Row(
        "swinv2_tiny_window8_256",
        Found("norm", 768, (2, 3), "NHWC"),
        SMALL,
        {"img_size": SMALL, "depths": (1, 1, 1, 1), "window_size": 4},
    ),
    Row(
        "swinv2_cr_tiny_ns_224",
        Found("stages", 768, (2, 3)),
        SMALL,
        {"img_size": SMALL, "depths": (1, 1, 1, 1), "window_size": 2},
    ),
    Row("nest_tiny", Found("norm", 384, (4, 4), "NHWC"), (64, 64), {"img_size": 64}),
    Row("xcit_nano_12_p16_224", Found("cls_attn_blocks.1.norm1", 128, (4, 6), (1, 0))),
    Row(
        "pit_ti_224",
        Found("transformers.2.blocks.3.norm1", 256, (3, 4), (1, 0)),
        (80, 112),
        {"img_size": (80, 112)},
    ),
    Row(
        "pit_ti_distilled_224",
        Found("transformers.2.blocks.3.norm1", 256, (3, 4), (2, 0)),
        (80, 112),
        {"img_size": (80, 112)},
    ),
    Row("coat_tiny", Found("parallel_blocks.5.norm14", 152, (2, 3), (1, 0)), SMALL, {"img_size": SMALL}),
    Row("coat_lite_tiny", Found("serial_blocks4.1.norm1", 320, (2, 3), (1, 0)), SMALL, {"img_size": SMALL}),
    Row("twins_pcpvt_small", Found("norm", 512, (2, 3), (0, 0))),
    Row("twins_svt_small", Found("norm", 512, (2, 3), (0, 0))),
    Row("mvitv2_tiny", Found("norm", 768, (2, 3), (0, 0))),
    Row("sequencer2d_s", Found("norm", 384, (4, 6), "NHWC")),
    Row("mixer_s32_224", Found("norm", 512, (3, 4), (0, 0)), (96, 128), {"img_size": (96, 128)}),
    Row("resmlp_12_224", Found("norm", 384, (3, 4), (0, 0)), (48, 64), {"img_size": (48, 64)}),
    Row("gmlp_ti16_224", Found("norm", 128, (3, 4), (0, 0)), (48, 64), {"img_size": (48, 64)}),
]


def build(row: Row) -> nn.Module:
    with without_initialisation():
        model = timm.create_model(row.name, num_classes=5, **row.options)
    return randomize(model).double()


def check(row: Row) -> None:
    explained_right(build(row), torch.randn(2, 3, *row.size).double(), row.found)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_of_timm(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [*CONVOLUTIONAL, *HYBRID, *TRANSFORMERS], ids=lambda row: row.name)
def test_all_of_timm(row: Row) -> None:
    check(row)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "hiera_tiny_224",
            {"img_size": SMALL},
        ),  # tokens in the order of windows, pooled since they were a picture
        (
            "naflexvit_base_patch16_gap",
            {"depth": 1, "embed_dim": 48, "num_heads": 4},
        ),  # patches cut by a reshape
    ],
)
def test_what_cannot_be_told_is_an_error(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    size = SMALL if "hiera" in name else (48, 64)
    with pytest.raises(ValueError, match="^(model|layer): expected a "):
        camkit.GradCAM(model)(torch.randn(1, 3, *size))
