"""train.py end to end beside transformers' example for image classification: from launch to the saved network.

    PYTHONPATH=peers python -m benchmarks.train --dataset_name uoft-cs/cifar10 --image_column_name img

Both train the same network on 85 % of the images for as many epochs, with batches of one size, evaluate on the rest
after each epoch and save the network; train.py tests it, too, and writes its card. The example opens every image anew
and takes a random resized crop, train.py keeps them decoded and takes padded crops of whole batches: that is most of
the difference, and the more so, the more epochs there are. With --bf16 both multiply in bfloat16, and train.py
compiles. Each run is a process; they take turns, after one of each that is not counted. `benchmarks/example.py` is the
other side.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from datasets import load_dataset

from benchmarks.measure import RESULTS, machine, spread, told, write_report
from vit_simple import ViTSimpleConfig

ROOT = Path(__file__).parent.parent
HELD_OUT = 0.15  # the example's default
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
        "image_column_name": arguments.image_column_name,
        "train_val_split": HELD_OUT,
    }
    if side == "train.py":
        start = [sys.executable, str(ROOT / "train.py")]
        options |= {"variant": arguments.variant, **size, "crop_padding": 4}
        if arguments.bf16:
            options |= {"torch_compile": "true"}
    else:
        start = [sys.executable, "-m", "benchmarks.example"]
        options["config"] = json.dumps({name: config[name] for name in FIELDS})
    given = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return start + [word for pair in given for word in pair]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="with a column 'label', as CIFAR-10")
    parser.add_argument("--image_column_name", default="image")
    parser.add_argument("--variant", default="notebook/8", help="of the network; the default is a tiny one")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_train_epochs", type=int, default=5)
    parser.add_argument("--per_device_train_batch_size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="both in bf16, and train.py compiled, as on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="train", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    options = vars(arguments) | {"dataset_name": Path(arguments.dataset_name).name}
    report = {**machine(), "options": options, "seconds": {"train.py": [], "example": []}}
    print(told(report))
    images = arguments.num_train_epochs * round((1 - HELD_OUT) * len(load_dataset(arguments.dataset_name)["train"]))
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if arguments.bf16 else "no"}
    for number in range(arguments.rounds + 1):
        for side in list(report["seconds"])[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                before = time.perf_counter()
                words, environment = command(side, arguments, folder), os.environ | precision
                run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"{side} failed:\n{run.stderr}")
                taken = time.perf_counter() - before
            print(f"  {side}: {taken:.1f} s{'' if number else ', not counted'}", flush=True)
            if number:
                report["seconds"][side].append(taken)
    for side, times in report["seconds"].items():
        ratio = median(report["seconds"]["example"]) / median(times)
        speed = images / median(times)
        print(f"{side:<10} {median(times):7.1f} s (+-{spread(times):.1%}), {speed:,.0f} images/s, {ratio:.2f} times")
    write_report(report, RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
