"""The metrics and the checkpoints of a run. It can be killed at any moment and resumed."""

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..data.dataloader import MapStyleSplit
from ..data.streaming import StreamingSplit
from ..files import RunError, terminal_text, write_atomically
from .folder import complete_checkpoints, delete
from .meter import Meter
from .optim import EMA

Splits = dict[str, MapStyleSplit | StreamingSplit]


# metrics.jsonl


def log_metrics(accelerator: Accelerator, folder: Path, steps_per_epoch: int, step: int, split: str, **values):
    """Appends a line to metrics.jsonl and sends the numbers to the tracker, if there is one."""
    if accelerator.is_main_process:
        record = {"step": step, "epoch": step / steps_per_epoch, "split": split, **values}
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    prefix = f"{split}_ema" if values.pop("weights", "raw") == "ema" else split
    numbers = {f"{prefix}/{name}": value for name, value in values.items() if not isinstance(value, dict)}
    accelerator.log(numbers, step=step)


def cut_metrics(folder: Path, step: int):
    """Removes from metrics.jsonl the lines after a step, and a line that was not written completely."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step and record["split"] != "test":
            lines.append(line + "\n")
    write_atomically(path, "".join(lines))


# Checkpoints


def gather_bad_images(splits: Splits) -> dict[str, dict[str, str]]:
    """The images that each split has skipped in all processes: split -> row -> reason."""
    return {
        name: dict(item for items in gather_object([list(split.bad.items())]) for item in items)
        for name, split in splits.items()
    }


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, meter: Meter, splits: Splits, ema: EMA, limit: int
):
    """Writes checkpoints/step_N under another name, flushes and renames it; keeps the last `limit` checkpoints.

    Called by every process.

    Raises:
        RunError: it cannot be written; earlier checkpoints are intact.
    """
    state = {
        "step": step,
        "processes": accelerator.num_processes,
        "loss_sums": accelerator.gather(meter.loss_sum).tolist(),
        "bad_images": gather_bad_images(splits),
    }
    if isinstance(splits["train"], StreamingSplit):
        state["places"] = gather_object([splits["train"].state_dict()])
    target = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = target.with_name(f".{target.name}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(unfinished))
        if accelerator.is_main_process:
            if averages := ema.state_dict():
                safetensors.torch.save_file(averages, unfinished / "ema.safetensors")
            write_atomically(unfinished / "state.json", json.dumps(state))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            flush(unfinished)
            unfinished.rename(target)
            flush(target.parent)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the last two
        raise RunError(f"step {step} cannot be saved: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if accelerator.is_main_process:
        for old in complete_checkpoints(folder)[:-limit]:
            delete(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, meter: Meter, splits: Splits, ema: EMA) -> int:
    """Restores everything that `save_checkpoint` wrote; returns the step. Called by every process."""
    accelerator.load_state(str(checkpoint))
    if ema.averages:
        ema.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    meter.loss_sum.fill_(state["loss_sums"][accelerator.process_index])
    for name, bad_images in state["bad_images"].items():
        splits[name].bad.update(bad_images)
    if isinstance(splits["train"], StreamingSplit):
        note = splits["train"].load_state_dict(state["places"][accelerator.process_index])
        if note:
            accelerator.print(terminal_text(note))
    accelerator.print(terminal_text(f"resuming from {checkpoint}"))
    return state["step"]


def flush(folder: Path):
    """Waits until a folder and all its files are on the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
