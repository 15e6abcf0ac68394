"""Images per second of this network and its peers: inference and training steps, in one run.

    PYTHONPATH=peers python -m benchmarks.model                                         # S/16 and B/16 as they come
    PYTHONPATH=peers python -m benchmarks.model --ways eager compiled --modes training --batch_sizes 8
    PYTHONPATH=peers python -m benchmarks.model --profile                               # where eager's time goes

The sides take turns, in another order each round; a ratio is that of medians, and a spread is half of the distance
between the quartiles. The ceiling is a large square matrix product, measured here: what a network reaches of it are the
operations of its matrix products over time, for the peers those of ours with all tokens to the end. A training step is
forward, loss, backward and fused AdamW. bfloat16 is autocast in training and the weights' own type in inference. Ways:
eager; compiled, by torch.compile; fast, by vit_simple.inference.compiling; bf16 and, of
ours alone, int8, by that, too. `benchmarks/peers.py` tells how to bring the peers.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.measure import (
    RESULTS,
    flops_per_image,
    forget_peak,
    in_a_process,
    machine,
    product_rate,
    resident,
    spread,
    told,
    turns,
    write_report,
)
from benchmarks.peers import PEERS, build
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.inference.compiling import compile_inference

OURS = "vit_simple"
WAYS = ("eager", "compiled", "fast", "bf16", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def logits_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def config_of(variant: str, image_size: int) -> ViTSimpleConfig:
    return ViTSimpleConfig.from_variant(variant, image_size=image_size, num_labels=1000)


def networks(config: ViTSimpleConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every network that can be built, with the weights of ours where they fit, and why another one is missing."""
    torch.manual_seed(0)
    found, missing = {OURS: ViTSimpleForImageClassification(config)}, {}
    for name in PEERS:
        try:
            found[name] = build(name, found[OURS])
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            missing[name] = str(error)
    return found, missing


def inference(network: nn.Module, pixels: torch.Tensor):
    def call():
        with torch.no_grad():
            return logits_of(network(pixels))

    return call


