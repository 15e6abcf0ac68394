"""Ways to adapt pretrained weights to a few images of each class: accuracy on the test split, and seconds.

python -m benchmarks.fine_tune CHECKPOINT DATASET --images_per_class 10 100 1000 --seeds 3
python -m benchmarks.fine_tune CHECKPOINT DATASET --images_per_class 20 --grid --output grid

CHECKPOINT is anything that convert_checkpoint.py opens. Seconds are those of the whole command; k-NN and logistic
regression share one. All methods use images of --image_size. The model from scratch has as many epochs as full
fine-tuning. --jobs 2 runs two commands at a time, each on half of the cores. benchmarks/results gets every run as JSON,
and the table; the same command continues where it was stopped. transformers' example needs torchvision.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from benchmarks.measure import RESULTS, describe, machine, write_report
from vit_simple import ViTSimpleForImageClassification
from vit_simple.conversion.processors import fit_processor
from vit_simple.files import ROOT, read_metrics
from vit_simple.training.defaults import fine_tuning_options

METHODS = {  # name: options of train.py
    "frozen head": "--freeze_backbone true",
    "LoRA": "--lora_rank 8",
    "full fine-tuning": "",
}
PROBES = ("k-NN, k = 20", "logistic regression")  # one command
EXAMPLE, SCRATCH = "transformers' example at its defaults", "from scratch"
TRAINER = "Trainer, by examples/fine_tune_trainer.py"
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


def given(options: argparse.Namespace, data: Path, seed: int) -> list:
    """The options of train.py and probe.py that say which images they use."""
    return ["--dataset_name", data, "--image_size", options.image_size, "--seed", seed]


def call(*command, **variables: str) -> tuple[str, float]:
    """What a command prints, and its seconds; `variables` are added to its environment."""
    command, environment = [sys.executable, *map(str, command)], os.environ | variables
    start = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout, time.perf_counter() - start


def probe(options: argparse.Namespace, data: Path, seed: int, cache: Path) -> dict[str, tuple[float, float]]:
    """Accuracy and seconds of the classifiers on frozen features, computed without those of an earlier run."""
    said, seconds = call("probe.py", options.checkpoint, *given(options, data, seed), HF_HOME=str(cache))
    found = re.findall(r"^(k-NN, k = 20|logistic regression).*?([\d.]+)% \(95", said, re.MULTILINE)
    return {name: (float(percent) / 100, seconds) for name, percent in found}


def example(options: argparse.Namespace, data: Path, seed: int, folder: Path) -> tuple[float, float]:
    """Accuracy and seconds of transformers' example, which evaluates on no test split: train.py does."""
    call("convert_checkpoint.py", options.checkpoint, folder / "base")
    start = ["--model_name_or_path", folder / "base", "--image_size", options.image_size]
    _, seconds = call(
        *("-m", "benchmarks.example", *start, "--dataset_name", data, "--seed", seed, "--output_dir", folder / "tuned"),
        *([] if options.epochs is None else ["--num_train_epochs", options.epochs]),
    )
    said, _ = call("train.py", "--eval_only", "--model_name_or_path", folder / "tuned", "--dataset_name", data)
    correct, count = re.search(r"^ *test .* (\d+) of (\d+) correct", said, re.MULTILINE).groups()
    return int(correct) / int(count), seconds


def trainer(options: argparse.Namespace, data: Path, seed: int, folder: Path) -> tuple[float, float]:
    """Accuracy and seconds of the program with transformers' Trainer, which takes the size of its checkpoint."""
    base = folder / "base"
    call("convert_checkpoint.py", options.checkpoint, base)
    model = ViTSimpleForImageClassification.from_pretrained(base, image_size=options.image_size)
    model.save_pretrained(base)
    content = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(fit_processor(content, model.config, [])))
    start = ["--model", base, "--dataset", data, "--seed", seed, "--output_dir", folder / "tuned"]
    length = [] if options.epochs is None else ["--epochs", options.epochs]
    said, seconds = call("examples/fine_tune_trainer.py", *start, *length)
    return float(re.findall(r"'eval_accuracy': '?([\d.]+)", said)[-1]), seconds


