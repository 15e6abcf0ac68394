"""train.py end to end beside transformers' example for image classification: from launch to the saved network.

    PYTHONPATH=peers python -m benchmarks.train --dataset_name uoft-cs/cifar10

Both train the same network on the same part of the images for as many epochs, with batches of one size, crop and flip,
evaluate on the other part after each epoch and save the network; train.py tests it, too, and writes its card. Each run
is a process; they take turns. `benchmarks/example.py` is the other side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import load_dataset

from benchmarks.measure import RESULTS, machine, median, spread, told, write_report
from vit_simple import ViTSimpleConfig

ROOT = Path(__file__).parent.parent
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")


def command(side: str, arguments: argparse.Namespace, folder: str) -> list[str]:
    size = {"image_size": arguments.image_size}
    config = ViTSimpleConfig.from_variant(arguments.variant, **size).to_dict()
    options = {
        "dataset_name": arguments.dataset_name,
        "output_dir": f"{folder}/{side.replace(' ', '-')}",
        "num_train_epochs": arguments.num_train_epochs,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "per_device_eval_batch_size": 256,
        "train_val_split": 0.15,
    }
    if side == "train.py":
        start = [sys.executable, str(ROOT / "train.py")]
        options |= {"variant": arguments.variant, **size, "crop_padding": 4}
        if arguments.bf16:
            options |= {"mixed_precision": "bf16", "torch_compile": "true"}
    else:
        start = [sys.executable, "-m", "benchmarks.example"]
        options["config"] = json.dumps({name: config[name] for name in FIELDS})
    given = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return start + [word for pair in given for word in pair]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="with an 'image' and a 'label' column, as CIFAR-10")
    parser.add_argument("--variant", default="notebook/8", help="of the network; the default is a tiny one")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=128)
    parser.add_argument(
        "--bf16", action="store_true", help="train.py in bf16 and compiled, as its recipes are on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="train", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    report = {**machine(), "options": vars(arguments), "seconds": {"train.py": [], "example": []}}
    print(told(report))
    for number in range(arguments.rounds):
        for side in list(report["seconds"])[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                before = time.perf_counter()
                run = subprocess.run(command(side, arguments, folder), cwd=ROOT, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"{side} failed:\n{run.stderr}")
                report["seconds"][side].append(time.perf_counter() - before)
                print(f"  {side}: {report['seconds'][side][-1]:.1f} s", flush=True)
    images = arguments.num_train_epochs * round(0.85 * len(load_dataset(arguments.dataset_name, split="train")))
    for side, times in report["seconds"].items():
        ratio = median(report["seconds"]["example"]) / median(times)
        speed = images / median(times)
        print(f"{side:<10} {median(times):7.1f} s (+-{spread(times):.1%}), {speed:,.0f} images/s, {ratio:.2f} times")
    write_report(report, RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
