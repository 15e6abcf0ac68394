"""The life of a small model, as `python -m tests.environments` runs it in each environment.

Not collected with the other tests, which prove more, in one environment.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoImageProcessor, Trainer, TrainingArguments, pipeline

from tests.conftest import DIGITS, run_python
from tests.fake_hub.hub import Fault, Hub
from vit_simple import ViTSimpleForImageClassification
from vit_simple.convert_checkpoint import convert
from vit_simple.data.augment import Augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.files import ROOT, read_metrics
from vit_simple.inference.compiling import compile_inference
from vit_simple.train import main

MODEL = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48, patch_size: 4"
OPEN = """
import json, sys
sys.modules["vit_simple"] = None  # cannot be imported
from transformers import pipeline

image, *folders = sys.argv[1:]
for folder in folders:
    scores = pipeline("image-classification", model=folder, top_k=10, trust_remote_code=True)(image)
    print("SCORES", json.dumps({row["label"]: row["score"] for row in scores}))
"""

ASK = """
from huggingface_hub import HfApi
from vit_simple.sharing.network import with_retries

print("NAME", with_retries("checking the login", HfApi().whoami)["name"])
"""


def train_two_steps(folder: Path, *options, image_size: int = 8):
    model = f"{MODEL}, image_size: {image_size}}}"
    main(["--output_dir", str(folder), "--model", model, "--max_steps", "2", "--logging_steps", "1", *options])
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def run_of_digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "digits"
    train_two_steps(folder, "--dataset_name", DIGITS, "--save_steps", "1", "--max_eval_samples", "64")
    return folder


@pytest.fixture(scope="module")
def saved_by_trainer(run_of_digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    processor = AutoImageProcessor.from_pretrained(run_of_digits)
    model = ViTSimpleForImageClassification.from_pretrained(run_of_digits, problem_type="single_label_classification")
    rows = load_dataset(DIGITS, split="train").select(range(32))
    arguments = TrainingArguments(
        str(folder / "state"), max_steps=2, per_device_train_batch_size=8, report_to=[], remove_unused_columns=False
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.with_transform(mark_for_augmentation),
        eval_dataset=rows,
        data_collator=TrainerCollator(processor, Augment(processor, 10, mixup_alpha=0.2)),
    )
    assert math.isfinite(trainer.train().training_loss) and math.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(folder / "model"))
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("image") / "gray.png"
    PIL.Image.effect_noise((21, 34), 60).save(path)
    return str(path)


def test_torchvision_can_be_imported_where_it_is_installed():
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("torchvision")


def test_images_of_several_sizes_train(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(24):
        size = (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3)
        folder = tmp_path / "images/train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    options = ["--dataset_name", str(tmp_path / "images"), "--per_device_train_batch_size", "8"]
    train_two_steps(tmp_path / "cropped", *options, "--train_val_split", "0.25", image_size=32)
    train_two_steps(tmp_path / "whole", *options, "--random_resized_crop", "0", image_size=32)


def test_resumed_run_ends_with_the_same_weights(run_of_digits):
    weights = (run_of_digits / "model.safetensors").read_bytes()
    checkpoint = ["--resume_from_checkpoint", str(run_of_digits / "checkpoints/step_000001")]
    options = ["--dataset_name", DIGITS, "--save_steps", "1", "--max_eval_samples", "64"]
    train_two_steps(run_of_digits, *options, *checkpoint)
    assert (run_of_digits / "model.safetensors").read_bytes() == weights


def test_eval_only_prints_the_score_of_the_run(run_of_digits, capsys):
    options = ["--dataset_name", DIGITS, "--max_eval_samples", "64"]
    main(["--eval_only", "--model_name_or_path", str(run_of_digits), *options])
    test = read_metrics(run_of_digits)[-1]
    assert test["split"] == "test"
    assert f"{test['correct']} of 64 correct" in capsys.readouterr().out


def test_pipeline_opens_checkpoints_without_the_package(run_of_digits, saved_by_trainer, image, tmp_path, monkeypatch):
    folders = [str(run_of_digits), str(saved_by_trainer)]
    monkeypatch.delenv("PYTHONPATH")
    printed = run_python(sys.executable, tmp_path / "elsewhere", OPEN, image, *folders)
    lines = [line.removeprefix("SCORES ") for line in printed.splitlines() if line.startswith("SCORES ")]
    for folder, line in zip(folders, lines, strict=True):
        here = {row["label"]: row["score"] for row in pipeline("image-classification", folder, top_k=10)(image)}
        assert json.loads(line) == pytest.approx(here, abs=1e-6)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_converted_checkpoint_comes_back_the_same(library, tmp_path, run_of_digits):
    convert(str(run_of_digits), tmp_path / "theirs", to=library)
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(folder / "model.safetensors") for folder in (run_of_digits, tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    image = PIL.Image.effect_noise((30, 20), 60)
    folders = (run_of_digits, tmp_path / "ours")
    one, other = (AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt") for folder in folders)
    assert torch.equal(one.pixel_values, other.pixel_values)


def call(hub: Hub, work: Path, *command) -> str:
    """Runs a command of Python in a fresh process that knows no Hub but this one; returns what it printed."""
    variables = {**hub.environment(work / "home", "hf_good"), "PYTHONPATH": os.environ["PYTHONPATH"]}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hub_is_asked_again_after_a_connection_is_cut(tmp_path):
    with Hub({"hf_good": "user"}) as hub:
        hub.faults.append(Fault(cut="request"))
        assert "NAME user" in call(hub, tmp_path, "-c", ASK)
        assert not hub.faults or hub.faults[0].times == 0


def test_compiled_model_gives_the_same_logits(run_of_digits, tmp_path):
    model = ViTSimpleForImageClassification.from_pretrained(run_of_digits).eval()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fast = compile_inference(model, tmp_path / "model.pt2")
    with torch.no_grad():
        torch.testing.assert_close(fast(pixels).logits, model(pixels).logits)


def test_pushed_checkpoint_is_on_the_hub(run_of_digits, tmp_path):
    with Hub({"hf_good": "user"}) as hub:
        call(hub, tmp_path, ROOT / "push_to_hub.py", run_of_digits, "user/digits", "--license", "mit")
        assert "model.safetensors" in hub.repos["models/user/digits"].at("main").files