def train(options: argparse.Namespace, data: Path, seed: int, folder: Path, method: str) -> tuple[float, float]:
    """Accuracy and seconds of train.py."""
    start = ["--model_name_or_path", options.checkpoint, "--probe", "false"]
    length = [] if options.epochs is None else ["--num_train_epochs", options.epochs]
    if method == SCRATCH:
        epochs = fine_tuning_options(len(load_dataset(str(data), split="train")), 384)["num_train_epochs"]
        start, length = ["--variant", options.variant], length or ["--num_train_epochs", epochs]
    own = (METHODS | GRID).get(method, "").split()
    _, seconds = call("train.py", *start, *given(options, data, seed), *own, *length, "--output_dir", folder)
    return read_metrics(folder)[-1]["top1"], seconds


def measure(options: argparse.Namespace, data: Path, seed: int, method: str) -> dict[str, tuple[float, float]]:
    """Accuracy and seconds of a method, and of both classifiers for one of them."""
    with tempfile.TemporaryDirectory() as folder:
        if method in PROBES:
            return probe(options, data, seed, Path(folder))
        run = {EXAMPLE: example, TRAINER: trainer}.get(method, partial(train, method=method))
        return {method: run(options, data, seed, Path(folder))}


def table(runs: list[dict], with_seconds: bool) -> str:
    """The mean accuracy and its standard deviation over the seeds of each method, and perhaps the mean seconds."""
    sizes, names = (list(dict.fromkeys(run[key] for run in runs)) for key in ("images_per_class", "method"))
    lines = [["method", *(f"{size} images per class" for size in sizes)], ["---"] * (len(sizes) + 1)]
    for name in names:
        lines.append([name])
        for size in sizes:
            some = [run for run in runs if (run["images_per_class"], run["method"]) == (size, name)]
            scores = [run["accuracy"] for run in some]
            spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            seconds = f", {statistics.mean(run['seconds'] for run in some):.0f} s" if with_seconds else ""
            lines[-1].append(f"{100 * statistics.mean(scores):.1f}%{spread}{seconds}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("dataset", help="with the columns image and label, and the splits train and test")
    parser.add_argument("--image_size", type=int, default=98)
    parser.add_argument("--variant", default="S/14", help="of the model from scratch")
    parser.add_argument("--images_per_class", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--test_images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every method, for a quick try (default: what each chooses)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of every training")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--grid", action="store_true", help="the defaults of train.py, 12 other choices, and Trainer")
    parser.add_argument("--output", default="fine_tune", help="name of the files in benchmarks/results")
    options = parser.parse_args()
    if Path(options.checkpoint).exists():
        options.checkpoint = str(Path(options.checkpoint).resolve())
    os.environ["ACCELERATE_MIXED_PRECISION"] = options.mixed_precision
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    dataset, runs = load_dataset(options.dataset), []
    settings = {name: value for name, value in vars(options).items() if name not in ("checkpoint", "dataset", "output")}
    names = {name: Path(getattr(options, name)).name for name in ("checkpoint", "dataset")}
    report, path = {**machine(), **names, "options": settings, "runs": runs}, RESULTS / f"{options.output}.json"
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if {**earlier, "runs": runs} != report:
            parser.error(f"{path} has other options, versions or another machine: use another --output")
        runs += earlier["runs"]
    done = {(run["images_per_class"], run["seed"], run["method"]) for run in runs}
    methods = [TRAINER, "default", *GRID] if options.grid else [PROBES[0], EXAMPLE, *METHODS, SCRATCH]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        tasks = {}
        for key in itertools.product(options.images_per_class, range(options.seeds), methods):
            if key not in done:
                per_class, seed, method = key
                data = Path(work) / f"{per_class}-{seed}"
                if not data.exists():
                    data.mkdir()
                    write_subset(dataset, data, per_class, options.test_images, seed)
                tasks[pool.submit(measure, options, data, seed, method)] = per_class, seed
        try:
            for task in as_completed(tasks):
                per_class, seed = tasks[task]
                for name, (accuracy, seconds) in task.result().items():
                    facts = {"images_per_class": per_class, "method": name, "seed": seed, "accuracy": accuracy}
                    runs.append(facts | {"seconds": round(seconds, 1)})
                write_report(report, path)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    lines = table(runs, with_seconds=not options.grid)
    path.with_suffix(".md").write_text(f"{describe(report)}\n\n{lines}", encoding="utf-8")
    print(lines)


if __name__ == "__main__":
    main()