def training(network: nn.Module, pixels: torch.Tensor, autocast: bool, compiled: bool):
    """A whole step; where it is compiled, loss and network are one graph."""
    labels = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def loss_of(pixels, labels):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast):
            logits = logits_of(network(pixels))
        return F.cross_entropy(logits.float(), labels)

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step():
        loss_of(pixels, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(variant: str, image_size: int, dtype: str, device: torch.device, name: str, mode: str, batch: int) -> int:
    """The bytes that an eager network and three calls take at most, in a process that has nothing else."""
    network = ViTSimpleForImageClassification(config_of(variant, image_size))
    network = network if name == OURS else build(name, network)
    evaluating = mode == "inference"
    network = place(network, device, DTYPES[dtype] if evaluating else torch.float32).train(not evaluating)
    pixels = torch.randn(batch, 3, image_size, image_size, device=device)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    forget_peak()
    before = resident("VmRSS") - weights
    if evaluating:
        call = inference(network, pixels.to(DTYPES[dtype]))
    else:
        call = training(network, pixels, dtype == "bfloat16", compiled=False)
    for _ in range(3):
        call()
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else resident("VmHWM") - before


def place(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves all of a network; SimpleViT has its positions in a plain tensor, which `to` leaves behind."""
    for name, value in vars(network).items():
        if isinstance(value, torch.Tensor):
            setattr(network, name, value.to(device, dtype))
    return network.to(device, dtype)


class Case:
    """One network size at one image size in one precision: all sides, in every way that was asked for."""

    def __init__(self, variant: str, image_size: int, dtype: str, device: torch.device, ways: list[str]):
        self.config, self.dtype, self.device, self.ways = config_of(variant, image_size), dtype, device, ways
        self.title = f"{variant}, {image_size} px, {dtype}"
        self.networks, self.missing = networks(self.config)
        self.flops = {
            mode: {whose: flops_per_image(self.config, mode == "training", whose != OURS) for whose in (OURS, "peers")}
            for mode in ("inference", "training")
        }
        self.folder = tempfile.TemporaryDirectory()
        self.frozen = {}  # (side, way) -> network, compiled once for all batch sizes
        self.differences = {}

    def pixels(self, batch: int) -> torch.Tensor:
        torch.manual_seed(batch)
        return torch.randn(batch, 3, self.config.image_size, self.config.image_size, device=self.device)

    def prepare(self, mode: str):
        """Moves the networks to the device; compiles ahead of time what is to be so."""
        evaluating = mode == "inference"
        for network in self.networks.values():
            place(network, self.device, DTYPES[self.dtype] if evaluating else torch.float32).train(not evaluating)
        if evaluating:
            pixels = self.pixels(2).to(DTYPES[self.dtype])
            expected = inference(self.networks[OURS], pixels)()
            for name, network in self.networks.items():
                if not name.startswith("vit-pytorch"):  # which has other weights
                    self.record_difference(name, inference(network, pixels)(), expected)
                for way in ("fast", "bf16", "int8"):
                    if way in self.ways and (way != "int8" or name == OURS):
                        self.freeze(name, way, network, pixels)

    def freeze(self, name: str, way: str, network: nn.Module, pixels: torch.Tensor):
        path = f"{self.folder.name}/{name} {way}.pt2".replace(" ", "-")
        compiled = place(copy.deepcopy(network), self.device, torch.bfloat16) if way == "bf16" else network
        try:
            self.frozen[name, way] = compile_inference(with_config(compiled, self.config), path, int8=way == "int8")
        except Exception as error:  # whatever a peer's code meets in the compiler is what there is to tell of that side
            if name == OURS and not isinstance(error, (ImportError, ValueError)):  # int8 without torchao or on a GPU
                raise
            self.missing[f"{name}, {way}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.record_difference(f"{name}, {way}", self.frozen_call(name, way, pixels)(), inference(network, pixels)())

    def frozen_call(self, name: str, way: str, pixels: torch.Tensor):
        return inference(self.frozen[name, way], pixels.bfloat16() if way == "bf16" else pixels)

    def record_difference(self, side: str, logits: torch.Tensor, expected: torch.Tensor):
        """How far the logits are from the expected ones, as a part of the largest of these."""
        self.differences[side] = ((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()

    def sides(self, mode: str, batch: int) -> dict:
        pixels = self.pixels(batch)
        if mode == "training":
            return {
                f"{name}, {way}": training(network, pixels, self.dtype == "bfloat16", way == "compiled")
                for way in self.ways
                if way in ("eager", "compiled")
                for name, network in self.networks.items()
            }
        pixels, sides = pixels.to(DTYPES[self.dtype]), {}
        for way in self.ways:
            for name, network in self.networks.items():
                if way == "eager":
                    sides[f"{name}, {way}"] = inference(network, pixels)
                elif way == "compiled":
                    compiled = torch.compile(network, dynamic=False)
                    sides[f"{name}, {way}"] = inference(compiled, pixels)
                elif (name, way) in self.frozen:
                    sides[f"{name}, {way}"] = self.frozen_call(name, way, pixels)
        return sides


def with_config(network: nn.Module, config: ViTSimpleConfig) -> nn.Module:
    """A peer's network with what `compile_inference` reads of ours."""
    if not isinstance(network, PreTrainedModel):
        parameter = next(network.parameters())
        network.config, network.dtype, network.device = config, parameter.dtype, parameter.device
    return network


def measure(case: Case, mode: str, batches: list[int], rounds: int) -> list[dict]:
    case.prepare(mode)
    rows = []
    for batch in batches:
        sides = case.sides(mode, batch)
        found = turns(sides, rounds, case.device)
        for name, times in found.items():
            row = {"case": case.title, "mode": mode, "batch": batch, "side": name, "seconds": times}
            row["images_per_second"] = batch / median(times)
            flops = case.flops[mode][OURS if name.startswith(f"{OURS}, ") else "peers"]
            row["flops_per_second"] = flops * batch / median(times)
            rows.append(row)
        torch._dynamo.reset()
    return rows


def table(rows: list[dict], ceiling: float) -> str:
    """Images per second, in parentheses the ratio to our own first side, and what is reached of the ceiling."""
    batches = sorted({row["batch"] for row in rows})
    lines = [["", *(f"batch {batch}" for batch in batches), "of the product", "spread"]]
    for side in dict.fromkeys(row["side"] for row in rows):
        mine = {row["batch"]: row for row in rows if row["side"] == side}
        base = {row["batch"]: row for row in rows if row["side"] == rows[0]["side"]}
        cells = []
        for batch in batches:
            speed = mine[batch]["images_per_second"]
            cells.append(f"{speed:,.1f} ({speed / base[batch]['images_per_second']:.2f})")
        best = max(row["flops_per_second"] for row in mine.values())
        part = "" if side.endswith((", bf16", ", int8")) else f"{best / ceiling:.0%}"  # the ceiling is of another type
        most = max(spread(row["seconds"]) for row in mine.values())
        lines.append([side, *cells, part, f"{most:.1%}"])
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def plot(rows: list[dict], path: Path):
    """A panel for each case and mode: images per second against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["case"], row["mode"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels) + 2.5, 4), squeeze=False, layout="constrained"
    )
    styles = {"eager": "-", "compiled": "--", "fast": ":", "bf16": (0, (3, 1, 1, 1)), "int8": "-."}
    names = list(dict.fromkeys(row["side"].rpartition(", ")[0] for row in rows))
    for axis, (case, mode) in zip(axes[0], panels):
        mine = [row for row in rows if (row["case"], row["mode"]) == (case, mode)]
        for side in dict.fromkeys(row["side"] for row in mine):
            name, _, way = side.rpartition(", ")
            points = [(row["batch"], row["images_per_second"]) for row in mine if row["side"] == side]
            axis.plot(*zip(*points), linestyle=styles[way], color=f"C{names.index(name)}", marker=".", label=side)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["batch"] for row in mine], [str(row["batch"]) for row in mine])
        axis.set(title=f"{case}: {mode}", xlabel="batch size", ylabel="images/s")
        axis.set_ylim(bottom=0)
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def print_profile(case: Case, mode: str, batch: int) -> dict[str, dict[str, float]]:
    """Where the time of eager calls goes, by operator, in ours and in transformers' network."""
    case.prepare(mode)
    shares = {}
    for name in (OURS, "transformers"):
        if name not in case.networks:
            continue
        call = case.sides(mode, batch)[f"{name}, eager"]
        for _ in range(3):
            call()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (case.device.type == "cuda")
        with profile(activities=activities) as record:
            for _ in range(5):
                call()
        cost = "self_device_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
        rows = {row.key: getattr(row, cost) for row in record.key_averages() if row.device_type == DeviceType.CPU}
        shares[name] = {key: value / sum(rows.values()) for key, value in sorted(rows.items(), key=lambda r: -r[1])[:8]}
        print(f"{case.title}, {mode}, batch {batch}, {name}:")
        print("\n".join(f"  {share:6.1%}  {key}" for key, share in shares[name].items()))
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--image_sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "fast", "bf16", "int8"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="peak memory of each eager network, too")
    parser.add_argument("--profile", action="store_true", help="show where eager's time goes, and measure nothing else")
    parser.add_argument("--name", help="of the files in benchmarks/results; default: model, or profile")
    arguments = parser.parse_args()
    device, report = torch.device(arguments.device), {**machine(), "cases": [], "rows": []}
    ways, name = (["eager"], "profile") if arguments.profile else (arguments.ways, "model")
    path = RESULTS / f"{arguments.name or name}.json"
    print(told(report))
    for dtype in arguments.dtypes:
        ceiling = product_rate(device, DTYPES[dtype])
        print(f"{dtype} matrix product: {ceiling / 1e9:,.0f} GFLOP/s")
        for variant in arguments.variants:
            for image_size in arguments.image_sizes:
                case = Case(variant, image_size, dtype, device, ways)
                if arguments.profile:
                    for mode in arguments.modes:
                        for batch in arguments.batch_sizes:
                            shares = print_profile(case, mode, batch)
                            report["rows"].append({"case": case.title, "mode": mode, "batch": batch, "shares": shares})
                    continue
                for mode in arguments.modes:
                    rows = measure(case, mode, arguments.batch_sizes, arguments.rounds)
                    report["rows"] += rows
                    print(f"\n{case.title}: {mode}, images/s\n\n{table(rows, ceiling)}\n", flush=True)
                    write_report(report, path)
                for name, why in case.missing.items():
                    print(f"{name} is missing: {why}")
                for side, difference in case.differences.items():
                    print(f"  logits of {side}: {difference:.1e} from the expected ones")
                told_of = {"case": case.title, "missing": case.missing, "differences": case.differences}
                report["cases"].append({**told_of, "flops": case.flops, "product": ceiling})
                if arguments.memory:
                    batch = max(arguments.batch_sizes)
                    for mode in arguments.modes:
                        for name in case.networks:
                            peak = in_a_process(memory, variant, image_size, dtype, device, name, mode, batch)
                            print(f"  {mode}, batch {batch}, {name}: {peak / 2**20:,.0f} MiB at most", flush=True)
                            row = {"case": case.title, "mode": mode, "batch": batch, "side": name, "peak_memory": peak}
                            report.setdefault("memory", []).append(row)
    write_report(report, path)
    if not arguments.profile and len(arguments.batch_sizes) > 1:
        plot(report["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
