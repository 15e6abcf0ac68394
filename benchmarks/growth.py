"""How time and memory grow with tokens, depth, width and batch size, and with the number of cached images.

    python -m benchmarks.growth --small uoft-cs/cifar10

A training step (forward, loss, backward, AdamW) of 4 blocks of width 384 on 2 images of 197 tokens; one of these
numbers grows at a time. Each point is measured in its own process; its memory is the peak minus what the
libraries take. Images: loading a dataset and caching that many images. The plot shows the exponent between the middle
and the last point of each line: 1 is proportional, 2 is quadratic.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import (
    RESULTS,
    describe,
    in_new_process,
    interleave,
    machine,
    reset_peak,
    resident,
    write_report,
)
from benchmarks.model import training_step
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.data.dataloader import LoaderContext, MapStyleSplit
from vit_simple.data.decoding import Decoder
from vit_simple.data.loading import load_image_data
from vit_simple.data.processors import open_processor
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

BASE = {"tokens": 196, "depth": 4, "width": 384, "batch": 2}
POINTS = {
    "tokens": (49, 196, 400, 784, 1600, 4096),
    "depth": (1, 2, 4, 8, 16, 24),
    "width": (192, 384, 768, 1152),
    "batch": (1, 2, 4, 8, 16, 32),
    "images": (3125, 6250, 12500, 25000, 50000),
}


def step(point: dict[str, int], rounds: int):
    """Seconds and peak memory of a step; `tokens` is the number of patches, without the class token."""
    side = 16 * math.isqrt(point["tokens"])
    config = ViTSimpleConfig(
        hidden_size=point["width"],
        num_hidden_layers=point["depth"],
        num_attention_heads=point["width"] // 64,
        intermediate_size=4 * point["width"],
        image_size=side,
        num_labels=10,
        pooling="mean",  # so that the last block computes every token
    )
    reset_peak()
    before = resident("VmRSS")
    model, pixels = ViTSimpleForImageClassification(config), torch.randn(point["batch"], 3, side, side)
    call = training_step(model, pixels, autocast=False, compiled=False)
    times = interleave({"step": call}, rounds, torch.device("cpu"))["step"]
    return {"seconds": median(times), "bytes": resident("VmHWM") - before}


def decode(name: str, count: int):
    """Seconds and peak memory of loading a dataset and caching `count` images."""
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    data = load_image_data(name, validation_fraction=0, max_train_samples=count)
    processor = open_processor(processor_content(TrainConfig(), (32, 32), cropped=False))
    images = MapStyleSplit(data, "train", Decoder(processor, (3, 32, 32)), LoaderContext(torch.device("cpu")))
    if data.sizes["train"] < count:
        raise ValueError(f"--small: expected at least {count} training images, got {data.sizes['train']}")
    images.cache(quiet=True)
    return {"seconds": time.perf_counter() - start, "bytes": resident("VmHWM") - before}


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope between the middle and the last point on logarithmic scales."""
    (x, y), (last_x, last_y) = points[len(points) // 2], points[-1]
    return math.log(last_y / y) / math.log(last_x / x)


def plot(growth: dict[str, dict[int, dict[str, float]]], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(growth), figsize=(3.2 * len(growth), 6), squeeze=False, layout="constrained")
    for column, (kind, points) in enumerate(growth.items()):
        for axis, (quantity, unit, scale) in zip(axes[:, column], (("seconds", "s", 1), ("bytes", "MiB", 2**20))):
            values = [(x, point[quantity] / scale) for x, point in points.items()]
            axis.loglog(*zip(*values), marker="o")
            axis.set_title(f"exponent {exponent(values):.2f}", fontsize=10)
            axis.set_xlabel(kind)
            axis.set_xticks(list(points), [str(x) for x in points], fontsize=8)
            axis.set_yticks([y for _, y in values], [f"{y:.3g}" for _, y in values], fontsize=8)
            axis.minorticks_off()
            if column == 0:
                axis.set_ylabel(unit)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="dataset of small images of one size with 'image' and 'label', as CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    growth = {}
    report = {**machine(), "growth": growth}
    print(describe(report))
    for kind, values in POINTS.items():
        if kind == "images" and arguments.small is None:
            print("images: skipped, no dataset was named")
            continue
        growth[kind] = {}
        for value in values:
            if kind == "images":
                point = in_new_process(decode, arguments.small, value)
            else:
                point = in_new_process(step, {**BASE, kind: value}, arguments.rounds)
            growth[kind][value] = point
            print(f"  {kind} {value}: {point['seconds']:.3f} s, {point['bytes'] / 2**20:,.0f} MiB", flush=True)
        for quantity in ("seconds", "bytes"):
            slope = exponent([(value, point[quantity]) for value, point in growth[kind].items()])
            print(f"  {quantity} grow with {kind} to the power of {slope:.2f}")
    write_report(report, RESULTS / "growth.json")
    plot(growth, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
