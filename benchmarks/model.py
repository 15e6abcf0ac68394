"""Images per second of this model and its peers, in inference and in training.

    PYTHONPATH=peers python -m benchmarks.model
    PYTHONPATH=peers python -m benchmarks.model --backends eager compiled --modes training --batch_sizes 8
    PYTHONPATH=peers python -m benchmarks.model --profile

In each round the models are called in random order. A ratio is that of medians; a spread is half of the interquartile
range over the median. Speed is also reported as a fraction of a large square matrix product, measured here: the
operations of the model's matrix products (for peers, those of ours if the last block computes all tokens) per second.
A training step is forward, loss, backward and fused AdamW. bfloat16 means autocast in training, and weights in bfloat16
in inference.

Backends: eager; compiled, by torch.compile; aot, by vit_simple.inference.compiling; bf16, the
same in bfloat16; int8, the same in int8, for our model only. `benchmarks/peers.py` says how to install the peers.
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
    describe,
    flops_per_image,
    in_new_process,
    interleave,
    machine,
    product_rate,
    reset_peak,
    resident,
    spread,
    write_report,
)
from benchmarks.peers import PEERS, build
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.inference.compiling import compile_inference

OURS = "vit_simple"
BACKENDS = ("eager", "compiled", "aot", "bf16", "int8")
AOT_BACKENDS = ("aot", "bf16", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def logits_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def config_of(variant: str, image_size: int) -> ViTSimpleConfig:
    return ViTSimpleConfig.from_variant(variant, image_size=image_size, num_labels=1000)


def build_models(config: ViTSimpleConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Our model and the peers with our weights if they fit, by name; and why a peer is missing."""
    torch.manual_seed(0)
    models, missing = {OURS: ViTSimpleForImageClassification(config)}, {}
    for name in PEERS:
        try:
            models[name] = build(name, models[OURS])
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            missing[name] = str(error)
    return models, missing


def inference_call(model: nn.Module, pixels: torch.Tensor):
    def call():
        with torch.no_grad():
            return logits_of(model(pixels))

    return call


