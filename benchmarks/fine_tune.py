"""Ways to adapt pretrained weights to a few images of each class: accuracy on the test split, and seconds.

python -m benchmarks.fine_tune CHECKPOINT DATASET --images_per_class 10 100 1000 --seeds 3
python -m benchmarks.fine_tune CHECKPOINT DATASET --images_per_class 20 --grid
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from vit_simple.files import ROOT, read_metrics

HF_EXAMPLE = (  # the defaults of transformers' run_image_classification.py, in this training loop
    "--num_train_epochs 3 --per_device_train_batch_size 8 --learning_rate 5e-5 --layer_decay 1 --weight_decay 0 "
    "--lr_scheduler_type linear --warmup_steps 0 --random_resized_crop 0.08 --horizontal_flip 0.5"
)
METHODS = {  # name: options of train.py
    "frozen head": "--freeze_backbone true",
    "full fine-tuning": "",
    "the defaults of transformers' example": HF_EXAMPLE,
    "from scratch": None,
}
GRID = {
    f"rate {rate}, layer decay {decay}, crop {crop}": f"--learning_rate {rate} --layer_decay {decay} "
    f"--random_resized_crop {crop}"
    for rate, decay, crop in itertools.product((1e-4, 2e-4, 3e-4), (0.65, 0.75), (0.25, 0.6))
}


def write_subset(dataset: DatasetDict, folder: Path, per_class: int, tests: int, seed: int):
    """Some training images of each class, and some test images that are the same for each seed."""
    labels, rng = np.array(dataset["train"]["label"]), np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == name))[:per_class] for name in np.unique(labels)]
    dataset["train"].select(rng.permutation(np.concatenate(rows))).to_parquet(folder / "train-00000-of-00001.parquet")
    some = np.random.default_rng(0).permutation(len(dataset["test"]))[:tests]
    dataset["test"].select(some).to_parquet(folder / "test-00000-of-00001.parquet")


def call(*command) -> tuple[str, float]:
    """What a command prints, and its seconds."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout, time.perf_counter() - start


def measure(options: argparse.Namespace, data: Path, seed: int, work: Path) -> dict[str, tuple[float, float]]:
    """Accuracy and seconds of each method."""
    found, start = {}, ["--model_name_or_path", options.checkpoint]
    given = ["--dataset_name", data, "--image_size", options.image_size, "--seed", seed]
    if not options.grid:
        said, seconds = call("probe.py", options.checkpoint, *given)
        for name, percent in re.findall(r"^(k-NN, k = 20|logistic regression).*?([\d.]+)% \(95", said, re.MULTILINE):
            found[name] = float(percent) / 100, seconds
    for name, text in ({"default": ""} | GRID if options.grid else METHODS).items():
        folder = work / re.sub(r"\W", "_", name)
        scratch = ["--variant", options.variant, "--per_device_train_batch_size", 32]
        chosen = scratch if text is None else [*start, "--probe", "false", *text.split()]
        _, seconds = call("train.py", *given, *chosen, "--output_dir", folder)
        found[name] = read_metrics(folder)[-1]["top1"], seconds
        print(f"{name}, seed {seed}: {found[name][0]:.1%}, {seconds:.0f} s", file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("dataset", help="with the columns image and label, and the splits train and test")
    parser.add_argument("--image_size", type=int, default=98)
    parser.add_argument("--variant", default="S/14", help="of the model from scratch")
    parser.add_argument("--images_per_class", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--test_images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", action="store_true", help="the defaults of train.py beside 12 other choices")
    options = parser.parse_args()
    options.checkpoint = (
        str(Path(options.checkpoint).resolve()) if Path(options.checkpoint).exists() else options.checkpoint
    )
    dataset = load_dataset(options.dataset)
    print("| images per class | method | accuracy | seconds |\n|---|---|---|---|")
    for per_class in options.images_per_class:
        runs = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as work:
                data = Path(work) / "data"
                data.mkdir()
                write_subset(dataset, data, per_class, options.test_images, seed)
                runs.append(measure(options, data, seed, Path(work)))
        for name in runs[0]:
            scores, seconds = zip(*(run[name] for run in runs))
            spread = f" ± {statistics.stdev(scores):.1%}" if len(scores) > 1 else ""
            print(f"| {per_class} | {name} | {statistics.mean(scores):.1%}{spread} | {statistics.mean(seconds):.0f} |")


if __name__ == "__main__":
    main()
