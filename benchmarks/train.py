"""Time of train.py and of transformers' example for image classification, from launch to the saved model.

    PYTHONPATH=peers python -m benchmarks.train --dataset_name uoft-cs/cifar10 --image_column_name img

Both train the same model on 85 % of the images with the same epochs and batch size, evaluate on the rest after each
epoch and save the model. train.py also tests it and writes a model card. The example decodes every image in each epoch
and crops and resizes it; train.py caches the decoded images and crops padded batches. This is most of the difference,
which grows with the number of epochs. With --bf16 both train in bfloat16, and train.py compiles the model. The runs are
processes, started in turn, after one run of each that is not counted. `benchmarks/example.py` is the example.
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

from benchmarks.measure import RESULTS, describe, machine, spread, write_report
from vit_simple import ViTSimpleConfig
from vit_simple.files import ROOT

HELD_OUT = 0.15  # the example's default
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")


def command(script: str, arguments: argparse.Namespace, folder: str) -> list[str]:
    size = {"image_size": arguments.image_size}
    config = ViTSimpleConfig.from_variant(arguments.variant, **size).to_dict()
    options = {
        "dataset_name": arguments.dataset_name,
        "output_dir": f"{folder}/{script}",
        "num_train_epochs": arguments.num_train_epochs,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "per_device_eval_batch_size": 256,
        "image_column_name": arguments.image_column_name,
        "train_val_split": HELD_OUT,
    }
    if script == "train.py":
        start = [sys.executable, str(ROOT / "train.py")]
        options |= {"variant": arguments.variant, **size, "crop_padding": 4}
        if arguments.bf16:
            options |= {"torch_compile": "true"}
    else:
        start = [sys.executable, "-m", "benchmarks.example"]
        options["config"] = json.dumps({name: config[name] for name in FIELDS})
    return start + [argument for name, value in options.items() for argument in (f"--{name}", str(value))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="with a column 'label', as CIFAR-10")
    parser.add_argument("--image_column_name", default="image")
    parser.add_argument("--variant", default="notebook/8", help="of the model; the default is tiny")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_train_epochs", type=int, default=5)
    parser.add_argument("--per_device_train_batch_size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="train both in bfloat16, and compile in train.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="train", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    options = vars(arguments) | {"dataset_name": Path(arguments.dataset_name).name}
    report = {**machine(), "options": options, "seconds": {"train.py": [], "example": []}}
    print(describe(report))
    images = arguments.num_train_epochs * round((1 - HELD_OUT) * len(load_dataset(arguments.dataset_name)["train"]))
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if arguments.bf16 else "no"}
    for number in range(arguments.rounds + 1):
        for script in list(report["seconds"])[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                before, options = time.perf_counter(), {"cwd": ROOT, "env": os.environ | precision}
                run = subprocess.run(command(script, arguments, folder), **options, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"{script} failed:\n{run.stderr}")
                taken = time.perf_counter() - before
            print(f"  {script}: {taken:.1f} s{'' if number else ', not counted'}", flush=True)
            if number:
                report["seconds"][script].append(taken)
    for script, times in report["seconds"].items():
        ratio = median(report["seconds"]["example"]) / median(times)
        speed = images / median(times)
        print(f"{script:<10} {median(times):7.1f} s (+-{spread(times):.1%}), {speed:,.0f} images/s, {ratio:.2f} times")
    write_report(report, RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
