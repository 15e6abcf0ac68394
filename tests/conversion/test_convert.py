"""Checkpoints of transformers are converted to ours and back; those of timm are in test_timm.py."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from tests.conftest import TINY, tiny
from tests.conversion.parity import IMAGES, assert_alike, open_folder, outputs, random
from tests.fake_hub.hub import Hub
from vit_simple import ViTSimpleConfig
from vit_simple.configuration_vit_simple import label_maps, pair
from vit_simple.conversion.convert import find_weights, open_checkpoint
from vit_simple.conversion.processors import SQUASHED, fit_processor, processor_from_timm, processor_to_timm
from vit_simple.conversion.state_dict import DROPPED
from vit_simple.convert_checkpoint import convert, main
from vit_simple.data.processors import stock_processor
from vit_simple.files import UserError

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


def save_peer(family: str, folder: Path, **options) -> transformers.PreTrainedModel:
    """Saves a random model of a family."""
    name, fields = PEERS[family]
    model_class = getattr(transformers, name)
    model = random(model_class(model_class.config_class(**{**fields, **options})))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def peer(tmp_path):
    """Saves a random model of a family in the folder `peer`."""
    return lambda family, **options: save_peer(family, tmp_path / "peer", **options)


@dataclass
class Conversion:
    family: str
    folder: Path  # with peer, ours, and back, which is ours converted to transformers
    peer: transformers.PreTrainedModel
    ours: torch.nn.Module
    report: list[str]

    @property
    def drops_head(self) -> bool:
        return any("dropped a head" in line for line in self.report)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a folder of transformers, without the prefix that only some of its classes have."""
        tensors = load_file(self.folder / name / "model.safetensors")
        return {re.sub(r"^(vit|dinov2\w*|vision_model)\.", "", key): tensor for key, tensor in tensors.items()}


@pytest.fixture(scope="module", params=PEERS)
def conversion(request, tmp_path_factory) -> Conversion:
    """A checkpoint of transformers that was converted to ours and back."""
    family, folder = request.param, tmp_path_factory.mktemp("conversion")
    peer = save_peer(family, folder / "peer")
    report = convert(folder / "peer", folder / "ours", family=FAMILY.get(family))
    convert(folder / "ours", folder / "back", to="transformers")
    return Conversion(family, folder, peer, open_folder(folder / "ours"), report)


def test_transformers_checkpoint_gives_the_same_outputs(conversion):
    assert_alike(outputs(conversion.ours, IMAGES[16]), outputs(conversion.peer, IMAGES[16]))


def test_transformers_head_is_converted_unless_it_is_reported_as_dropped(conversion):
    assert conversion.drops_head == (conversion.family == "DINOv2 with its head")
    has_head = outputs(conversion.peer, IMAGES[16])[1] is not None
    assert hasattr(conversion.ours, "head") == (has_head and not conversion.drops_head)


# The other families resample positions without antialiasing, unlike timm and ViTSimple.
@pytest.mark.parametrize("conversion", ["DINOv2 with registers"], indirect=True)
def test_transformers_registers_give_the_same_outputs_at_another_size(conversion):
    assert_alike(outputs(conversion.ours, IMAGES[24]), outputs(conversion.peer, IMAGES[24]))


def test_transformers_round_trip_gives_the_same_outputs(conversion):
    back = open_folder(conversion.folder / "back")
    assert_alike(outputs(back, IMAGES[16]), outputs(conversion.peer, IMAGES[16]))


def test_transformers_round_trip_keeps_every_tensor_bit_for_bit(conversion):
    before, after = conversion.tensors("peer"), conversion.tensors("back")
    changed = {key for key, tensor in after.items() if key not in before or not torch.equal(tensor, before[key])}
    expected = {"embeddings.mask_token"} if "DINOv2" in conversion.family else set()  # zero in back
    if conversion.family == "DINOv2 with registers":
        expected |= {"embeddings.cls_token", "embeddings.position_embeddings"}  # the token includes its position
    assert changed == expected


