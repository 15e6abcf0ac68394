"""Checkpoints of transformers' own classes become ours and go back; timm's are in test_timm.py."""

import json
import re
import shutil
import subprocess
import sys

import PIL.Image
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from tests.conftest import TINY, run_python, tiny
from tests.conversion.parity import IMAGES, assert_alike, open_folder, outputs, random
from tests.fake_hub.hub import Hub
from vit_simple import ViTSimpleConfig
from vit_simple.configuration_vit_simple import label_maps, pair
from vit_simple.conversion.processors import fit_processor, processor_from_timm, processor_to_timm
from vit_simple.conversion.state_dict import DROPPED
from vit_simple.convert_checkpoint import convert, main

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
        model = random(its_class(its_class.config_class(**{**fields, **options})))
        model.save_pretrained(tmp_path / "peer")
        return model

    return save


@pytest.mark.parametrize("family", PEERS)
def test_a_checkpoint_of_transformers_gives_its_outputs_and_goes_back(peer, tmp_path, family):
    theirs = peer(family)
    told = convert(tmp_path / "peer", tmp_path / "ours", family=FAMILY.get(family))
    ours = open_folder(tmp_path / "ours")
    assert_alike(outputs(ours, IMAGES[16]), outputs(theirs, IMAGES[16]))
    if family == "DINOv2 with registers":
        # The others resample without antialiasing, unlike timm and this network.
        assert_alike(outputs(ours, IMAGES[24]), outputs(theirs, IMAGES[24]))
    dropped = any("dropped a head" in line for line in told)
    assert dropped == (family == "DINOv2 with its head")
    assert hasattr(ours, "head") == (outputs(theirs, IMAGES[16])[1] is not None and not dropped)

    convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    assert_alike(outputs(open_folder(tmp_path / "back"), IMAGES[16]), outputs(theirs, IMAGES[16]))
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
        assert name.startswith("classifier.") or re.match("|".join(DROPPED), name), name
    for pattern, what in DROPPED.items():
        lost = any(re.match(pattern, name) for name in before)
        assert lost == any(line.startswith(f"dropped {what}") for line in told), what

    ours.from_pretrained(tmp_path / "ours", image_size=24).save_pretrained(tmp_path / "larger")
    shutil.copy(tmp_path / "ours/preprocessor_config.json", tmp_path / "larger")
    convert(tmp_path / "larger", tmp_path / "larger there", to="transformers")
    assert_alike(outputs(open_folder(tmp_path / "larger there"), IMAGES[24]), outputs(ours, IMAGES[24]))


