"""recipes/cifar10.yaml on a CPU, shortened, beside the recipe of transformers' example: accuracy after the same images.

    python -m benchmarks.cifar10 --dataset_name uoft-cs/cifar10

Both train the recipe's network in float32 for two epochs of the same 5,000 images, 25 in a batch, by train.py, and are
tested on the same 1,000 test images. The recipe keeps its network, optimizers, rates, padded crop and flip; off is what
only long training needs (RandAugment, mixing, smoothing, drop path), and its average is shorter. The example has AdamW
without decay or warm-up, a linear schedule, RandomResizedCrop and flip, and the rate 3e-4, which was not tuned.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import RESULTS, machine, told, write_report

ROOT = Path(__file__).parent.parent
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
SIDES = {
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


def correct(side: str, dataset_name: str, seed: int) -> int:
    """Test images that a run gets right."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**SIDES[side], "dataset_name": dataset_name, "seed": seed, "output_dir": f"{folder}/{side}"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "recipes/cifar10.yaml"), *words]
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
    report = {**machine(), "options": SIDES, "correct": {side: {} for side in SIDES}}
    print(told(report))
    for seed in arguments.seeds:
        for side in SIDES:
            report["correct"][side][seed] = correct(side, arguments.dataset_name, seed)
            print(f"  seed {seed}, {side}: {report['correct'][side][seed]} of 1,000 right", flush=True)
    for side, found in report["correct"].items():
        print(f"{side}: {statistics.mean(found.values()):.1f} of 1,000 right on average")
    write_report(report, RESULTS / "cifar10.json")


if __name__ == "__main__":
    main()