def test_conversion_report_lists_every_dropped_tensor(conversion):
    before, after = conversion.tensors("peer"), conversion.tensors("back")
    for key in before.keys() - after.keys():
        assert key.startswith("classifier.") or re.match("|".join(DROPPED), key), key
    for pattern, description in DROPPED.items():
        is_dropped = any(re.match(pattern, key) for key in before)
        assert is_dropped == any(line.startswith(f"dropped {description}") for line in conversion.report), description


def test_resized_checkpoint_is_converted_to_transformers(conversion, tmp_path):
    ours = conversion.ours
    ours.from_pretrained(conversion.folder / "ours", image_size=24).save_pretrained(tmp_path / "larger")
    shutil.copy(conversion.folder / "ours/preprocessor_config.json", tmp_path / "larger")
    convert(tmp_path / "larger", tmp_path / "exported", to="transformers")
    assert_alike(outputs(open_folder(tmp_path / "exported"), IMAGES[24]), outputs(ours, IMAGES[24]))


def refusal(tmp_path, *arguments, **options) -> str:
    """The error of a conversion that is refused and leaves no file behind."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(*arguments, tmp_path / "new/out", **options)
    assert set(tmp_path.rglob("*")) == before
    return str(error.value)


def rewrite(folder, change):
    """Changes the tensors of a saved folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda tensors: tensors.pop("vit.encoder.layer.1.output.dense.bias"),
            "encoder.layer.1.output.dense.bias is missing",
        ),
        (lambda tensors: tensors.update(odd=torch.ones(2)), "odd is unknown"),
        (
            lambda tensors: tensors.update({"vit.layernorm.bias": torch.ones(5)}),
            r"layernorm.bias has the shape \(5,\) instead of \(32,\)",
        ),
        (
            lambda tensors: tensors.pop("vit.encoder.layer.2.attention.attention.key.weight"),
            "encoder.layer.2.attention.attention.key.weight is missing",
        ),
    ],
)
def test_transformers_tensors_that_contradict_the_config_are_named(peer, tmp_path, change, reason):
    peer("google/vit")
    rewrite(tmp_path / "peer", change)
    assert re.search(reason, refusal(tmp_path, tmp_path / "peer", family="google"))


@pytest.mark.parametrize("family", ["google/vit", "DINOv2", "CLIP"])
def test_transformers_weights_without_their_config_are_refused_with_where_it_must_lie(peer, tmp_path, family):
    torch.save(peer(family).state_dict(), tmp_path / "a.bin")
    assert refusal(tmp_path, tmp_path / "a.bin").startswith("config.json is required for weights of transformers: put")


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"num_hidden_layers": 2}, "encoder.layer.2.attention.attention.query.weight is unknown"),
        ({"image_size": 32}, r"position_embeddings has the shape \(1, 5, 32\) instead of \(1, 17, 32\)"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of num_attention_heads=5, got 32"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "convnext"}, r"expected a plain ViT \(vit, .*\), got convnext"),
        ({"model_type": "nonsense"}, "nonsense"),
    ],
)
def test_transformers_config_that_contradicts_the_tensors_is_refused(peer, tmp_path, fields, reason):
    peer("google/vit")
    file = tmp_path / "peer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert re.search(reason, refusal(tmp_path, tmp_path / "peer", family="google"))


@pytest.mark.parametrize(
    "kind, fields, reason",
    [
        ("DeiTForImageClassification", PLAIN, "DeiT distilled"),
        ("SiglipVisionModel", PLAIN, "SigLIP"),
        ("BeitModel", PLAIN, "BEiT"),
        ("SwinModel", {"image_size": 32, "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 4}, "Swin"),
    ],
)
def test_transformers_model_of_another_family_is_refused_by_name(tmp_path, kind, fields, reason):
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**fields)).save_pretrained(tmp_path / "peer")
    assert f": {reason}" in refusal(tmp_path, tmp_path / "peer", family="google")


