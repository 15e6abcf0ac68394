"""What the comparisons share: sides that take turns, medians with their spread, counted operations, a report."""

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


def processor_name() -> str:
    """The processor's name; platform.processor() knows none on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> dict:
    """Where something was measured, and with which versions."""
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


def told(report: dict) -> str:
    """The machine in a line."""
    found, versions = report["machine"], report["versions"]
    where = found["gpu"] or f"{found['cores']} cores of {found['processor']} ({found['instructions']})"
    return where + ", " + ", ".join(f"{name} {version}" for name, version in versions.items() if version[0].isdigit())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes: on a GPU between two events, on a CPU by the clock."""
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


def turns(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call: in each round all sides, in an order of its own, after three calls without the clock."""
    for call in sides.values():
        for _ in range(3):
            call()
    found = {name: [] for name in sides}
    for number in range(rounds):
        for name in random.Random(number).sample(list(sides), len(sides)):  # nobody always follows the same other one
            found[name].append(seconds(sides[name], device))
    return found


def spread(times: list[float]) -> float:
    """Half of the distance between the quartiles, as a part of the median."""
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / 2 / statistics.median(times)


def flops_per_image(config: ViTSimpleConfig, training: bool, every_token: bool = False) -> int:
    """Operations of the matrix products in a forward pass or, in training, a forward and a backward one.

    With `every_token`, of one that carries all tokens to its end, as peers do.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = ViTSimpleForImageClassification(config)
        pixels = torch.empty(1, config.num_channels, *pair(config.image_size))
        output = network(pixels, labels=torch.empty(1, dtype=torch.long), output_hidden_states=every_token)
        if training:
            output.loss.backward()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product: the ceiling for a network that is made of such."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = turns({"product": lambda: torch.mm(a, b)}, 15, device)["product"]
    return 2 * side**3 / min(times)


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM) since `forget_peak`; on Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(function: Callable, *arguments):
    """What the function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_report(report: dict, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
