"""Accuracy of recipes/cifar10.yaml, shortened for a CPU, and of the hyper-parameters of transformers' example.

    python -m benchmarks.cifar10 --dataset_name uoft-cs/cifar10

Both train the recipe's model with train.py in float32 for two epochs of the same 5,000 images, in batches of 25, and
are tested on the same 1,000 images. The recipe keeps its optimizers, learning rates, padded crop and flip. RandAugment,
CutMix and label smoothing, which only long training needs, are off, and the weights are averaged. The example uses
AdamW without weight decay or warmup, a linear schedule, RandomResizedCrop, flip, and the learning rate 3e-4, which was
not tuned.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import RESULTS, describe, machine, write_report
from vit_simple.files import ROOT

SHORT = {
    "max_train_samples": 5000,
    "max_eval_samples": 1000,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 25,
    "eval_steps": 1_000_000,
    "mixed_precision": "no",
    "torch_compile": "false",
    "randaugment_num_ops": 0,
    "mixup_alpha": 0,
    "cutmix_alpha": 0,
    "label_smoothing_factor": 0,
    "drop_path_rate": 0,
    "ema_decay": 0.98,
}
RUNS = {
    "recipe": SHORT,
    "example": {
        **SHORT,
        "optim": "adamw",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "ema_decay": 0,
        "crop_padding": 0,
        "random_resized_crop": 0.08,
        "crop_pct": 1.0,
    },
}


def train(run: str, dataset_name: str, seed: int) -> int:
    """Trains; returns the number of correct test images."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**RUNS[run], "dataset_name": dataset_name, "seed": seed, "output_dir": f"{folder}/{run}"}
        arguments = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "recipes/cifar10.yaml"), *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = Path(options["output_dir"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    result = json.loads(lines[-1])
    assert result["split"] == "test" and result["count"] == SHORT["max_eval_samples"], result
    return result["correct"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    report = {**machine(), "options": RUNS, "correct": {run: {} for run in RUNS}}
    print(describe(report))
    for seed in arguments.seeds:
        for run in RUNS:
            report["correct"][run][seed] = train(run, arguments.dataset_name, seed)
            print(f"  seed {seed}, {run}: {report['correct'][run][seed]} of 1,000 correct", flush=True)
    for run, counts in report["correct"].items():
        print(f"{run}: {statistics.mean(counts.values()):.1f} of 1,000 correct on average")
    write_report(report, RESULTS / "cifar10.json")


if __name__ == "__main__":
    main()