def test_weight_files_that_are_damaged_or_hold_more_than_tensors_are_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(tiny().state_dict(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    torch.save({"model": tiny().state_dict(), "args": random}, tmp_path / "code.pth")
    torch.save({"model": tiny().state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "text.bin").write_text("not a checkpoint")
    (tmp_path / "twice").mkdir()
    for number in (1, 2):
        shutil.copy(whole, tmp_path / f"twice/model-0000{number}-of-00002.safetensors")
    assert "a second time" in refusal(tmp_path, tmp_path / "twice", family="augreg")
    for name in ("cut.safetensors", "code.pth", "list.pth", "text.bin"):
        assert name in refusal(tmp_path, tmp_path / name, family="augreg")
    convert(tmp_path / "wrapped.pth", tmp_path / "out", family="augreg", num_attention_heads=4)
    assert open_folder(tmp_path / "out").config.num_labels == 5


def test_convert_requires_options_if_there_is_no_config(tmp_path):
    save_file(tiny(hidden_size=128).state_dict(), tmp_path / "plain.safetensors")  # as wide as the notebook's ViT
    save_file(tiny(pre_norm=True).state_dict(), tmp_path / "clip.safetensors")
    heads = {"num_attention_heads": 4}
    said = refusal(tmp_path, tmp_path / "plain.safetensors", family="deit")
    assert said == "--num_attention_heads is required: no config states it and width 128 is not a known one"
    assert "--family" in refusal(tmp_path, tmp_path / "plain.safetensors", **heads)
    assert "--hidden_act" in refusal(tmp_path, tmp_path / "clip.safetensors", **heads)
    report = convert(
        tmp_path / "clip.safetensors", tmp_path / "out", hidden_act="quick_gelu", base_model="a/b", **heads
    )
    model = open_folder(tmp_path / "out")
    assert (model.config.hidden_act, model.config.layer_norm_eps) == ("quick_gelu", 1e-5)
    card = ModelCard.load(tmp_path / "out/README.md").data
    assert card.base_model == "a/b" and report[-1].startswith("unknown license")


@pytest.mark.parametrize(
    "to, fields, reason",
    [
        ("transformers", {"use_class_token": False, "pooling": "mean"}, "use_class_token=False, pooling='mean'"),
        ("transformers", {"fc_norm": True, "pooling": "mean"}, "fc_norm=True"),
        ("transformers", {"num_register_tokens": 2}, "num_register_tokens=2"),
        ("transformers", {"layerscale_value": 0.1}, "intermediate_size=48"),
        (
            "transformers",
            {"layerscale_value": 0.1, "intermediate_size": 64, "image_size": (16, 36)},
            "image_size=[16, 36]",
        ),
        ("transformers", {"pre_norm": True, "qkv_bias": False}, "qkv_bias=False"),
        ("transformers", {"pre_norm": True}, "head.bias"),
        ("timm", {"layer_norm_eps": 1e-3}, "layer_norm_eps"),
        ("timm", {"hidden_act": "gelu_10"}, "hidden_act"),
    ],
)
def test_export_refuses_a_model_that_the_library_does_not_support(tmp_path, to, fields, reason):
    tiny(**fields).save_pretrained(tmp_path / "ours")
    assert reason in refusal(tmp_path, tmp_path / "ours", to=to, family="augreg")


def test_dinov2_head_survives_the_round_trip_to_transformers(tmp_path):
    for pooling in ("cls", "mean"):
        folder = tmp_path / pooling
        model = tiny(layerscale_value=0.1, intermediate_size=64, pooling=pooling)
        model.save_pretrained(folder / "ours")
        convert(folder / "ours", folder / "exported", to="transformers", family="dinov2")
        convert(folder / "exported", folder / "back")
        assert_alike(outputs(open_folder(folder / "exported"), IMAGES[16]), outputs(model, IMAGES[16]))
        back = load_file(folder / "back/model.safetensors")
        assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
        assert open_folder(folder / "back").config.pooling == pooling


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"no_embed_class": True, "layerscale_value": 1e-5},
        {"layerscale_value": 1e-5, "mlp": "swiglu", "hidden_act": "silu"},
        {"no_embed_class": True, "layerscale_value": 1e-5, "num_register_tokens": 4, "qkv_bias": False},
        {"pooling": "mean", "fc_norm": True, "image_size": (16, 24), "patch_size": (4, 8)},
        {"pre_norm": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 1},
        {"use_class_token": False, "pooling": "mean", "position_embedding": "sincos2d"},
    ],
)
def test_timm_round_trip_keeps_tensors_config_and_outputs(tmp_path, fields):
    names = ["ant", "bee", "cat", "dog", "eel"]
    model = tiny(**fields, **label_maps(names))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "timm", to="timm", family="google")
    convert(tmp_path / "timm", tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "back"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    back = open_folder(tmp_path / "back")
    images = torch.randn(2, model.config.num_channels, *pair(back.config.image_size))
    assert_alike(outputs(back, images), outputs(model, images))
    were, are = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "back"))
    table = {"position_embedding"} if "position_embedding" in fields else set()
    assert {name for name in were if were[name] != are[name]} == table


