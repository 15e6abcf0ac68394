"""Positions are resampled as in the source of a checkpoint, whatever the size of the images."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.conftest import tiny
from tests.conversion.parity import IMAGES, differences, outputs, rows, transformers_row
from vit_simple.conversion.convert import open_checkpoint
from vit_simple.convert_checkpoint import convert


def test_tokens_of_every_source_are_equal_at_every_size():
    found = [(family, source, row) for family, source, row in rows() if not isinstance(row, str)]
    assert len(found) >= 13
    for family, source, row in found:
        assert max(row) < 1e-5, (family, source, row)


@pytest.mark.parametrize("field, value", [("interpolate_antialias", True), ("interpolate_offset", 0.1)])
def test_tokens_differ_if_positions_are_resampled_otherwise(tmp_path, field, value):
    transformers_row("DINOv2", "Dinov2Model", tmp_path)
    file = tmp_path / "ours/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    native, *others = differences(AutoModel.from_pretrained(tmp_path / "peer").eval(), tmp_path / "ours")
    assert native < 1e-5 and min(others) > 1e-3


@pytest.fixture
def dinov2(tmp_path):
    """A checkpoint of DINOv2 with positions for 48 pixels and an image processor for 24, and its conversion."""
    transformers_row("DINOv2", "Dinov2Model", tmp_path)
    preprocessor = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "peer/preprocessor_config.json").write_text(json.dumps(preprocessor))
    report = convert(tmp_path / "peer", tmp_path / "small")
    return tmp_path, AutoModel.from_pretrained(tmp_path / "peer").eval(), report


def test_image_processor_keeps_its_size_and_the_model_follows(dinov2):
    folder, peer, report = dinov2
    assert any("positions stay stored for (48, 48) pixels" in line for line in report)
    assert json.loads((folder / "small/preprocessor_config.json").read_text())["crop_size"]["height"] == 24
    model = AutoModel.from_pretrained(folder / "small").eval()
    assert model.config.image_size == 24 and model.pos_embed.shape == (1, 145, 32)
    expected = outputs(peer, IMAGES[24])[0]
    torch.testing.assert_close(model(IMAGES[24]).last_hidden_state, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert max(differences(peer, folder / "small")) < 1e-5  # other sizes are as exact


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_exported_checkpoint_gives_the_same_tokens_and_keeps_how_positions_are_resampled(dinov2, to):
    folder, peer, _ = dinov2
    report = convert(folder / "small", folder / "exported", to=to)
    convert(folder / "exported", folder / "back")
    config = AutoConfig.from_pretrained(folder / "back")
    assert (config.interpolate_antialias, config.image_size) == (False, 24)
    expected, tokens = outputs(peer, IMAGES[24])[0], outputs(AutoModel.from_pretrained(folder / "back"), IMAGES[24])[0]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    is_changed = any("resampled the positions from (12, 12) to (6, 6)" in line for line in report)
    is_told = any(line.startswith("timm resamples positions for other image sizes with") for line in report)
    assert is_changed == is_told == (to == "timm")
    if to == "transformers":
        assert config.pretrain_image_size == 48


def test_original_file_of_dinov2_is_opened_with_registers_chunks_and_gate(tmp_path):
    fields = {"layerscale_value": 1.0, "mlp": "swiglu", "hidden_act": "silu", "num_register_tokens": 2}
    model = tiny(**fields, no_embed_class=True, num_labels=1)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}
    position = torch.randn(1, 1, 32)
    tensors["cls_token"] = tensors["cls_token"] - position
    tensors["pos_embed"] = torch.cat([position, tensors["pos_embed"]], 1)
    original = {}
    for name, tensor in tensors.items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        name = name.replace(f"blocks.{block}.", f"blocks.{int(block) // 2}.{block}.") if block else name
        name = name.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        original[f"backbone.{name}"] = tensor
    torch.save({"teacher": original | {"dino_head.last_layer.weight": torch.ones(2)}}, tmp_path / "teacher.pth")
    checkpoint = open_checkpoint(str(tmp_path / "teacher.pth"), family="dinov2", num_attention_heads=4)
    for name, tensor in checkpoint.tensors.items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    assert checkpoint.config.interpolate_antialias and checkpoint.config.interpolate_offset == 0
