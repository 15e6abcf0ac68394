import contextlib
import os

import pytest

from tests.conftest import tiny
from tests.sharing.conftest import TOKEN, edit
from vit_simple import ViTSimpleModel
from vit_simple.conversion.convert import write_json
from vit_simple.data.processors import stock_processor
from vit_simple.files import UserError
from vit_simple.sharing.verify import check, fresh_outputs, local_outputs, refuse_secrets


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: (folder / "modeling_vit_simple.py").unlink(), "has no modeling_vit_simple.py"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "pos_embed is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "expected a complete safetensors file"),
        (lambda folder: edit(folder / "config.json", "AutoModelForIm", "AutoIm"), "auto_map"),
        (lambda folder: edit(folder / "config.json", '"0": "0"', '"0": "LABEL_0"'), "has no class names"),
        (lambda folder: edit(folder / "config.json", '": 64', '": 32'), "instead of"),
        (lambda folder: edit(folder / "config.json", '"patch_size": 2', '"patch_size": 3'), "a multiple of patch_size"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected JSON"),
    ],
)
def test_check_refuses_a_folder_that_is_damaged_or_incomplete(folder, change, reason):
    change(folder)
    with pytest.raises(UserError, match=reason):
        check(folder)


def test_changed_code_is_reported_and_must_compute_the_same(folder):
    code = folder / "modeling_vit_simple.py"
    code.write_text(code.read_text() + "\n# another comment\n")
    _, warnings = check(folder)
    assert warnings == ["modeling_vit_simple.py differs from the installed one; the checkpoint keeps its own"]
    code.write_text(code.read_text() + "\nnn.Linear.forward = lambda self, x: 0 * x @ self.weight.T\n")
    with pytest.raises(UserError, match="its code and the installed package compute different logits, scores"):
        local_outputs(folder)


def test_fresh_outputs_raises_the_error_of_a_checkpoint_that_does_not_load(folder):
    (folder / "modeling_vit_simple.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"does not load in a fresh process: .*no_such_module"):
        fresh_outputs(str(folder))


def test_backbone_without_head_is_checked_by_its_features(tmp_path):
    ViTSimpleModel(tiny().config).save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", stock_processor((16, 16)))
    assert check(tmp_path)[1] == []
    assert fresh_outputs(str(tmp_path))["pooler_output"].shape == (2, 32)


@pytest.mark.parametrize(
    "text, is_secret",
    [
        ("hf_" + "a1B2" * 8, True),
        ("github_pat_" + "a1" * 20, True),
        ("sk-" + "aB3" * 10, True),
        ("https://me:word@host/data", True),
        ("-----BEGIN RSA PRIVATE KEY-----", True),
        ("my-own-secret-value", True),
        (TOKEN, True),
        ("https://host:8080/sk-learn-digits-small-patch4-run2", False),
        ("ViTImageProcessor", False),
    ],
)
def test_secrets_are_refused_and_other_text_is_not(monkeypatch, text, is_secret):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_API_KEY", "my-own-secret-value")
    monkeypatch.setenv("TOKENIZER_NAME", "ViTImageProcessor")
    error = pytest.raises(UserError, match=r"README\.md contains") if is_secret else contextlib.nullcontext()
    with error:
        refuse_secrets({"README.md": f"A card with {text} in it.".encode()})
