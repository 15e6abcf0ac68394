"""Timing, memory and reports for the benchmarks."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import pair
from vit_simple.sharing.record import processor_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "timm",
    "vit-pytorch",
    "torchvision",
    "torchao",
    "accelerate",
    "datasets",
    "pillow",
)


def machine() -> dict:
    """The hardware and the versions of packages, for a report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": {
            "processor": processor_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
        },
        "versions": versions,
    }


def describe(report: dict) -> str:
    """The machine and the versions of a report, in one line."""
    machine = report["machine"]
    hardware = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']} ({machine['instructions']})"
    installed = [f"{name} {version}" for name, version in report["versions"].items() if version != "not installed"]
    return ", ".join([hardware, *installed])


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The time of one call: between two events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def interleave(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call: each round makes all calls once, in random order, after three warm-up calls of each."""
    for call in calls.values():
        for _ in range(3):
            call()
    times = {name: [] for name in calls}
    for number in range(rounds):
        for name in random.Random(number).sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], device))
    return times


def spread(times: list[float]) -> float:
    """Half of the interquartile range, as a fraction of the median."""
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / 2 / statistics.median(times)


def flops_per_image(config: ViTSimpleConfig, training: bool, every_token: bool = False) -> int:
    """Operations of the matrix products in a forward pass or, in training, in forward and backward.

    With `every_token`, the last block computes all tokens, as the peers do, even if the head reads only one.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ViTSimpleForImageClassification(config)
        pixels = torch.empty(1, config.num_channels, *pair(config.image_size))
        output = model(pixels, labels=torch.empty(1, dtype=torch.long), output_hidden_states=every_token)
        if training:
            output.loss.backward()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, the upper bound for a model made of matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = interleave({"product": lambda: torch.mm(a, b)}, 15, device)["product"]
    return 2 * side**3 / min(times)


def resident(field: str) -> int:
    """Memory of this process in bytes: now (VmRSS), or its peak (VmHWM) since `reset_peak`. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def in_new_process(function: Callable, *arguments):
    """The result of the function, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_report(report: dict, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
