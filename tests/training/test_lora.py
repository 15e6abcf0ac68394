"""--lora_rank: what is trained and saved, and that a run with it resumes exactly."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.conftest import DIGITS
from vit_simple.conversion.convert import Checkpoint
from vit_simple.files import ADAPTER, UserError, read_json
from vit_simple.sharing.upload import push
from vit_simple.train import main
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.lora import check_lora

START = ["--dataset_name", "images", "--model_name_or_path", "base"]
LORA = [*START, "--lora_rank", "4"]


@pytest.fixture(scope="module")
def parity(tmp_path_factory) -> Path:
    """A few digits that are even or odd."""
    folder = tmp_path_factory.mktemp("parity")
    for split, count in (("train", 200), ("test", 50)):
        rows = load_dataset(DIGITS, split=split).select(range(count))
        labels = [label % 2 for label in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", labels)
        rows.cast_column("label", ClassLabel(names=["even", "odd"])).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def train(run_folder, parity, tmp_path_factory):
    """Trains with LoRA from the checkpoint of another number of classes; returns the run's folder."""

    def run(name: str, *options) -> Path:
        folder = tmp_path_factory.mktemp("lora") / name
        start = ["--model_name_or_path", run_folder, "--dataset_name", parity, "--lora_rank", 4, "--ema_decay", 0.8]
        length = ["--max_steps", 24, "--save_steps", 10, "--image_size", 10, "--output_dir", folder]
        main([*map(str, [*start, *length, "--probe", "false", *options])])
        return folder

    return run


@pytest.fixture(scope="module")
def merged(train) -> Path:
    return train("merged")


@pytest.mark.slow
def test_merged_checkpoint_loads_in_one_line_and_keeps_what_lora_does_not_adapt(merged, run_folder):
    model = AutoModelForImageClassification.from_pretrained(merged)
    assert model.config.id2label == {0: "even", 1: "odd"}
    before, after = load_file(run_folder / "model.safetensors"), load_file(merged / "model.safetensors")
    assert after.keys() == before.keys() == dict(model.named_parameters()).keys()
    trained = {name for name in after if re.search(r"attn\.(qkv|proj)\.weight|head", name)}
    rest = after.keys() - trained - {"pos_embed"}  # which is resampled
    assert all(torch.equal(after[name], before[name]) for name in rest)
    update = after["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 4
    assert read_json(merged / "provenance.json")["method"].startswith("LoRA of rank 4")
    assert "method: LoRA of rank 4" in (merged / "README.md").read_text()


@pytest.mark.slow
def test_code_in_the_card_of_an_adapter_gives_the_merged_model(train, merged, monkeypatch):
    """Also, that gradient checkpointing reaches the additions, although the embeddings are frozen."""
    adapter = train("adapter", "--lora_save", "adapter", "--gradient_checkpointing")
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= {p.name for p in adapter.iterdir()}
    assert not (adapter / "model.safetensors").exists() and (adapter / "positions.png").exists()
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)[1]
    base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    monkeypatch.chdir(adapter.parent)  # the card names the last parts of both paths
    Path(Path(base).name).symlink_to(base)
    found = {}
    exec(code, found)
    pixels = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    whole = AutoModelForImageClassification.from_pretrained(merged).eval()
    torch.testing.assert_close(found["model"].eval()(pixels).logits, whole(pixels).logits, rtol=0, atol=1e-5)
    assert found["model"].config.id2label == whole.config.id2label
    with pytest.raises(SystemExit, match="got an adapter of PEFT"):
        main(["--eval_only", "--model_name_or_path", str(adapter), "--dataset_name", DIGITS])
    with pytest.raises(UserError, match="got an adapter of PEFT"):
        push(adapter, "user/name", license="mit")


@pytest.mark.slow
def test_result_of_the_other_kind_does_not_stay_in_the_folder(train, merged):
    folder = shutil.copytree(merged, merged.parent / "both")
    start = ["--output_dir", folder, "--resume_from_checkpoint", folder / "checkpoints/step_000020"]
    for kind in ("adapter", "merged"):
        train("unused", *start, "--lora_save", kind)
        assert (folder / "model.safetensors").exists() == (kind == "merged")
        assert all((folder / name).exists() == (kind == "adapter") for name in ADAPTER)


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_bits(train, merged):
    folder = merged.parent / "resumed"
    shutil.copytree(merged, folder)
    (folder / "model.safetensors").unlink()
    train("unused", "--output_dir", folder, "--resume_from_checkpoint", folder / "checkpoints/step_000010")
    assert (folder / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--lora_rank", "4", "--dataset_name", "images"], "needs --model_name_or_path"),
        ([*LORA, "--freeze_backbone"], "--freeze_backbone"),
        ([*LORA, "--optim", "muon"], "--optim muon"),
        ([*START, "--lora_save", "adapter"], "needs --lora_rank"),
        ([*LORA, "--lora_save", "adapter", "--push_to_hub", "--hub_model_id", "user/name"], "--push_to_hub"),
    ],
)
def test_options_that_lora_cannot_be_combined_with_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        parse_config(options)


def test_checkpoint_or_environment_that_lora_cannot_use_is_refused(run_folder, monkeypatch):
    config = TrainConfig(model_name_or_path="base", lora_rank=4, lora_save="adapter")
    base = Checkpoint(AutoModelForImageClassification.from_pretrained(run_folder).config, {}, {}, {}, [], "timm vit")
    with pytest.raises(UserError, match="to which PEFT can add it, got timm vit"):
        check_lora(config, base)
    with pytest.raises(UserError, match="at most 64"):
        check_lora(TrainConfig(model_name_or_path="base", lora_rank=65), base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install peft"):
        check_lora(config, base)
