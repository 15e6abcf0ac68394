"""The programs of examples/ adapt a checkpoint to other classes; chance is 0.5, and a weak start keeps scores low."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from tests.conftest import environment_without_package, photographs
from tests.javascript import node_modules
from vit_simple.data.processors import stock_processor
from vit_simple.files import ROOT

NAMES = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}


@pytest.fixture(scope="module")
def parity(tmp_path_factory) -> Path:
    """A dataset of digits that are even or odd."""
    folder = tmp_path_factory.mktemp("parity")
    for split, rows in load_dataset(str(ROOT / "data/digits")).items():
        labels = [label % 2 for label in rows["label"]]
        rows = (
            rows.remove_columns("label")
            .add_column("label", labels)
            .cast_column("label", ClassLabel(names=["even", "odd"]))
        )
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    return environment_without_package(tmp_path_factory.mktemp("environment") / "venv")


def run(python, name: str, folder: Path, *options) -> str:
    command = [python, ROOT / f"examples/{name}.py", *options]
    caches = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    result = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, **caches}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@torch.no_grad()
def accuracy(model, processor, dataset: Path) -> float:
    rows = load_dataset(str(dataset), split="test")
    logits = model.eval()(processor(list(rows["image"]), return_tensors="pt").pixel_values).logits
    return (logits.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


def test_linear_probe_trains_the_head_alone_without_the_package(run_folder, parity, elsewhere, tmp_path):
    said = run(elsewhere, "linear_probe", tmp_path, "--model", run_folder, "--dataset", parity)
    correct, count = map(int, re.search(r"(\d+) of (\d+) test images correct", said).groups())
    folder = tmp_path / "outputs/probe"
    model, processor = load(folder)
    assert model.config.id2label == NAMES["id2label"]
    assert correct / count > 0.65  # ten seeds: 0.78 to 0.85
    assert accuracy(model, processor, parity) == pytest.approx(correct / count, abs=1 / count)
    before, after = load_file(run_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"head.weight", "head.bias"}


def test_lora_adapter_loads_and_merges_without_the_package(run_folder, parity, elsewhere, tmp_path):
    run(elsewhere, "fine_tune_lora", tmp_path, "--model", run_folder, "--dataset", parity, "--epochs", "4")
    merged, processor = load(tmp_path / "outputs/lora")
    assert accuracy(merged, processor, parity) > 0.65  # ten seeds: 0.89 to 0.92
    base = AutoModelForImageClassification.from_pretrained(run_folder, **NAMES)
    adapted = PeftModel.from_pretrained(base, tmp_path / "outputs/lora/adapter")
    pixel_values = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(pixel_values).logits, merged(pixel_values).logits, rtol=0, atol=1e-4)


def test_trainer_example_saves_a_checkpoint_that_loads_in_one_line(run_folder, parity, tmp_path):
    options = ["--model", run_folder, "--dataset", parity, "--epochs", "12"]
    run(sys.executable, "fine_tune_trainer", tmp_path, *options)
    model, processor = load(tmp_path / "outputs/fine-tuned")
    assert model.config.id2label == NAMES["id2label"]
    assert accuracy(model, processor, parity) > 0.7  # three seeds: 0.87 to 0.91
    assert (tmp_path / "outputs/fine-tuned/modeling_vit_simple.py").exists()


def test_extracted_maps_and_vectors_are_those_of_the_images(run_folder, elsewhere, tmp_path):
    options = ["--model", run_folder, "--dataset", ROOT / "data/digits", "--count", "5"]
    run(elsewhere, "extract_features", tmp_path, *options)
    found = load_file(tmp_path / "outputs/features.safetensors")
    assert found["vectors"].shape == (5, 64) and found["maps"].shape == (5, 64, 4, 4)
    model, processor = load(run_folder)
    images = load_dataset(str(ROOT / "data/digits"), split="test")[:5]["image"]
    with torch.no_grad():
        logits = model.eval()(processor(images, return_tensors="pt").pixel_values).logits
        torch.testing.assert_close(model.head(found["vectors"]), logits, rtol=0, atol=1e-5)


def scores_of(folder: Path, files: list[str]) -> list[tuple[str, float]]:
    answers = [pipeline("image-classification", model=str(folder))(file)[0] for file in files]
    return [(answer["label"], answer["score"]) for answer in answers]


def printed_scores(printed: str) -> list[tuple[str, float]]:
    return [(label, float(score)) for label, score in re.findall(r": (\S+) ([\d.]+)$", printed, re.MULTILINE)]


def assert_scores(found: list, expected: list):
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "problem_type"),
    [({}, None), (stock_processor((8, 8), 12, resample=3), None), ({}, "multi_label_classification")],
)
def test_onnx_predict_gives_the_scores_of_the_pipeline_without_torch(exported, tmp_path, content, problem_type):
    folder, files = Path(shutil.copytree(exported, tmp_path / "digits")), photographs(tmp_path)
    old = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(content or old))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem_type}))
    code = "import runpy, sys; sys.modules |= {'torch': None, 'transformers': None}; runpy.run_path(sys.argv.pop(1), "
    command = [sys.executable, "-c", f"{code}run_name='__main__')", ROOT / "examples/onnx_predict.py", folder, *files]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_scores(printed_scores(result.stdout), scores_of(folder, files))


LOGITS = [2.0, -1.0, 0.5]
OUTPUTS = [  # logits, problem_type, and what a pipeline makes of them
    (LOGITS, "regression", LOGITS),
    (LOGITS, "multi_label_classification", torch.tensor(LOGITS).sigmoid().tolist()),
    (LOGITS, None, torch.tensor(LOGITS).softmax(-1).tolist()),
    ([2.0], None, [torch.tensor(2.0).sigmoid().item()]),
]


def test_onnx_predict_follows_the_problem_type():
    probabilities = runpy.run_path(str(ROOT / "examples/onnx_predict.py"))["probabilities"]
    for logits, problem_type, expected in OUTPUTS:
        assert probabilities(np.array(logits), problem_type).tolist() == pytest.approx(expected)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node: apt-get install nodejs")
def test_page_and_node_example_follow_the_problem_type():
    calls = ", ".join(f"probabilities({json.dumps(logits)}, {json.dumps(kind)})" for logits, kind, _ in OUTPUTS)
    code = f"import {{ probabilities }} from './resize.js'; console.log(JSON.stringify([{calls}]))"
    command = ["node", "--input-type=module", "-e", code]
    printed = subprocess.run(command, cwd=ROOT / "sharing/page", capture_output=True, text=True, check=True).stdout
    for found, (_, _, expected) in zip(json.loads(printed), OUTPUTS, strict=True):
        assert found == pytest.approx(expected)


def test_onnx_predict_ends_with_one_line_without_usable_images(exported):
    assert_usage_error([exported], "arguments are required: images")
    assert_usage_error([exported, "absent.png"], "No such file")


def test_onnx_predict_says_that_a_model_has_no_head(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "digits"))
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "onnx/model.onnx")
    model.graph.output[0].name = "last_hidden_state"
    for node in model.graph.node:
        node.output[:] = ["last_hidden_state" if name == "logits" else name for name in node.output]
    onnx.save(model, folder / "onnx/model.onnx")
    assert_usage_error([folder, *photographs(tmp_path)], "has no head")


def assert_usage_error(arguments, message):
    command = [sys.executable, ROOT / "examples/onnx_predict.py", *arguments]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("field", [{"do_pad": True}, {"do_normalize": False}])
@pytest.mark.parametrize("program", ["onnx_predict.py", "node_predict.mjs"])
def test_predict_examples_refuse_steps_that_they_do_not_follow(exported, tmp_path, program, field):
    folder = Path(shutil.copytree(exported, tmp_path / "digits"))
    command = [sys.executable, ROOT / "examples" / program]
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(content | field))
    if program == "node_predict.mjs":
        copy_node_example(tmp_path)
        command = ["node", tmp_path / "examples" / program]
    arguments = [*map(str, [*command, folder, photographs(tmp_path)[0]])]
    result = subprocess.run(arguments, capture_output=True, text=True)
    refusal = "this program resizes, rescales and normalizes, and does not pad; use the image processor"
    assert result.returncode and result.stderr.splitlines() == [refusal]


def copy_node_example(folder: Path):
    for name in ("examples/node_predict.mjs", "sharing/page/resize.js", "sharing/page/package.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "node_modules").symlink_to(node_modules())


def test_node_predict_gives_the_score_of_the_pipeline(exported, tmp_path):
    copy_node_example(tmp_path)
    file = str(tmp_path / "image.png")
    PIL.Image.open(photographs(tmp_path)[3]).save(file)
    command = ["node", tmp_path / "examples/node_predict.mjs", exported, file]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_scores(printed_scores(result.stdout), scores_of(exported, [file]))