def test_original_deit3_file_is_converted_without_a_config(tmp_path):
    model = tiny(no_embed_class=True, layerscale_value=1e-5, hidden_size=192, num_attention_heads=3)
    names = {name: re.sub(r"ls(\d)\.gamma", r"gamma_\1", name) for name in model.state_dict()}
    torch.save({"model": {names[name]: tensor for name, tensor in model.state_dict().items()}}, tmp_path / "deit3.pth")
    report = convert(tmp_path / "deit3.pth", tmp_path / "out", family="deit3")
    assert report[1:4] == [
        "assumed images of (16, 16) pixels, since 16 positions fit 4 x 4 patches, and pooling 'cls', because there is "
        "no config.json; docs/conversion.md shows one for another size",
        "positions are resampled for other image sizes as in facebookresearch/deit: interpolate_antialias=False, "
        "interpolate_offset=0.0",
        "assumed 3 attention heads, as in published ViTs of width 192",
    ]
    assert_alike(outputs(open_folder(tmp_path / "out"), IMAGES[16]), outputs(model, IMAGES[16]))


def test_image_processor_is_fitted_to_the_size_and_channels_of_the_model(tmp_path):
    """Images that are not square are squashed, other channels scaled by averages, and processor_config.json is read."""
    stored = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "resample": 3}
    stored |= {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    tiny(image_size=(16, 32), num_channels=1).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/processor_config.json").write_text(json.dumps({"image_processor": stored}))
    report = convert(tmp_path / "ours", tmp_path / "out")
    assert report[:3] == [
        "changed the image processor from (16, 16) to (16, 32) pixels, the model's input size",
        SQUASHED,
        "averaged the mean and std of 3 channels, because the model has 1",
    ]
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (written["size"], written["do_center_crop"]) == ({"height": 16, "width": 32}, False)
    assert written["image_mean"] == pytest.approx([0.2]) and written["image_std"] == pytest.approx([0.6])
    (tmp_path / "ours/processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "ViltImageProcessor"}}'
    )
    assert "expected ViTImageProcessor or" in refusal(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("mode, part", [("squash", 1.0), ("squash", 0.8), ("center", 0.9)])
def test_timm_preprocessing_survives_the_round_trip(mode, part):
    cfg = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": part, "crop_mode": mode}
    config, report = ViTSimpleConfig(**TINY), []
    back = processor_to_timm(fit_processor(processor_from_timm(cfg, (16, 16), report), config, report), config)
    assert cfg.items() <= back.items() and not report
    processor_from_timm(cfg, (16, 32), report)
    assert report == ([SQUASHED] if mode == "center" else [])


@pytest.mark.parametrize("crop, resized", [(224, 256), (224, 400), (224, 450), (28, 50), (384, 900)])
def test_crop_fraction_makes_timm_resize_to_the_same_side(crop, resized):
    config = ViTSimpleConfig(**TINY | {"image_size": crop})
    fraction = processor_to_timm(stock_processor((crop, crop), resized), config)["crop_pct"]
    assert math.floor(crop / fraction) == resized  # as in timm.data.transforms_factory


def test_weight_file_with_its_own_name_ignores_the_files_beside_it(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    report = convert(tmp_path / "other.safetensors", tmp_path / "out", family="deit", num_attention_heads=4)
    assert report[-2:] == [
        f"unknown {title}: add it to the model card, README.md" for title in ("license", "base model")
    ]
    assert "--family" in refusal(tmp_path, tmp_path / "other.safetensors", num_attention_heads=4)
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    assert "config.json that states both" in refusal(tmp_path, tmp_path / "model.safetensors", hidden_act="relu")


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"architecture": "vit_base_patch16_rope_ape_224"}, "rotary position embeddings"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "LayerNorm after each branch"),
        ({"architecture": "vit_base_patch16_siglip_gap_224"}, "SigLIP"),
        ({"architecture": "resnet50"}, "whose timm name begins with vit_"),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"qk_norm": True}},
            "model_args of a plain ViT, got qk_norm",
        ),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"act_layer": "mish"}},
            "act_layer: expected one of gelu",
        ),
        (
            {"architecture": "vit_base_patch16_224", "num_classes": 7},
            "num_classes: expected 5, the rows of head.weight, got 7",
        ),
        ({"architecture": "vit_base_patch16_224", "global_pool": "map"}, "global_pool: expected token"),
        ({"architecture": "vit_base_patch16_224", "label_names": ["a"]}, "label_names: expected a list of 5 names"),
        (
            {"architecture": "vit_base_patch16_224", "label_names": {"0": "a", "5": "b", "x": "c"}},
            "label_names: expected names for the classes 0 to 4, got 5, x",
        ),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"img_size": 32}},
            "has the shape (1, 17, 32) instead of",
        ),
        (
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"notes": ["natively QuickGELU"]}},
            "--hidden_act is required: config.json says",
        ),
        ([], "config.json: expected a JSON object, got list"),
    ],
)
def test_timm_config_that_is_unsupported_or_contradicts_the_tensors_is_refused(tmp_path, content, reason):
    (tmp_path / "peer").mkdir()
    save_file(tiny().state_dict(), tmp_path / "peer/model.safetensors")
    if isinstance(content, dict):
        content["model_args"] = {"num_heads": 4, **content.get("model_args", {})}
    (tmp_path / "peer/config.json").write_text(json.dumps(content))
    assert reason in refusal(tmp_path, tmp_path / "peer", family="deit")