def nothing_written(tmp_path, *arguments, **options) -> str:
    """The reason for which a conversion is refused; of OUT nothing is there then."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as refused:
        convert(*arguments, tmp_path / "new/out", **options)
    assert set(tmp_path.rglob("*")) == before
    return str(refused.value)


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
        (lambda tensors: tensors.update(odd=torch.ones(2)), "odd is not known"),
        (
            lambda tensors: tensors.update({"vit.layernorm.bias": torch.ones(5)}),
            r"layernorm.bias has the shape \(5,\) and not \(32,\)",
        ),
        (
            lambda tensors: tensors.pop("vit.encoder.layer.2.attention.attention.key.weight"),
            "encoder.layer.2.attention.attention.key.weight is missing",
        ),
    ],
)
def test_tensors_that_are_missing_unknown_or_misshapen_are_named(peer, tmp_path, change, reason):
    peer("google/vit")
    rewrite(tmp_path / "peer", change)
    assert re.search(reason, nothing_written(tmp_path, tmp_path / "peer", family="google"))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"num_hidden_layers": 2}, "encoder.layer.2.attention.attention.query.weight is not known"),
        ({"image_size": 32}, r"position_embeddings has the shape \(1, 5, 32\) and not \(1, 17, 32\)"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of num_attention_heads=5, got 32"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "convnext"}, "expected a plain ViT of the types vit, .*, got convnext"),
        ({"model_type": "nonsense"}, "nonsense"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(peer, tmp_path, fields, reason):
    peer("google/vit")
    file = tmp_path / "peer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    assert re.search(reason, nothing_written(tmp_path, tmp_path / "peer", family="google"))


@pytest.mark.parametrize(
    "kind, fields, reason",
    [
        ("DeiTForImageClassification", PLAIN, "DeiT distilled"),
        ("SiglipVisionModel", PLAIN, "SigLIP"),
        ("BeitModel", PLAIN, "BEiT"),
        ("SwinModel", {"image_size": 32, "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 4}, "Swin"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, kind, fields, reason):
    its_class = getattr(transformers, kind)
    its_class(its_class.config_class(**fields)).save_pretrained(tmp_path / "peer")
    assert f": {reason}" in nothing_written(tmp_path, tmp_path / "peer", family="google")


def test_files_that_are_damaged_or_hold_more_than_tensors_are_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(tiny().state_dict(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    torch.save({"model": tiny().state_dict(), "args": random}, tmp_path / "code.pth")
    torch.save({"model": tiny().state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save({"cls_token": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    (tmp_path / "text.bin").write_text("not a checkpoint")
    (tmp_path / "twice").mkdir()
    for number in (1, 2):
        shutil.copy(whole, tmp_path / f"twice/model-0000{number}-of-00002.safetensors")
    assert "a second time" in nothing_written(tmp_path, tmp_path / "twice", family="augreg")
    for name in ("cut.safetensors", "code.pth", "mixed.pth", "text.bin"):
        assert name in nothing_written(tmp_path, tmp_path / name, family="augreg")
    convert(tmp_path / "wrapped.pth", tmp_path / "out", family="augreg", num_attention_heads=4)
    assert open_folder(tmp_path / "out").config.num_labels == 5


def test_what_no_file_tells_is_asked_for(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "plain.safetensors")
    save_file(tiny(pre_norm=True).state_dict(), tmp_path / "clip.safetensors")
    heads = {"num_attention_heads": 4}
    assert "--num_attention_heads" in nothing_written(tmp_path, tmp_path / "plain.safetensors", family="deit")
    assert "--family" in nothing_written(tmp_path, tmp_path / "plain.safetensors", **heads)
    assert "--hidden_act" in nothing_written(tmp_path, tmp_path / "clip.safetensors", **heads)
    told = convert(tmp_path / "clip.safetensors", tmp_path / "out", hidden_act="quick_gelu", base_model="a/b", **heads)
    model = open_folder(tmp_path / "out")
    assert (model.config.hidden_act, model.config.layer_norm_eps) == ("quick_gelu", 1e-5)
    card = ModelCard.load(tmp_path / "out/README.md").data
    assert card.base_model == "a/b" and told[-1].startswith("no licence is known")


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
def test_what_the_others_cannot_hold_is_refused(tmp_path, to, fields, reason):
    tiny(**fields).save_pretrained(tmp_path / "ours")
    assert reason in nothing_written(tmp_path, tmp_path / "ours", to=to, family="augreg")


def test_a_head_on_dinov2_goes_to_transformers_and_comes_back(tmp_path):
    for pooling in ("cls", "mean"):
        folder = tmp_path / pooling
        model = tiny(layerscale_value=0.1, intermediate_size=64, pooling=pooling)
        model.save_pretrained(folder / "ours")
        convert(folder / "ours", folder / "there", to="transformers", family="dinov2")
        convert(folder / "there", folder / "back")
        assert_alike(outputs(open_folder(folder / "there"), IMAGES[16]), outputs(model, IMAGES[16]))
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
def test_what_is_written_for_timm_is_read_as_it_was(tmp_path, fields):
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


def test_deit3_as_its_authors_wrote_it_is_read_from_a_file_alone(tmp_path):
    model = tiny(no_embed_class=True, layerscale_value=1e-5, hidden_size=192, num_attention_heads=3)
    names = {name: re.sub(r"ls(\d)\.gamma", r"gamma_\1", name) for name in model.state_dict()}
    torch.save({"model": {names[name]: tensor for name, tensor in model.state_dict().items()}}, tmp_path / "deit3.pth")
    told = convert(tmp_path / "deit3.pth", tmp_path / "out", family="deit3")
    assert told[:2] == [
        "took images of (16, 16) pixels and the pooling cls, since no config tells of others",
        "took 3 attention heads, as published ViTs of width 192 have",
    ]
    assert_alike(outputs(open_folder(tmp_path / "out"), IMAGES[16]), outputs(model, IMAGES[16]))


def test_processors_are_fitted_to_what_the_network_takes(tmp_path):
    """Images that are not square are squashed, other channels scaled by averages, and processor_config.json is read."""
    stored = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "resample": 3}
    stored |= {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    tiny(image_size=(16, 32), num_channels=1).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/processor_config.json").write_text(json.dumps({"image_processor": stored}))
    told = convert(tmp_path / "ours", tmp_path / "out")
    assert told[:3] == [
        "the image processor makes (16, 32) pixels, as the network takes, in the place of (16, 16)",
        "the image processor squashes, since images are not square",
        "the image processor scales 1 channels by the averages of 3",
    ]
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (written["size"], written["do_center_crop"]) == ({"height": 16, "width": 32}, False)
    assert written["image_mean"] == pytest.approx([0.2]) and written["image_std"] == pytest.approx([0.6])
    (tmp_path / "ours/processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "ViltImageProcessor"}}'
    )
    assert "expected ViTImageProcessor or" in nothing_written(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("mode, part", [("squash", 1.0), ("squash", 0.8), ("center", 0.9)])
def test_what_timm_does_to_images_goes_there_and_back(mode, part):
    cfg = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": part, "crop_mode": mode}
    config, notes = ViTSimpleConfig(**TINY), []
    back = processor_to_timm(fit_processor(processor_from_timm(cfg, (16, 16), notes), config, notes), config)
    assert cfg.items() <= back.items() and not notes
    processor_from_timm(cfg, (16, 32), notes)
    assert bool(notes) == (mode == "center")


def test_a_file_of_another_name_takes_nothing_from_its_neighbours(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    told = convert(tmp_path / "other.safetensors", tmp_path / "out", family="deit", num_attention_heads=4)
    assert told[-2:] == [f"no {what} is known: the card, README.md, names none" for what in ("licence", "base model")]
    assert "--family" in nothing_written(tmp_path, tmp_path / "other.safetensors", num_attention_heads=4)
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    assert "config.json tells both" in nothing_written(tmp_path, tmp_path / "model.safetensors", hidden_act="relu")


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"architecture": "vit_base_patch16_rope_ape_224"}, "a ViT with rotary positions"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "LayerNorm behind"),
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
            "num_classes: expected 5, as head.weight has, got 7",
        ),
        ({"architecture": "vit_base_patch16_224", "global_pool": "map"}, "global_pool: expected token"),
        ({"architecture": "vit_base_patch16_224", "label_names": ["a"]}, "label_names: expected a list of 5 names"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"img_size": 32}}, "has the shape (1, 17, 32) and not"),
        (
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"notes": ["natively QuickGELU"]}},
            "--hidden_act: expected quick_gelu",
        ),
        ([], "config.json: expected a JSON object, got list"),
    ],
)
def test_configs_of_timm_that_do_not_fit_are_refused(tmp_path, content, reason):
    (tmp_path / "peer").mkdir()
    save_file(tiny().state_dict(), tmp_path / "peer/model.safetensors")
    if isinstance(content, dict):
        content["model_args"] = {"num_heads": 4, **content.get("model_args", {})}
    (tmp_path / "peer/config.json").write_text(json.dumps(content))
    assert reason in nothing_written(tmp_path, tmp_path / "peer", family="deit")


def test_half_precision_shards_and_the_card_come_along(peer, tmp_path):
    theirs = peer("google/vit")
    theirs.bfloat16().save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    (tmp_path / "parts/README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: a/b\n---\n# A title\n")
    content = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "parts/preprocessor_config.json").write_text(json.dumps(content))
    told = convert(tmp_path / "parts", tmp_path / "out")
    model = open_folder(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.base_model) == ("cc-by-nc-4.0", "a/b")
    assert told == ["the image processor makes (16, 16) pixels, as the network takes, in the place of (32, 32)"]
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert written["image_mean"] == content["image_mean"] and written["do_convert_rgb"] is True
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(PIL.Image.new("L", (30, 40)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 16, 16)


def test_a_conversion_takes_little_more_memory_than_its_file(tmp_path):
    fields = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072}
    transformers.ViTModel(transformers.ViTConfig(**fields)).save_pretrained(tmp_path / "peer")
    code = """
