"""Where the time of a training step goes: milliseconds of each piece, and the operations it dispatches.

    python -m benchmarks.step                              # recipes/cifar10.yaml on this machine's GPU, or on its CPU
    python -m benchmarks.step --recipe FILE --backends eager blocks captured

The images are noise: no dataset is needed. On a GPU a piece is measured between two events with nothing else running,
so that the pieces may sum up to more than the whole step, in which the host runs ahead. Ways: eager; blocks: compiled;
captured: compiled blocks in recorded passes, as in train.py on a GPU.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import RESULTS, describe, machine, seconds, write_report
from vit_simple.data.augment import Augment
from vit_simple.data.labels import Labels
from vit_simple.data.processors import open_processor
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.optim import EMA, build_optimizers
from vit_simple.training.setup import build_model, processor_content
from vit_simple.training.step import capture, compile_blocks

VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"detach", "alias", "as_strided", "_reshape_alias", "unfold", "split", "split_with_sizes", "unbind"}


WAYS = ["eager", "blocks", "captured"] if torch.cuda.is_available() else ["eager", "blocks"]


class CountOperations(TorchDispatchMode):
    """Counts the operations that are dispatched while it is on, except views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.split("::")[1] not in VIEWS
        return function(*args, **(kwargs or {}))


def operations(call: Callable) -> int:
    with CountOperations() as counter:
        call()
    return counter.count


class Pieces:
    """The parts of a training step of a recipe, on noise, as functions without arguments."""

    def __init__(self, config: TrainConfig, device: torch.device, way: str):
        names = [str(number) for number in range(10)]
        labels = Labels("label", "class", names, {number: number for number in range(10)})
        self.config, self.device = config, device
        self.in_bf16 = config.mixed_precision == "bf16"
        config.torch_compile = False  # as the way says
        self.model = build_model(config, labels).to(device).train()
        size = self.model.config.image_size
        processor = open_processor(processor_content(TrainConfig(), (size, size), cropped=False))
        self.augment = Augment(processor, 10, **config.group("augmentation")).to(device)
        if way == "blocks":
            compile_blocks(self.model)
        elif way == "captured":
            compile_blocks(self.model)
            capture(self.model, config.per_device_train_batch_size, self.in_bf16)
        if way != "eager":
            self.augment.compile()
        muon_rate = config.muon_learning_rate if config.optim == "muon" else None
        rates = config.learning_rate, config.weight_decay, config.layer_decay, muon_rate
        self.optimizers = build_optimizers(self.model, *rates)
        self.average = None if config.ema_decay is None else EMA(self.model, config.ema_decay)
        batch = config.per_device_train_batch_size
        self.pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, 10, (batch,), device=device)
        self.x, self.targets = self.augment(self.pixels, self.labels)
        self.forward_and_backward()

    def draws(self):
        return self.augment.draw(self.pixels)

    def augmentation(self):
        return self.augment(self.pixels, self.labels)

    def forward_and_backward(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            logits = self.model(self.x).logits
        F.cross_entropy(logits.float(), self.targets).backward()

    def clipping(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)

    def named(self) -> dict[str, Callable]:
        pieces = {
            "draws": self.draws,
            "augmentation": self.augmentation,
            "forward and backward": self.forward_and_backward,
        }
        pieces["clipping"] = self.clipping
        pieces |= {type(optimizer).__name__: optimizer.step for optimizer in self.optimizers}
        return pieces | ({"EMA": lambda: self.average.update(1000)} if self.average else {})

    def whole(self):
        self.x, self.targets = self.augmentation()
        self.forward_and_backward()
        self.clipping()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            self.average.update(1000)


def measure(config: TrainConfig, device: torch.device, way: str, rounds: int) -> dict:
    """Milliseconds and operations of each piece, and images per second of whole steps."""
    before = time.perf_counter()
    pieces = Pieces(config, device, way)
    for _ in range(2):
        pieces.whole()
    if device.type == "cuda":
        torch.cuda.synchronize()
    row = {"way": way, "first steps, s": round(time.perf_counter() - before, 1), "ms": {}, "operations": {}}
    pieces.forward_and_backward()  # leaves gradients for what follows
    for name, call in pieces.named().items():
        call()
        row["ms"][name] = round(1e3 * median(seconds(call, device) for _ in range(rounds)), 3)
        if way == "eager":
            row["operations"][name] = operations(call)

    def steps():
        for _ in range(rounds):
            pieces.whole()

    row["ms"]["whole step"] = round(1e3 * seconds(steps, device) / rounds, 3)
    row["images/s"] = round(config.per_device_train_batch_size / row["ms"]["whole step"] * 1e3)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/cifar10.yaml")
    parser.add_argument("--backends", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: the recipe's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="step", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    device, report = torch.device(arguments.device), {**machine(), "rows": []}
    print(describe(report))
    for batch in arguments.batch_sizes or [None]:
        for way in arguments.backends:
            size = [] if batch is None else ["--per_device_train_batch_size", str(batch)]
            config = parse_config([arguments.recipe, *size])
            row = {"batch": config.per_device_train_batch_size, **measure(config, device, way, arguments.rounds)}
            report["rows"].append(row)
            print(row, flush=True)
            write_report(report, RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