def test_timm_class_names_may_be_numbered_and_have_gaps(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    content = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 4, "img_size": 16}}
    content["label_names"] = {"3": "dog", "0": "cat"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    convert(tmp_path, tmp_path / "out", family="deit")
    names = open_folder(tmp_path / "out").config.id2label
    assert names == {0: "cat", 1: "LABEL_1", 2: "LABEL_2", 3: "dog", 4: "LABEL_4"}


@pytest.fixture
def shards(peer, tmp_path):
    """A checkpoint in bfloat16 and in shards, with a card and an old image processor."""
    peer("google/vit").bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards/README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: a/b\n---\n# A title\n")
    content = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "shards/preprocessor_config.json").write_text(json.dumps(content))
    return tmp_path / "shards"


def test_shards_in_half_precision_keep_their_dtype_license_and_base_model(shards, tmp_path):
    convert(shards, tmp_path / "out")
    model, card = open_folder(tmp_path / "out"), ModelCard.load(tmp_path / "out/README.md")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert (card.data.license, card.data.base_model) == ("cc-by-nc-4.0", "a/b")


def test_old_image_processor_is_converted_with_its_size(shards, tmp_path):
    report = convert(shards, tmp_path / "out")
    assert report == [
        "images have (32, 32) pixels, as the image processor makes them; positions stay stored for (16, 16) pixels and "
        "are resampled when the model runs"
    ]
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3] and written["do_convert_rgb"] is True
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(PIL.Image.new("L", (30, 40)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert open_folder(tmp_path / "out").config.image_size == 32


OLD = {"do_resize": True, "size": 16, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.4] * 3}


@pytest.mark.parametrize("family", ["google/vit", "MAE", "DINOv2", "CLIP with text"])
@pytest.mark.parametrize(
    "fields", [{}, {"size": 24, "crop_size": 16}, {"feature_extractor_type": "ViTFeatureExtractor"}], ids=str
)
def test_old_image_processor_gives_the_pixels_that_transformers_gives(peer, tmp_path, family, fields):
    """google/vit-base-patch16-224 names no class: transformers takes the one for the model_type in config.json."""
    peer(family)
    (tmp_path / "peer/preprocessor_config.json").write_text(json.dumps(OLD | fields))
    convert(tmp_path / "peer", tmp_path / "out")
    image = PIL.Image.effect_noise((40, 30), 60).convert("RGB")
    theirs, ours = (
        AutoImageProcessor.from_pretrained(tmp_path / name)(image, return_tensors="pt").pixel_values
        for name in ("peer", "out")
    )
    assert torch.equal(ours, theirs)


def test_old_image_processor_of_the_base_model_is_opened_by_its_config(peer, tmp_path):
    peer("google/vit")
    shutil.copytree(tmp_path / "peer", tmp_path / "base")
    (tmp_path / "base/preprocessor_config.json").write_text(json.dumps(OLD))
    convert(tmp_path / "peer", tmp_path / "out", base_model=str(tmp_path / "base"))
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (written["image_processor_type"], written["size"]) == ("ViTImageProcessor", {"height": 16, "width": 16})


def test_image_processor_with_the_old_name_of_its_class_is_read(peer, tmp_path):
    peer("google/vit")
    (tmp_path / "peer/preprocessor_config.json").write_text(
        json.dumps(OLD | {"image_processor_type": "ViTFeatureExtractor"})
    )
    convert(tmp_path / "peer", tmp_path / "out")
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "ViTImageProcessor" and written["image_std"] == OLD["image_std"]


def test_timm_config_of_the_base_model_states_the_preprocessing(tmp_path):
    tiny().save_pretrained(tmp_path / "ours")
    save_file(tiny().state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "base").mkdir()
    cfg = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    (tmp_path / "base/config.json").write_text(json.dumps({"pretrained_cfg": cfg}))
    base = str(tmp_path / "base")
    convert(tmp_path / "mine.safetensors", tmp_path / "out", base_model=base, num_attention_heads=4, hidden_act="gelu")
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text())["image_std"] == [0.2] * 3


