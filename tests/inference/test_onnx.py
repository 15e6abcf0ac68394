"""ONNX files compute what the checkpoint computes, are measured on real images, and hold nothing of this machine."""

import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from datasets import load_dataset
from transformers import ViTConfig, ViTForImageClassification

from tests.conftest import DIGITS, EVERY_SWITCH, tiny
from vit_simple import ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.data.processors import open_processor
from vit_simple.export import export, main
from vit_simple.files import ONNX_FILES, ROOT, UserError, read_json, read_metrics
from vit_simple.inference import exporting
from vit_simple.inference import onnx as exporter
from vit_simple.inference.onnx import open_onnx, write_onnx


def run(path: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    assert [each.name for each in session.get_inputs()] == ["pixel_values"]
    return {
        name: torch.from_numpy(value) for name, value in zip(names, session.run(None, {"pixel_values": pixels.numpy()}))
    }


def close(output: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def test_onnx_gives_logits_and_attentions_for_any_batch(exported):
    model = ViTSimpleForImageClassification.from_pretrained(exported, attn_implementation="eager")
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        outputs = run(exported / "onnx/model.onnx", pixels)
        with torch.no_grad():
            expected = model(pixels, output_attentions=True)
        assert list(outputs) == ["logits", *(f"attentions.{layer}" for layer in range(len(expected.attentions)))]
        for output, value in zip(outputs.values(), (expected.logits, *expected.attentions)):
            close(output, value)


def test_onnx_of_a_backbone_accepts_any_size_with_dynamic_size(tmp_path):
    fields = {"image_size": [16, 24], "patch_size": [4, 8], "num_hidden_layers": 1, **EVERY_SWITCH}
    model = ViTSimpleModel(tiny(**fields).config).eval()
    write_onnx(model, tmp_path, dynamic_size=True)
    for sides in ((16, 24), (24, 16), (4, 8)):
        pixels = torch.randn(2, 3, *sides)
        outputs = run(tmp_path / "model.onnx", pixels)
        with torch.no_grad():
            expected = model(pixels, interpolate_pos_encoding=True)
        assert list(outputs) == ["last_hidden_state", "pooler_output"]
        close(outputs["last_hidden_state"], expected.last_hidden_state)
        close(outputs["pooler_output"], expected.pooler_output)


def test_onnx_files_agree_with_the_checkpoint_on_real_images(exported):
    content = read_json(exported / "provenance.json")["exports"]
    assert (content["dataset"], content["split"], content["images"]) == ("data/digits", "test", 360)
    accuracy = read_metrics(exported)[-1]["top1"]
    eager = content["models"]["PyTorch, eager"]
    assert eager["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    for name in ONNX_FILES:
        values = content["models"][name]
        assert values["agreement"] >= 0.99 and values["bytes"] == (exported / name).stat().st_size
        assert f"| {name} | {values['bytes'] / 1e6:.2f} MB |" in (exported / "README.md").read_text()
    images = load_dataset(DIGITS, split="test")[:3]["image"]
    processor = open_processor(read_json(exported / "preprocessor_config.json"))
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = ViTSimpleForImageClassification.from_pretrained(exported)(pixels).logits
    differences = [(open_onnx(exported / name)(pixels) - expected).abs().max().item() for name in ONNX_FILES]
    assert differences[0] < 1e-4 < differences[1] < 0.05 and differences[2] < 1


def test_onnx_files_that_disagree_are_written_only_with_force(exported, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "digits"))

    def write_with_a_wrong_one(model, new, dynamic_size):
        write_onnx(tiny(num_hidden_layers=1, image_size=8, num_labels=10), new)
        for name in ONNX_FILES[:2]:
            shutil.copy(exported / name, new)

    monkeypatch.setattr(exporting, "write_onnx", write_with_a_wrong_one)
    main([str(folder), "--to", "onnx"])
    assert "onnx/model_quantized.onnx: agreement below 99%; --force" in capsys.readouterr().out
    assert not (folder / ONNX_FILES[2]).exists() and (folder / ONNX_FILES[1]).exists()
    export(folder, to="onnx", force=True)
    assert (folder / ONNX_FILES[2]).exists()


def test_earlier_files_that_cannot_be_opened_do_not_stop_an_export(exported, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "digits"))
    (folder / "aot").mkdir()
    (folder / "aot/model.pt2").write_bytes(b"of another machine")

    def copy_earlier(model, new, dynamic_size):
        for name in ONNX_FILES:
            shutil.copy(exported / name, new)

    monkeypatch.setattr(exporting, "write_onnx", copy_earlier)
    main([str(folder), "--to", "onnx", "--max_eval_samples", "20"])
    assert "aot/model.pt2 is not compared, because it cannot be opened here: " in capsys.readouterr().out
    assert set(read_json(folder / "provenance.json")["exports"]["models"]) == {"PyTorch, eager", *ONNX_FILES}

    model = ViTSimpleForImageClassification.from_pretrained(folder).eval()
    monkeypatch.setattr(exporting, "write_compiled", lambda model, new: (new / "model.pt2").write_bytes(b"compiled"))
    monkeypatch.setattr(exporting, "open_compiled", lambda path: exporting.as_function(model))
    (folder / ONNX_FILES[0]).write_bytes(b"damaged")
    main([str(folder), "--to", "aot", "--max_eval_samples", "20"])
    printed = capsys.readouterr().out
    assert "onnx/model.onnx is not compared" in printed and "onnx/model_fp16.onnx is not compared" not in printed
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    main([str(folder), "--to", "aot", "--max_eval_samples", "20"])
    printed = capsys.readouterr().out
    assert all(f"{name} is not compared" in printed for name in ONNX_FILES)
    assert (folder / "aot/model.pt2").read_bytes() == b"compiled"


def test_onnx_files_do_not_name_folders_of_this_machine(exported):
    for name in ONNX_FILES:
        content = (exported / name).read_bytes()
        assert str(ROOT.resolve()).encode() not in content and b"site-packages" not in content


def test_export_says_what_is_missing(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--attentions can only be combined with --to onnx"):
        export(exported, to="aot", attentions=True)
    with pytest.raises(UserError, match="CHECKPOINT: expected a folder"):
        export(tmp_path, to="onnx")
    with pytest.raises(SystemExit, match="--max_eval_samples: expected at least 1, got 0"):
        main([str(exported), "--to", "onnx", "--max_eval_samples", "0"])
    ViTForImageClassification(ViTConfig(hidden_size=12, num_hidden_layers=1)).save_pretrained(tmp_path)
    shutil.copy(exported / "preprocessor_config.json", tmp_path)
    with pytest.raises(UserError, match="expected the model type vit_simple, got vit; convert_checkpoint"):
        export(tmp_path, to="onnx")
    tiny(num_channels=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of 1 channel for this model, got 3 in data/digits, the default"):
        export(tmp_path, to="onnx")
    monkeypatch.setattr(exporter, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="expected a model below 2 GB"):
        write_onnx(tiny(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="ONNX needs onnxscript: pip install onnxscript"):
        export(exported, to="onnx")