import resource, sys
from vit_simple.convert_checkpoint import convert, main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], family="google")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    printed = run_python(sys.executable, tmp_path / "work", code, tmp_path / "peer", tmp_path / "out")
    assert int(printed.split()[-1]) * 1024 < 1.5 * (tmp_path / "peer/model.safetensors").stat().st_size


def test_the_command_says_what_it_did_and_what_it_cannot_do(peer, tmp_path, capsys):
    peer("google/vit in21k")
    main([str(tmp_path / "peer"), str(tmp_path / "out"), "--family", "google", "--base_model", "google/vit"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("dropped the tanh layer between backbone and head: pooler.dense.bias, pooler.dense")
    assert printed[-1] == f"saved in {tmp_path}/out"
    with pytest.raises(SystemExit, match=f"error: OUT: expected a folder that is not there yet, got {tmp_path}/out"):
        main([str(tmp_path / "peer"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: expected a file, a folder or a repository of the Hub, got no/where"):
        main(["no/where", str(tmp_path / "other")])


def test_a_repository_of_the_hub_is_converted(peer, tmp_path):
    peer("DINOv2")
    files = {file.name: file.read_bytes() for file in (tmp_path / "peer").iterdir()}
    card = b"---\nlicense: apache-2.0\n---\n"
    with Hub({}) as hub:
        hub.create("models/meta/dinov2", files | {"README.md": card, "other.bin": b"not wanted"})
        command = [sys.executable, "-m", "vit_simple.convert_checkpoint", "meta/dinov2", tmp_path / "out"]
        subprocess.run(command, env=hub.environment(tmp_path / "home"), check=True, cwd=tmp_path)
        assert not any("other.bin" in request.path for request in hub.log)
    assert_alike(
        outputs(open_folder(tmp_path / "out"), IMAGES[16]), outputs(open_folder(tmp_path / "peer"), IMAGES[16])
    )
    card = ModelCard.load(tmp_path / "out/README.md").data
    assert (card.license, card.base_model, card.library_name) == ("apache-2.0", "meta/dinov2", "transformers")
