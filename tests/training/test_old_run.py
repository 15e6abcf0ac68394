"""A run of an earlier version still loads, resumes and can be shared. tests/runs/1c3e6cc was written by that commit:

python train.py --dataset_name data/digits --model '{image_size: 8, patch_size: 4, hidden_size: 16, \
num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}' --max_train_samples 64 --max_eval_samples 16 \
--max_steps 4 --save_steps 2 --per_device_train_batch_size 16 --ema_decay 0.9 --horizontal_flip 0 \
--save_total_limit 1 --logging_steps 1 --license apache-2.0 --output_dir 1c3e6cc

The plots are left out. expected_outputs.safetensors has random images and the logits that this commit gave for them.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_python
from vit_simple import ViTSimpleForImageClassification
from vit_simple.files import ROOT, read_metrics
from vit_simple.sharing.record import hardware
from vit_simple.sharing.upload import push
from vit_simple.sharing.verify import check
from vit_simple.train import main

RUN = ROOT / "tests/runs/1c3e6cc"
MADE = json.loads((RUN / "provenance.json").read_text())
# The last bits of a sum depend on the processor, on the instructions that torch uses and on its version.
SAME_BITS = (
    MADE["hardware"] == hardware()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and MADE["versions"]["torch"] == torch.__version__
)


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "run")


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return load_file(RUN / "expected_outputs.safetensors")


def test_old_run_gives_its_logits_with_package_and_remote_code(run, expected, tmp_path):
    code = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
save_file({"logits": model(load_file(sys.argv[1] + "/expected_outputs.safetensors")["pixels"]).logits.detach()}, "out")
"""
    work = tmp_path / "work"
    run_python(sys.executable, work, code, run)
    remote = load_file(work / "out")["logits"]
    with torch.no_grad():
        package = ViTSimpleForImageClassification.from_pretrained(run).eval()(expected["pixels"]).logits
    assert torch.equal(package, remote)
    assert (package - expected["logits"]).abs().max() <= (0.0 if SAME_BITS else 1e-5)


def test_old_run_resumes_to_the_weights_that_the_old_code_reached(run, expected):
    before = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    main([str(run / "train_config.yaml"), "--output_dir", str(run), "--resume_from_checkpoint", "latest"])
    after = load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    if SAME_BITS:
        assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        logits = ViTSimpleForImageClassification.from_pretrained(run).eval()(expected["pixels"]).logits
    assert (logits - expected["logits"]).abs().max() <= (0.0 if SAME_BITS else 1e-4)
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (RUN, run)]
    assert len(losses[0]) == 7 and losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_old_run_passes_the_checks_of_a_push(run):
    files, notes = check(run)
    assert {"config.json", "model.safetensors", "metrics.jsonl", "train_config.yaml"} <= set(files)
    assert all("the checkpoint keeps its own" in note for note in notes)
    push(run, "user/old-run", dry_run=True)  # raises if the package and the run's own code give other outputs
