"""Disturbs training, resuming and pushing at random moments, and checks after each command that nothing is lost.

python -m tests.soak --minutes 10 --seed 0

Each round trains a tiny model on random images. Its commands are killed, stopped by signals, run out of disk space
or lose their network; then the run resumes, and is pushed to a local Hub. The disk is a small tmpfs, which needs the
command `unshare`; without it, no disk is ever full.
"""

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor

from tests.fake_hub.hub import CUTS, Fault, Hub
from vit_simple import ViTSimpleForImageClassification
from vit_simple.files import ROOT, UserError, read_metrics
from vit_simple.training.integrity import complete_checkpoints, read_state

TOKEN = "hf_plantedplantedplantedplanted"
HANG = 90  # seconds without output
MODEL = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
MODEL += "intermediate_size: 32}"
OPTIONS = ["--model", MODEL, "--max_steps", "40", "--logging_steps", "5", "--eval_steps", "10", "--save_steps", "4"]
OPTIONS += ["--per_device_train_batch_size", "16", "--save_total_limit", "3", "--license", "mit"]
VARIANTS = (
    ["--dataloader_num_workers", "0", "--ema_decay", "0.9", "--mixup_alpha", "0.5"],
    ["--dataloader_num_workers", "2", "--cache_images", "off", "--random_resized_crop", "0.5"],
    ["--dataloader_num_workers", "2", "--streaming", "--shuffle_buffer_size", "20"],
)
EVENTS = (None, "checkpoints/.step_*", ".result", "README.md", "finished.json", "predictions.png")
SIGNALS = {"kill": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# The commands are forked from a process that has imported the libraries, which takes several seconds.
FORK = """
import json, os, sys
import vit_simple.push_to_hub, vit_simple.train
for line in sys.stdin:
    program, arguments, log = json.loads(line)
    if (pid := os.fork()) == 0:
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    raise SystemExit
os.setsid()
output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in (1, 2):
    os.dup2(output, number)
sys.argv = [program, *arguments]
sys.modules["vit_simple." + program.removesuffix(".py")].main(arguments)
"""


class Soak:
    """Rounds on one disk and one Hub.

    Attributes:
        counts: how often each thing has happened.
        violations: what must not happen, in words.
    """

    def __init__(self, work: Path, disk: Path, hub: Hub, seed: int, can_be_full: bool):
        self.work, self.disk, self.hub, self.random = work, disk, hub, random.Random(seed)
        self.faults = [*SIGNALS, "full disk", "full disk"] if can_be_full else [*SIGNALS]
        self.counts, self.violations, self.references, self.seconds = Counter(), [], {}, {}
        self.log = work / "log"
        folders = {"TMPDIR": disk / "tmp", "XDG_CACHE_HOME": disk / "cache"}
        for folder in folders.values():
            folder.mkdir(parents=True)
        environment = hub.environment(disk / "home", TOKEN) | {name: str(path) for name, path in folders.items()}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.server = subprocess.Popen([sys.executable, "-c", FORK], env=environment, cwd=disk, **pipes)
        self.images, self.labels = write_dataset(disk / "images")

    # One command

    def call(self, program: str, folder: Path, arguments: list, fault: str = "") -> int:
        """Runs a command, disturbs it once, checks how it ends, and returns its exit status."""
        self.log.write_bytes(b"")
        self.server.stdin.write(json.dumps([program, [*map(str, arguments)], str(self.log)]) + "\n")
        pid, start, kind = int(self.server.stdout.readline()), time.monotonic(), (program, *map(str, arguments[2:]))
        moment = self.random.uniform(0, self.seconds.get(kind, 6))
        event = self.random.choice(EVENTS) if program == "train.py" else None
        size, last_output, disturbed, hangs = 0, start, False, False
        while not select.select([self.server.stdout], [], [], 0.002)[0]:
            now = time.monotonic()
            if (grown := self.log.stat().st_size) > size:
                size, last_output = grown, now
            if fault and not disturbed and now - start > moment and (event is None or any(folder.glob(event))):
                disturbed = True
                self.counts[fault] += 1
                self.disturb(pid, fault)
            if now - last_output > HANG:
                hangs = True
                os.killpg(pid, signal.SIGKILL)
        status = int(self.server.stdout.readline())
        self.settle()
        if not fault and status == 0:
            self.seconds[kind] = time.monotonic() - start
        self.counts[program] += 1
        print(f"{time.monotonic() - start:5.1f} s, status {status:3}: {program}, {fault or 'no fault'}", flush=True)
        reason = f"{HANG} s without output" if hangs else self.wrong_exit(program, status, fault if disturbed else "")
        if reason:
            self.violate(f"{program} ends with status {status} after {fault or 'no fault'}: {reason}")
        return status

    def disturb(self, pid: int, fault: str):
        if fault == "full disk":
            left = shutil.disk_usage(self.disk).free - self.random.choice([0, 4096, 20_000, 100_000, 300_000])
            with contextlib.suppress(OSError), open(self.disk / "filling", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(left, 1))
        elif fault == "network":
            kinds = [Fault(status=503), *map(lambda cut: Fault(cut=cut), CUTS[1:]), Fault(delay=20)]
            self.hub.faults[:] = [self.random.choice(kinds)]
            self.hub.faults[0].times = self.random.choice([1, 3, 10**9])
        elif fault == "SIGINT":
            os.killpg(pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(pid, SIGNALS[fault])

    def settle(self):
        (self.disk / "filling").unlink(missing_ok=True)
        self.hub.faults.clear()

    def wrong_exit(self, program: str, status: int, fault: str) -> str:
        """Why this end of a command is wrong; "" if it is right."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        last = lines[-1] if lines else ""
        # Python itself ignores what is raised while it deletes an object, and says so; that is no end of a command.
        before = ["", *lines]
        if any("Traceback" in line and "Exception ignored in" not in one for one, line in zip(before, lines)):
            return "a traceback"
        if fault == "kill" and status == -signal.SIGKILL:
            return ""
        if not fault:
            return "" if status == 0 else "it was not disturbed"
        if status in (1, 2):
            return "" if last.startswith(f"{program}: error: ") else "no line that says why"
        if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            starts = ("stopped by a signal: ", f"{program}: stopped by ")
            return "" if any(line.startswith(starts) for line in lines) else "no line that says why"
        # A signal after the last line finds an interpreter that is ending.
        is_over = status in (-signal.SIGTERM, -signal.SIGINT) and any("saved in" in line for line in lines)
        return "" if status == 0 or is_over else "unexpected"

    def violate(self, text: str):
        lines = self.log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        self.violations.append(text)
        print("\n    ".join([f"VIOLATION: {text}", *lines[-25:]]), flush=True)

    # What a folder holds

    def check(self, folder: Path, reference: dict | None = None):
        """Checkpoints open; metrics have each line once; card, metrics and weights agree if the run is finished."""
        try:
            for checkpoint in complete_checkpoints(folder):
                read_state(checkpoint)
            if not (folder / "finished.json").exists():
                return
            found = self.agree(folder)
        except (UserError, OSError, AssertionError) as error:
            return self.violate(f"{type(error).__name__} in {folder.name}: {error}")
        if reference is not None and found != reference:
            self.violate(f"{folder.name} has other weights or metrics than a run that nothing disturbed")

    def agree(self, folder: Path) -> dict:
        """What must be equal in all runs of a variant. Raises AssertionError if card, metrics and weights disagree."""
        rows = read_metrics(folder)
        keys = [(row["step"], row["split"], row.get("weights")) for row in rows]
        assert len(keys) == len(set(keys)), "metrics.jsonl has a line twice"
        result, card = rows[-1], ModelCard.load(folder / "README.md")
        assert result["split"] == "test", "metrics.jsonl does not end with the test"
        processor = AutoImageProcessor.from_pretrained(folder)
        model = ViTSimpleForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(processor(self.images, return_tensors="pt").pixel_values).logits
        correct = int((logits.argmax(1) == self.labels).sum())
        loss = F.cross_entropy(logits, self.labels).item()
        assert correct == result["correct"], f"the weights have {correct} correct, metrics.jsonl {result['correct']}"
        assert abs(loss - result["loss"]) < 1e-3, f"the weights have the loss {loss}, metrics.jsonl {result['loss']}"
        values = [metric.metric_value for metric in card.data.eval_results]
        assert result["top1"] in values, f"the card has {values}, metrics.jsonl {result['top1']}"
        assert f"({result['correct']} correct)" in card.text, f"the card does not say {result['correct']} correct"
        times = {"images_per_second", "data_wait"}
        numbers = [{name: row[name] for name in row.keys() - times} for row in rows]
        return {"weights": (folder / "model.safetensors").read_bytes(), "metrics": numbers}

    # A round

    def round(self, number: int):
        """Train with faults until the run is finished; sometimes train the end again; sometimes push."""
        variant = self.random.randrange(len(VARIANTS))
        options = ["--dataset_name", self.disk / "images", *OPTIONS, *VARIANTS[variant]]
        if variant not in self.references:
            folder = self.disk / f"reference-{variant}"
            self.call("train.py", folder, ["--output_dir", folder, *options])
            self.references[variant] = self.agree(folder)
            shutil.rmtree(folder)
        folder, name = self.disk / f"round-{number}", f"user/round-{number}"
        strategy = self.random.choice([*[None] * 4, "end", "every_save"])
        push = ["--push_to_hub", "--hub_model_id", name, "--hub_strategy", strategy] if strategy else []
        faults = [self.random.choice([*self.faults, *["network"] * 3 * bool(push)]) for _ in range(3)]
        self.train(folder, variant, [*options, *push], faults)
        if self.random.random() < 0.5 and (kept := complete_checkpoints(folder)):
            resume = ["--resume_from_checkpoint", kept[0]]
            self.call("train.py", folder, ["--output_dir", folder, *options, *resume], self.random.choice(self.faults))
            self.check(folder, self.references[variant])
            self.train(folder, variant, options, [])
        if push:
            self.push(folder, name)
        shutil.rmtree(folder)
        self.counts["rounds"] += 1

    def train(self, folder: Path, variant: int, options: list, faults: list[str]):
        """Starts or resumes a run until it is finished, with one fault at a time."""
        for fault in [*faults, ""]:
            resume = ["--resume_from_checkpoint", "latest"] if folder.exists() else []
            if not (folder / "finished.json").exists():
                self.call("train.py", folder, ["--output_dir", folder, *options, *resume], fault)
                self.check(folder, self.references[variant])
        if not (folder / "finished.json").exists():
            self.violate(f"{folder.name} cannot be finished")

    def push(self, folder: Path, name: str):
        """Pushes a finished run, with a fault and without; the Hub then has what the folder has."""
        for fault in (self.random.choice([*self.faults, *["network"] * 3]), ""):
            self.call("push_to_hub.py", folder, [folder, name], fault)
        files = self.hub.repos[f"models/{name}"].at("main").files
        for file in ("model.safetensors", "metrics.jsonl", "README.md"):
            if files[file] != (folder / file).read_bytes():
                self.violate(f"{file} on the Hub is not that of {folder.name}")


def write_dataset(folder: Path) -> tuple[list[PIL.Image.Image], torch.Tensor]:
    """Random images in parquet files; returns the images and the labels of the test split."""
    generator, features = np.random.default_rng(0), Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    folder.mkdir()
    for name in ("train-0", "train-1", "train-2", "validation-0", "test-0"):
        images = [PIL.Image.fromarray(generator.integers(256, size=(10, 10, 3), dtype=np.uint8)) for _ in range(24)]
        labels = generator.integers(2, size=len(images)).tolist()
        Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(folder / f"{name}.parquet")
    return images, torch.tensor(labels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)  # a tmpfs, in the process that has mounted it
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    can_mount = (
        shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    )
    if options.disk is None and can_mount:
        with tempfile.TemporaryDirectory() as disk:
            mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=200m soak "$0" && exec "$@"', disk]
            return subprocess.run(
                [*mount, sys.executable, "-m", "tests.soak", *arguments, "--disk", disk], cwd=ROOT
            ).returncode
    with tempfile.TemporaryDirectory() as work, Hub({TOKEN: "user"}) as hub:
        soak = Soak(Path(work), options.disk or Path(work), hub, options.seed, options.disk is not None)
        start = time.monotonic()
        while not soak.counts["rounds"] or time.monotonic() - start < 60 * options.minutes:
            soak.round(soak.counts["rounds"])
        soak.server.stdin.close()
    counts = ", ".join(f"{count} {name}" for name, count in soak.counts.items())
    print(f"soak, seed {options.seed}: {counts}, {len(soak.violations)} violations", flush=True)
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
