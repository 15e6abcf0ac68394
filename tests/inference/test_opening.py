"""A checkpoint opens only if all that decides its predictions is known."""

import json

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.conftest import tiny
from vit_simple.data.processors import stock_processor
from vit_simple.files import RunError, UserError
from vit_simple.inference.opening import open_model, open_record
from vit_simple.training.lora import add_lora, save_adapter
from vit_simple.training.report import is_calibrated


def test_offline_a_record_that_is_not_cached_is_an_error_unless_it_is_known_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--user--pets"
    for folder in ("refs", "snapshots/abc", ".no_exist/abc"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    with pytest.raises(RunError, match=r"provenance\.json of user/pets, .* is not in the cache: try again"):
        open_record("user/pets", {})
    assert not is_calibrated("user/pets")  # an advice goes on without it
    (cache / ".no_exist/abc/provenance.json").touch()
    assert open_record("user/pets", {}) == {}
    (cache / "snapshots/def").mkdir()
    (cache / "snapshots/def/provenance.json").write_text('{"keep_score": 0.5}')
    (cache / "refs/main").write_text("def")
    assert open_record("user/pets", {}) == {"keep_score": 0.5}


def test_adapter_is_refused_with_a_way_out(tmp_path):
    model = tiny()
    add_lora(model, 2)
    save_adapter(model, model.state_dict(), "base", tmp_path / "adapter")
    with pytest.raises(UserError, match="got an adapter of PEFT in"):
        open_model(tmp_path / "adapter")


def test_checkpoint_without_some_weights_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor((16, 16))))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blocks.1.attn.qkv.weight"], weights["norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks 2 weights, such as blocks\.1\.attn\.qkv\.weight"):
        open_model(tmp_path)