def test_timm_model_that_transformers_saved_is_opened(tmp_path):
    model = tiny()
    save_file(
        {f"timm_model.{key}": tensor for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    content = {"model_type": "timm_wrapper", "architecture": "vit_base_patch4_16", "num_classes": 5}
    content |= {"model_args": {"num_heads": 4, "img_size": 16}, "label_names": list("abcde")}
    content["pretrained_cfg"] = {"input_size": [3, 16, 16], "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(content))
    convert(tmp_path, tmp_path / "out")
    ours = open_folder(tmp_path / "out")
    assert list(ours.config.id2label.values()) == list("abcde")
    assert_alike(outputs(ours, IMAGES[16]), outputs(model, IMAGES[16]))


def test_standard_names_come_before_others_and_no_file_of_an_optimizer_counts(tmp_path):
    for name in ("open_clip_model.safetensors", "training_args.bin", "optimizer.bin", "rng_state_0.pth", "a.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "other")
    assert [file.name for file in find_weights(str(tmp_path))[1]] == ["a.ckpt"]
    (tmp_path / "other").rename(tmp_path / "open_clip_model.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    assert [file.name for file in find_weights(str(tmp_path))[1]] == ["pytorch_model.bin"]


def test_head_of_several_layers_is_dropped(tmp_path):
    """The momentum encoder of MoCo v3 has its projection in the place of the head."""
    tensors = {key: tensor for key, tensor in tiny().state_dict().items() if not key.startswith("head.")}
    tensors |= {"head.0.weight": torch.zeros(8, 32), "head.1.running_mean": torch.zeros(8)}
    torch.save({"state_dict": {f"module.base_encoder.{key}": t for key, t in tensors.items()}}, tmp_path / "m.pth.tar")
    report = convert(tmp_path / "m.pth.tar", tmp_path / "out", family="deit", num_attention_heads=4)
    assert "dropped the head of several layers: head.0.weight, head.1.running_mean" in report


@pytest.mark.parametrize("name, message", [("a.npz", "it is a file of JAX"), ("a.pt", "it is a TorchScript archive")])
def test_files_of_other_formats_are_named(tmp_path, name, message):
    if name == "a.npz":
        np.savez(tmp_path / name, kernel=np.zeros(3))
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / name)
    assert message in refusal(tmp_path, tmp_path / name, family="augreg")


def test_image_processor_of_no_class_that_transformers_knows_is_refused_in_one_line(peer, tmp_path):
    peer("DINOv2 with registers")
    (tmp_path / "peer/preprocessor_config.json").write_text(json.dumps(OLD))
    assert refusal(tmp_path, tmp_path / "peer").startswith("preprocessor_config.json: expected image_processor_type,")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_conversion_copies_into_memory_only_the_tensors_that_it_joins(peer, tmp_path):
    peer("google/vit")
    tensors = open_checkpoint(str(tmp_path / "peer"), family="google").tensors
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in maps if line[-1] == str(tmp_path / "peer/model.safetensors")]
    in_file = {
        name
        for name, tensor in tensors.items()
        if any(int(first, 16) <= tensor.data_ptr() < int(end, 16) for first, end in spans)
    }
    assert tensors.keys() - in_file == {name for name in tensors if ".qkv." in name}


def test_converted_card_states_origin_and_report(peer, tmp_path):
    peer("google/vit in21k")
    report = convert(tmp_path / "peer", tmp_path / "out", family="google", base_model="google/vit")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "google/vit")
    assert "with the weights of peer, based on google/vit. It" in card.text and f"- {report[0]}" in card.text
    assert "The converted weights were not re-evaluated." in card.text  # the results of google/vit are those of others


@pytest.mark.parametrize(
    "to, snippet, fields, report",
    [
        (
            "timm",
            'import timm\n\nmodel = timm.create_model("hf-hub:your-name/exported", pretrained=True)',
            {"layer_norm_eps": 1e-12},
            ["changed layer_norm_eps from 1e-12 to 1e-6, which timm uses"],
        ),
        (
            "transformers",
            "from transformers import ViTForImageClassification\n\n"
            'model = ViTForImageClassification.from_pretrained("your-name/exported")',
            {"interpolate_antialias": False},
            [],
        ),
    ],
)
def test_exported_card_names_library_license_and_how_to_load(tmp_path, to, snippet, fields, report):
    tiny(**fields).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    convert(tmp_path / "ours", tmp_path / "exported", to=to, family="google")
    card = ModelCard.load(tmp_path / "exported/README.md")
    metadata = card.data.library_name, card.data.pipeline_tag, card.data.license, card.data.base_model
    assert metadata == (to, "image-classification", "mit", "a/b")
    assert card.text.startswith(
        f"# exported\n\nA plain Vision Transformer for {to} with the weights of ours, based on a/b."
    )
    assert f"```python\n{snippet}\n```" in card.text
    assert all(f"- {line}" in card.text for line in report) and ("## Conversion" in card.text) == bool(report)


def test_converted_checkpoint_has_no_commit_where_git_is_not_installed(peer, tmp_path, monkeypatch):
    peer("google/vit")
    monkeypatch.setenv("PATH", str(tmp_path))
    convert(tmp_path / "peer", tmp_path / "out", family="google")
    assert json.loads((tmp_path / "out/provenance.json").read_text())["commit"] is None


def test_convert_command_prints_the_report(peer, tmp_path, capsys):
    peer("google/vit in21k")
    main([str(tmp_path / "peer"), str(tmp_path / "out"), "--family", "google", "--base_model", "google/vit"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("dropped the tanh layer between backbone and head: pooler.dense.bias, pooler.dense")
    assert printed[-1] == f"saved in {tmp_path}/out"


def test_convert_command_refuses_an_existing_folder_with_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), str(tmp_path)])
    printed = capsys.readouterr().err
    assert printed == f"convert_checkpoint.py: error: OUT: {tmp_path} already exists; choose a new folder\n"
    assert stop.value.code == 2


def test_convert_command_without_network_ends_with_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["no/where", str(tmp_path / "out")])
    assert "SOURCE: no file or folder no/where, and it cannot be downloaded" in capsys.readouterr().err
    assert stop.value.code == 1


