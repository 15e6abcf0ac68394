"""Parity with timm, where it is installed: the same weights give the same features and logits.

timm needs torchvision, which this project does not:
`pip install --target peers --no-deps timm torchvision`, of versions that fit the torch that is installed, then
`PYTHONPATH=peers python -m pytest tests/test_timm.py`.
"""

import functools

import pytest
import torch

from conftest import TINY, tiny
from vit_simple import ViTSimpleConfig
from vit_simple.modeling_vit_simple import resample_kernel, resample_positions

pytest.importorskip("timm")
from timm.layers import SwiGLUPacked, resample_abs_pos_embed, resample_patch_embed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
FAMILIES = {  # our switches, and timm's
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
def test_the_same_weights_give_timms_features_and_logits(family):
    switches, others = FAMILIES[family]
    ours = tiny(**switches)
    theirs = VisionTransformer(**{**SIZES, "mlp_ratio": 1.5, **others}).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output, tokens = ours(images, output_hidden_states=True), theirs.forward_features(images)
        features = super(type(ours), ours).forward(images)
        expected = theirs.forward_head(tokens, pre_logits=True), theirs(images)
    for one, other in zip((features.last_hidden_state, features.pooler_output, output.logits), (tokens, *expected)):
        assert torch.allclose(one, other, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 12)])
@pytest.mark.parametrize("fields", [{}, {"no_embed_class": True}, {"num_register_tokens": 2}])
def test_positions_are_resampled_as_timm_does(size, fields):
    config = ViTSimpleConfig(**{**TINY, **fields})
    prefix, grid = config.num_prefix_positions, tuple(side // 4 for side in size)
    positions = torch.randn(1, prefix + 16, 32)
    expected = resample_abs_pos_embed(positions, grid, (4, 4), prefix)
    assert torch.allclose(resample_positions(positions, (4, 4), grid), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (2, 2)])
def test_kernels_are_resampled_as_timm_does(size):
    kernel = torch.randn(5, 3, 4, 4)
    expected = resample_patch_embed(kernel, size)
    assert torch.allclose(resample_kernel(kernel, size, 3), expected, atol=1e-4)
