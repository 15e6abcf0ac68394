"""Parity with timm, if it is installed: the same weights give the same features and logits.

timm needs torchvision, which this project does not use:
`pip install --target peers --no-deps timm torchvision`, in versions that match the installed torch, then
`PYTHONPATH=peers python -m pytest tests/conversion/test_timm.py`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from tests.conftest import TINY, tiny
from tests.conversion.parity import IMAGES, assert_alike, open_folder, outputs, random
from vit_simple import ViTSimpleConfig
from vit_simple.convert_checkpoint import convert
from vit_simple.modeling_vit_simple import resample_kernel, resample_positions

pytest.importorskip("timm")
import timm
from timm.data import create_transform, resolve_data_config
from timm.layers import SwiGLUPacked, resample_abs_pos_embed, resample_patch_embed
from timm.layers.activations import QuickGELU
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
FAMILIES = {  # our switches, and the arguments of timm
    "vit": ({}, {}),
    "deit3": ({"no_embed_class": True, "layerscale_value": 0.1}, {"no_embed_class": True, "init_values": 0.1}),
    "dinov2": ({"layerscale_value": 0.1}, {"init_values": 0.1}),
    "dinov2 giant": (
        {"layerscale_value": 0.1, "mlp": "swiglu", "hidden_act": "silu"},
        {"init_values": 0.1, "mlp_layer": SwiGLUPacked, "mlp_ratio": 3.0, "act_layer": torch.nn.SiLU},
    ),
    "dinov2 with registers": (
        {"layerscale_value": 0.1, "no_embed_class": True, "num_register_tokens": 4},
        {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4},
    ),
    "mae fine-tuned": ({"pooling": "mean", "fc_norm": True}, {"global_pool": "avg", "fc_norm": True}),
    "clip": (
        {"pre_norm": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        {
            "pre_norm": True,
            "act_layer": QuickGELU,
            "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-5),
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_model_with_the_same_weights_gives_the_same_features_and_logits(family):
    switches, arguments = FAMILIES[family]
    ours = tiny(**switches)
    theirs = VisionTransformer(**{**SIZES, "mlp_ratio": 1.5, **arguments}).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output, tokens = ours(images, output_hidden_states=True), theirs.forward_features(images)
        features = super(type(ours), ours).forward(images)
        expected = theirs.forward_head(tokens, pre_logits=True), theirs(images)
    assert_alike((features.last_hidden_state, features.pooler_output, output.logits), (tokens, *expected))


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 12)])
@pytest.mark.parametrize("fields", [{}, {"no_embed_class": True}, {"num_register_tokens": 2}])
def test_positions_are_resampled_as_in_timm(size, fields):
    config = ViTSimpleConfig(**{**TINY, **fields})
    prefix, grid = config.num_prefix_positions, tuple(side // 4 for side in size)
    positions = torch.randn(1, prefix + 16, 32)
    expected = resample_abs_pos_embed(positions, grid, (4, 4), prefix)
    assert torch.allclose(resample_positions(positions, config, grid), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (2, 2)])
def test_patch_embedding_is_resampled_as_in_timm(size):
    kernel = torch.randn(5, 3, 4, 4)
    expected = resample_patch_embed(kernel, size)
    assert torch.allclose(resample_kernel(kernel, size, 3), expected, atol=1e-4)


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
NAMES = {  # models of timm's registry, and how they differ from SMALL
    "vit_base_patch16_224.augreg_in1k": {"num_classes": 5},
    "vit_small_patch16_224.augreg_in21k": {"num_classes": 7, "mlp_ratio": 40 / 32},
    "vit_base_patch16_224.dino": {"num_classes": 0},
    "vit_base_patch16_224.mae": {"num_classes": 5, "global_pool": "avg"},
    "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k": {"num_classes": 5},
    "deit_base_patch16_224.fb_in1k": {"num_classes": 5},
    "deit3_base_patch16_224.fb_in1k": {"num_classes": 5},
    "vit_base_patch14_dinov2.lvd142m": {"num_classes": 0},
    "vit_giant_patch14_dinov2.lvd142m": {"num_classes": 0},
    "vit_base_patch14_reg4_dinov2.lvd142m": {"num_classes": 5},
    "vit_base_patch16_clip_224.laion2b": {"num_classes": 24},
    "vit_base_patch16_clip_quickgelu_224.openai": {"num_classes": 24},
}


@dataclass
class Conversion:
    name: str
    folder: Path  # with peer, ours, and back, which is ours converted to timm
    peer: torch.nn.Module


@pytest.fixture(scope="module", params=NAMES)
def conversion(request, tmp_path_factory) -> Conversion:
    """A checkpoint of timm that was converted to ours and back."""
    name, folder = request.param, tmp_path_factory.mktemp("conversion")
    peer = random(timm.create_model(name, **SMALL, **NAMES[name])).eval()
    save_for_hf(peer, folder / "peer", safe_serialization=True)
    convert(folder / "peer", folder / "ours")
    convert(folder / "ours", folder / "back", to="timm")
    return Conversion(name, folder, peer)


def open_timm(folder, **options) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def test_timm_checkpoint_gives_the_same_outputs_here_and_back(conversion):
    for model in (open_folder(conversion.folder / "ours"), open_timm(conversion.folder / "back")):
        assert_alike(outputs(model, IMAGES[16]), outputs(conversion.peer, IMAGES[16]))


def test_timm_loads_our_weights_without_a_conversion(conversion):
    name, weights = conversion.name, conversion.folder / "ours/model.safetensors"
    model = timm.create_model(name, checkpoint_path=weights, **SMALL, **NAMES[name]).eval()
    assert_alike(outputs(model, IMAGES[16]), outputs(conversion.peer, IMAGES[16]))


def test_timm_checkpoint_gives_the_same_outputs_at_another_size(conversion):
    larger = open_timm(conversion.folder / "peer", img_size=24)
    assert_alike(outputs(open_folder(conversion.folder / "ours"), IMAGES[24]), outputs(larger, IMAGES[24]))


def test_timm_round_trip_keeps_every_tensor_bit_for_bit(conversion):
    before, after = (load_file(conversion.folder / name / "model.safetensors") for name in ("peer", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_timm_preprocessing_is_the_same_here_and_back(conversion):
    image = PIL.Image.effect_noise((40, 30), 60).convert("RGB")
    models = [open_timm(conversion.folder / name) for name in ("peer", "back")]
    peer, back = (create_transform(**resolve_data_config(model=model))(image) for model in models)
    processor = AutoImageProcessor.from_pretrained(conversion.folder / "ours")
    ours = processor(image, return_tensors="pt").pixel_values[0]
    gray_level = 1.01 / 255 / min(models[0].pretrained_cfg["std"])  # the two libraries round differently
    assert torch.equal(back, peer) and torch.allclose(ours, peer, rtol=0, atol=gray_level)