def test_missing_local_path_is_said_to_be_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "missing.pth"), str(tmp_path / "out")])
    message = f"SOURCE: there is no file, folder or Hub repository {tmp_path}/missing.pth\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.slow
def test_hub_repository_is_converted_and_an_unknown_one_is_refused(peer, tmp_path):
    peer("DINOv2")
    files = {file.name: file.read_bytes() for file in (tmp_path / "peer").iterdir()}
    card = b"---\nlicense: apache-2.0\n---\n"
    with Hub({}) as hub:
        hub.create("models/meta/dinov2", files | {"README.md": card, "other.bin": b"not wanted"})
        hub.create("models/me/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
        code = """
import contextlib
from vit_simple.convert_checkpoint import main
main(["meta/dinov2", "out"])
with contextlib.suppress(SystemExit):
    main(["me/adapter", "nothing"])
main(["no/where", "nothing"])
"""
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert not any("other.bin" in request.path for request in hub.log)
    assert "expected a whole checkpoint, got an adapter of PEFT" in result.stderr
    assert "SOURCE: no file or folder no/where, and no Hub repository to read" in result.stderr
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert_alike(
        outputs(open_folder(tmp_path / "out"), IMAGES[16]), outputs(open_folder(tmp_path / "peer"), IMAGES[16])
    )
    card = ModelCard.load(tmp_path / "out/README.md").data
    assert (card.license, card.base_model, card.library_name) == ("apache-2.0", "meta/dinov2", "transformers")


@pytest.mark.slow
def test_fine_tuned_hub_repository_takes_the_image_processor_of_its_base_model(peer, tmp_path):
    peer("google/vit")
    files = {file.name: file.read_bytes() for file in (tmp_path / "peer").iterdir()}
    with Hub({}) as hub:
        hub.create("models/google/vit", files | {"preprocessor_config.json": json.dumps(OLD).encode()})
        hub.create("models/me/pets", files | {"README.md": b"---\nbase_model: google/vit\n---\n"})
        code = """
from vit_simple.convert_checkpoint import main
main(["me/pets", "out"])
main(["me/pets", "based", "--base_model", "google/vit"])
"""
        command = [sys.executable, "-c", code]
        subprocess.run(command, env=hub.environment(tmp_path / "home"), cwd=tmp_path, check=True)
        commit = hub.repos["models/me/pets"].at("main").sha
    out, based = (ModelCard.load(tmp_path / name / "README.md") for name in ("out", "based"))
    assert f"with the weights of me/pets (revision `{commit}`). It" in out.text and out.data.base_model == "me/pets"
    assert "for the original results, see me/pets." in out.text
    assert "with the weights of me/pets, based on google/vit. It" in based.text
    assert based.data.base_model == "google/vit"
    processors = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("out", "based")]
    assert [content["image_std"] for content in processors] == [OLD["image_std"]] * 2
