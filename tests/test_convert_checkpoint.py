"""Checkpoints of transformers' own classes become ours and go back; timm's are in test_timm.py."""

import json
import re
import shutil

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import vit_simple
from conftest import TINY, tiny
from vit_simple.convert_checkpoint import FAMILIES, convert, main
from vit_simple.prepare import stock_processor

SIZES = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
SIZES |= {"patch_size": 4}
PLAIN = SIZES | {"intermediate_size": 48}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
DECODER = {f"decoder_{name}": value for name, value in TEXT.items() if name != "vocab_size"}
PEERS = {  # class, and fields of its config
    "google/vit": ("ViTForImageClassification", PLAIN | {"num_labels": 5, "patch_size": 8}),
    "google/vit in21k": ("ViTModel", PLAIN),
    "without bias": ("ViTForImageClassification", PLAIN | {"num_labels": 5, "qkv_bias": False}),
    "masked images": ("ViTForMaskedImageModeling", PLAIN | {"encoder_stride": 4}),
    "MAE": ("ViTMAEForPreTraining", PLAIN | DECODER | {"mask_ratio": 0.0}),
    "DINOv2": ("Dinov2Model", SIZES),
    "DINOv2 with its head": ("Dinov2ForImageClassification", SIZES | {"num_labels": 5}),
    "DINOv2 giant": ("Dinov2Model", SIZES | {"use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", SIZES),
    "CLIP": ("CLIPVisionModelWithProjection", PLAIN | {"projection_dim": 24, "hidden_act": "quick_gelu"}),
    "CLIP of erf": ("CLIPVisionModel", PLAIN | {"hidden_act": "gelu"}),
    "CLIP with text": (
        "CLIPModel",
        {"vision_config": PLAIN, "text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2}, "projection_dim": 24},
    ),
}
FAMILY = {"google/vit": "google", "google/vit in21k": "google", "without bias": "deit", "masked images": "dino"}


@pytest.fixture
def peer(tmp_path):
    """Saves a random network of a family in the folder `peer`."""

    def save(family: str, **options) -> transformers.PreTrainedModel:
        name, fields = PEERS[family]
        its_class = getattr(transformers, name)
        torch.manual_seed(0)
        model = its_class(its_class.config_class(**{**fields, **options})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "peer")
        return model

    return save


@torch.no_grad()
def outputs(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens behind the last LayerNorm and, where there is a head, its logits; of transformers' classes or ours."""
    kind, resized = model.config.model_type, {"interpolate_pos_encoding": True}
    if kind == "vit_simple":
        output = model(images, output_hidden_states=True, **resized)
        return model.norm(output.hidden_states[-1]), getattr(output, "logits", None)
    if kind.startswith("clip"):
        tower = getattr(model, "vision_model", model)
        features = tower(images, **resized)
        head = getattr(model, "visual_projection", None)
        logits = None if head is None else head(features.pooler_output)
        return tower.post_layernorm(features.last_hidden_state), logits
    if kind == "vit_mae":
        in_order = torch.arange(images[0, 0].numel() // 16.0).expand(len(images), -1)
        return model.base_model(images, noise=in_order, **resized).last_hidden_state, None
    if kind.startswith("dinov2"):
        resized = {}  # they always do
    logits = model(images, **resized).logits if hasattr(model, "classifier") else None
    return model.base_model(images, **resized).last_hidden_state, logits


def assert_alike(model, other, size: int = 16):
    """Tokens and, where both have a head, logits are equal to 1e-5 of the largest."""
    for ours, theirs in zip(outputs(model, IMAGES[size]), outputs(other, IMAGES[size])):
        if theirs is not None and ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


IMAGES = {size: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)) for size in (16, 24)}


@pytest.mark.parametrize("family", PEERS)
def test_a_checkpoint_of_transformers_gives_its_outputs_and_goes_back(peer, tmp_path, family):
    theirs = peer(family)
    told = convert(tmp_path / "peer", tmp_path / "ours", family=FAMILY.get(family))
    ours = open_folder(tmp_path / "ours")
    assert_alike(ours, theirs)
    if family == "DINOv2 with registers":
        assert_alike(ours, theirs, size=24)  # the others resample without antialiasing, which timm and we do not
    dropped = any("dropped a head" in line for line in told)
    assert dropped == (family == "DINOv2 with its head")
    assert hasattr(ours, "head") == (outputs(theirs, IMAGES[16])[1] is not None and not dropped)

    convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    assert_alike(open_folder(tmp_path / "back"), theirs)
    before, after = (
        {re.sub(r"^(vit|dinov2\w*|vision_model)\.", "", name): tensor for name, tensor in load_file(file).items()}
        for file in (tmp_path / "peer/model.safetensors", tmp_path / "back/model.safetensors")
    )
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    expected = {"embeddings.mask_token"} if "DINOv2" in family else set()  # zero there
    if family == "DINOv2 with registers":
        expected |= {"embeddings.cls_token", "embeddings.position_embeddings"}  # the class token has its position in it
    assert changed == expected
    for name in set(before) - set(after):
        assert any(name.split(".")[0] in line for line in told), name

    ours.from_pretrained(tmp_path / "ours", image_size=24).save_pretrained(tmp_path / "larger")
    shutil.copy(tmp_path / "ours/preprocessor_config.json", tmp_path / "larger")
    convert(tmp_path / "larger", tmp_path / "larger there", to="transformers")
    assert_alike(ours, open_folder(tmp_path / "larger there"), size=24)


def open_folder(folder):
    """The network of the class that the config names, which finds all of its tensors there."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name, None) or getattr(vit_simple, name), {}
    model, info = model.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"]) and not info["unexpected_keys"], info
    return model.eval()
