import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny
from tests.sharing.conftest import edit
from vit_simple import ViTSimpleModel
from vit_simple.conversion.convert import write_json
from vit_simple.data.processors import stock_processor
from vit_simple.files import ONNX_FILES, UserError
from vit_simple.inference.onnx import write_onnx
from vit_simple.sharing.verify import check, fresh_outputs, local_outputs


def set_field(folder: Path, name: str, value):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, name: value}))


def set_weight(folder: Path, name: str, value: float):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: (folder / "modeling_vit_simple.py").unlink(), "has no modeling_vit_simple.py"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "processor.save_pretrained",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "expected a complete safetensors file"),
        (lambda folder: edit(folder / "config.json", "AutoModelForIm", "AutoIm"), "auto_map"),
        (lambda folder: edit(folder / "config.json", '"0": "0"', '"0": "LABEL_0"'), "has no class names"),
        (lambda folder: edit(folder / "config.json", '": 64', '": 32'), "instead of"),
        (lambda folder: edit(folder / "config.json", '"patch_size": 2', '"patch_size": 3'), "a multiple of patch_size"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected JSON"),
        (
            lambda folder: set_field(folder, "num_hidden_layers", 10**9),
            "expected num_hidden_layers of 4.* got 1000000000",
        ),
        (lambda folder: set_field(folder, "hidden_size", 10**12), "expected the sizes of a model that can be built"),
        (lambda folder: set_field(folder, "image_size", 10**9), "expected the sizes of a model that can be built"),
        (lambda folder: set_field(folder, "id2label", ["a"]), r"config\.json: expected id2label to be dict"),
        (lambda folder: set_field(folder, "id2label", {"a": "b"}), r"config\.json: id2label: expected numbers"),
        (
            lambda folder: set_field(folder, "id2label", {"0": 0}),
            r"config\.json: expected id2label\.0 to be str, got 0",
        ),
        (lambda folder: set_field(folder, "id2label", {"0": None}), r"expected id2label\.0 to be str, got nothing"),
        (lambda folder: set_field(folder, "dtype", "float99"), r"config\.json: dtype: expected a dtype .* got float99"),
        (lambda folder: set_field(folder, "dtype", 32), r"config\.json: expected dtype to be str or nothing, got 32"),
        (lambda folder: set_weight(folder, "head.bias", math.nan), r"head\.bias has values that are not finite"),
        (lambda folder: set_weight(folder, "pos_embed", math.inf), "pos_embed has values that are not finite"),
    ],
)
def test_check_refuses_a_folder_that_is_damaged_or_incomplete(folder, change, reason):
    change(folder)
    with pytest.raises(UserError, match=reason):
        check(folder)


@pytest.mark.slow
def test_changed_code_is_reported_and_must_compute_the_same(folder):
    code = folder / "modeling_vit_simple.py"
    code.write_text(code.read_text() + "\n# another comment\n")
    _, warnings = check(folder)
    assert warnings == ["modeling_vit_simple.py differs from the installed one; the checkpoint keeps its own"]
    code.write_text(code.read_text() + "\nnn.Linear.forward = lambda self, x: 0 * x @ self.weight.T\n")
    with pytest.raises(UserError, match="its code and the installed package compute different logits, scores"):
        local_outputs(folder)


@pytest.mark.slow
def test_fresh_outputs_raises_the_error_of_a_checkpoint_that_does_not_load(folder):
    (folder / "modeling_vit_simple.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"does not load in a fresh process: .*no_such_module"):
        fresh_outputs(str(folder))


@pytest.mark.slow
def test_backbone_is_checked_by_its_features_in_a_process_without_secrets(tmp_path, monkeypatch):
    ViTSimpleModel(tiny().config).save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", stock_processor((16, 16)))
    assert check(tmp_path)[1] == []
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PGPASSWORD", "SSH_AUTH_SOCK", "AZURE_SAS_SIG")
    for name in names:
        monkeypatch.setenv(name, "my-own-secret-value")
    code = tmp_path / "configuration_vit_simple.py"
    code.write_text(code.read_text() + f"\nimport os\nassert not any(map(os.environ.get, {names})), os.environ\n")
    assert fresh_outputs(str(tmp_path))["pooler_output"].shape == (2, 32)


@pytest.mark.slow
def test_outputs_that_are_not_finite_are_named(folder):
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**content, "image_std": [0.0, 0.0, 0.0]}))
    with pytest.raises(UserError, match=r"expected finite outputs, got NaN or infinity in logits"):
        local_outputs(folder)


def test_onnx_file_of_other_weights_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "digits"))
    outputs = local_outputs(folder)
    assert set(ONNX_FILES) < outputs.keys() and set(ONNX_FILES) < set(check(folder)[0])
    set_weight(folder, "head.bias", 9.0)
    with pytest.raises(UserError, match=r"onnx/model\.onnx does not compute what the weights compute: export it again"):
        local_outputs(folder)


@pytest.mark.slow
def test_onnx_file_of_weights_in_bfloat16_is_compared_in_float32(tmp_path):
    model = tiny(num_hidden_layers=1).bfloat16()
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", stock_processor((16, 16)))
    (tmp_path / "onnx").mkdir()
    write_onnx(model.float(), tmp_path / "onnx")
    outputs = local_outputs(tmp_path)
    assert outputs["logits"].dtype == torch.bfloat16 and set(ONNX_FILES) < outputs.keys()