def training_step(model: nn.Module, pixels: torch.Tensor, autocast: bool, compiled: bool):
    """A call that makes a training step; if compiled, model and loss are one graph."""
    labels = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def loss_of(pixels, labels):
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast):
            logits = logits_of(model(pixels))
        return F.cross_entropy(logits.float(), labels)

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step():
        loss_of(pixels, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(variant: str, image_size: int, dtype: str, device: torch.device, name: str, mode: str, batch: int) -> int:
    """Peak bytes of an eager model and three calls; call it in a new process."""
    model = ViTSimpleForImageClassification(config_of(variant, image_size))
    model = model if name == OURS else build(name, model)
    evaluating = mode == "inference"
    model = move(model, device, DTYPES[dtype] if evaluating else torch.float32).train(not evaluating)
    pixels = torch.randn(batch, 3, image_size, image_size, device=device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    reset_peak()
    before = resident("VmRSS") - weights
    if evaluating:
        call = inference_call(model, pixels.to(DTYPES[dtype]))
    else:
        call = training_step(model, pixels, dtype == "bfloat16", compiled=False)
    for _ in range(3):
        call()
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else resident("VmHWM") - before


def move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`model.to`, which does not move the positions of SimpleViT: they are a plain tensor."""
    for name, value in vars(model).items():
        if isinstance(value, torch.Tensor):
            setattr(model, name, value.to(device, dtype))
    return model.to(device, dtype)


class Case:
    """All models of one size at one image size in one dtype."""

    def __init__(self, variant: str, image_size: int, dtype: str, device: torch.device, backends: list[str]):
        self.config, self.dtype, self.device, self.backends = config_of(variant, image_size), dtype, device, backends
        self.title = f"{variant}, {image_size} px, {dtype}"
        self.models, self.missing = build_models(self.config)
        self.flops = {
            mode: {name: flops_per_image(self.config, mode == "training", name != OURS) for name in (OURS, "peers")}
            for mode in ("inference", "training")
        }
        self.folder = tempfile.TemporaryDirectory()
        self.aot = {}  # (name, backend) -> model, compiled once for all batch sizes
        self.differences = {}

    def pixels(self, batch: int) -> torch.Tensor:
        torch.manual_seed(batch)
        return torch.randn(batch, 3, self.config.image_size, self.config.image_size, device=self.device)

    def prepare(self, mode: str):
        """Moves the models to the device; for inference, compiles those of the AOT backends."""
        evaluating = mode == "inference"
        for model in self.models.values():
            move(model, self.device, DTYPES[self.dtype] if evaluating else torch.float32).train(not evaluating)
        if not evaluating:
            return
        pixels = self.pixels(2).to(DTYPES[self.dtype])
        expected = inference_call(self.models[OURS], pixels)()
        for name, model in self.models.items():
            if not name.startswith("vit-pytorch"):  # has other weights
                self.record_difference(name, inference_call(model, pixels)(), expected)
            for backend in AOT_BACKENDS:
                if backend in self.backends and (backend != "int8" or name == OURS):
                    self.compile_aot(name, backend, model, pixels)

    def compile_aot(self, name: str, backend: str, model: nn.Module, pixels: torch.Tensor):
        path = f"{self.folder.name}/{name} {backend}.pt2".replace(" ", "-")
        source = move(copy.deepcopy(model), self.device, torch.bfloat16) if backend == "bf16" else model
        try:
            compiled = compile_inference(with_config(source, self.config), path, int8=backend == "int8")
        except Exception as error:  # a peer that cannot be compiled is reported as missing
            if name == OURS and not isinstance(error, (ImportError, ValueError)):  # int8 without torchao or on a GPU
                raise
            self.missing[f"{name}, {backend}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.aot[name, backend] = compiled
        logits = self.aot_call(name, backend, pixels)()
        self.record_difference(f"{name}, {backend}", logits, inference_call(model, pixels)())

    def aot_call(self, name: str, backend: str, pixels: torch.Tensor):
        return inference_call(self.aot[name, backend], pixels.bfloat16() if backend == "bf16" else pixels)

    def record_difference(self, name: str, logits: torch.Tensor, expected: torch.Tensor):
        """The largest difference of logits, as a fraction of the largest logit."""
        self.differences[name] = ((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()

    def calls(self, mode: str, batch: int) -> dict:
        """The calls to be timed: "MODEL, BACKEND" -> function."""
        pixels = self.pixels(batch)
        if mode == "training":
            return {
                f"{name}, {backend}": training_step(model, pixels, self.dtype == "bfloat16", backend == "compiled")
                for backend in self.backends
                if backend in ("eager", "compiled")
                for name, model in self.models.items()
            }
        pixels, calls = pixels.to(DTYPES[self.dtype]), {}
        for backend in self.backends:
            for name, model in self.models.items():
                if backend == "eager":
                    calls[f"{name}, {backend}"] = inference_call(model, pixels)
                elif backend == "compiled":
                    compiled = torch.compile(model, dynamic=False)
                    calls[f"{name}, {backend}"] = inference_call(compiled, pixels)
                elif (name, backend) in self.aot:
                    calls[f"{name}, {backend}"] = self.aot_call(name, backend, pixels)
        return calls


def with_config(model: nn.Module, config: ViTSimpleConfig) -> nn.Module:
    """A peer's model with the attributes of ours that `compile_inference` reads."""
    if not isinstance(model, PreTrainedModel):
        parameter = next(model.parameters())
        model.config, model.dtype, model.device = config, parameter.dtype, parameter.device
    return model


def measure(case: Case, mode: str, batches: list[int], rounds: int) -> list[dict]:
    case.prepare(mode)
    rows = []
    for batch in batches:
        for name, times in interleave(case.calls(mode, batch), rounds, case.device).items():
            row = {"case": case.title, "mode": mode, "batch": batch, "side": name, "seconds": times}
            row["images_per_second"] = batch / median(times)
            flops = case.flops[mode][OURS if name.startswith(f"{OURS}, ") else "peers"]
            row["flops_per_second"] = flops * batch / median(times)
            rows.append(row)
        torch._dynamo.reset()
    return rows


def table(rows: list[dict], ceiling: float) -> str:
    """Images per second, in parentheses the ratio to the first row, and the fraction of the matrix product."""
    batches = sorted({row["batch"] for row in rows})
    lines = [["", *(f"batch {batch}" for batch in batches), "of the product", "spread"]]
    names = list(dict.fromkeys(row["side"] for row in rows))
    base = {row["batch"]: row for row in rows if row["side"] == names[0]}
    for name in names:
        results = {row["batch"]: row for row in rows if row["side"] == name}
        cells = []
        for batch in batches:
            speed = results[batch]["images_per_second"]
            cells.append(f"{speed:,.1f} ({speed / base[batch]['images_per_second']:.2f})")
        best = max(row["flops_per_second"] for row in results.values())
        fraction = "" if name.endswith((", bf16", ", int8")) else f"{best / ceiling:.0%}"  # of a product in this dtype
        largest_spread = max(spread(row["seconds"]) for row in results.values())
        lines.append([name, *cells, fraction, f"{largest_spread:.1%}"])
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
    styles = {"eager": "-", "compiled": "--", "aot": ":", "bf16": (0, (3, 1, 1, 1)), "int8": "-."}
    names = list(dict.fromkeys(row["side"].rpartition(", ")[0] for row in rows))
    for axis, (case, mode) in zip(axes[0], panels):
        panel = [row for row in rows if (row["case"], row["mode"]) == (case, mode)]
        for label in dict.fromkeys(row["side"] for row in panel):
            name, _, backend = label.rpartition(", ")
            points = [(row["batch"], row["images_per_second"]) for row in panel if row["side"] == label]
            axis.plot(*zip(*points), linestyle=styles[backend], color=f"C{names.index(name)}", marker=".", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["batch"] for row in panel], [str(row["batch"]) for row in panel])
        axis.set(title=f"{case}: {mode}", xlabel="batch size", ylabel="images/s")
        axis.set_ylim(bottom=0)
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def print_profile(case: Case, mode: str, batch: int) -> dict[str, dict[str, float]]:
    """The time of eager calls by operator, for our model and that of transformers."""
    case.prepare(mode)
    shares = {}
    for name in (OURS, "transformers"):
        if name not in case.models:
            continue
        call = case.calls(mode, batch)[f"{name}, eager"]
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
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["eager", "aot", "bf16", "int8"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of each eager model")
    parser.add_argument("--profile", action="store_true", help="only show the time of eager calls by operator")
    parser.add_argument("--name", help="of the files in benchmarks/results; default: model, or profile")
    arguments = parser.parse_args()
    device, report = torch.device(arguments.device), {**machine(), "cases": [], "rows": []}
    backends, name = (["eager"], "profile") if arguments.profile else (arguments.backends, "model")
    path = RESULTS / f"{arguments.name or name}.json"
    print(describe(report))
    for dtype in arguments.dtypes:
        ceiling = product_rate(device, DTYPES[dtype])
        print(f"{dtype} matrix product: {ceiling / 1e9:,.0f} GFLOP/s")
        for variant in arguments.variants:
            for image_size in arguments.image_sizes:
                case = Case(variant, image_size, dtype, device, backends)
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
                for name, reason in case.missing.items():
                    print(f"{name} is missing: {reason}")
                for name, difference in case.differences.items():
                    print(f"  logits of {name} differ by {difference:.1e}")
                result = {"case": case.title, "missing": case.missing, "differences": case.differences}
                report["cases"].append({**result, "flops": case.flops, "product": ceiling})
                if arguments.memory:
                    batch = max(arguments.batch_sizes)
                    for mode in arguments.modes:
                        for name in case.models:
                            peak = in_new_process(memory, variant, image_size, dtype, device, name, mode, batch)
                            print(f"  {mode}, batch {batch}, {name}: peak {peak / 2**20:,.0f} MiB", flush=True)
                            row = {"case": case.title, "mode": mode, "batch": batch, "side": name, "peak_memory": peak}
                            report.setdefault("memory", []).append(row)
    write_report(report, path)
    if not arguments.profile and len(arguments.batch_sizes) > 1:
        plot(report["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
