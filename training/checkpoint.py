"""The metrics, the checkpoints and the result of a run. It can be killed at any moment and resumed.

A resumed run changes nothing that an earlier one has left until it has saved a checkpoint of its own or reached its
end: until then it logs to .metrics.jsonl, and later checkpoints and the mark of a finished run stay.
"""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..data.dataloader import MapStyleSplit
from ..data.randaugment import DRAWS_VERSION
from ..data.streaming import StreamingSplit
from ..files import ADAPTER, RunError, errors_that_name, is_machine_failure, terminal_text
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .folder import FINISHED
from .integrity import complete_checkpoints, damaged, delete, step_of, write_sums
from .lora import merge_lora, save_adapter
from .meter import Meter
from .optim import EMA

Splits = dict[str, MapStyleSplit | StreamingSplit]


# metrics.jsonl


def pending_metrics(folder: Path) -> Path:
    """Where a resumed run logs until what an earlier one has left can be replaced."""
    return folder / ".metrics.jsonl"


def log_metrics(accelerator: Accelerator, folder: Path, steps_per_epoch: int, step: int, split: str, **values):
    """Appends a line to metrics.jsonl and sends the numbers to the tracker, if there is one.

    Raises:
        RunError: a number is not finite.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"{name} of the split {split!r} at step {step} is {value}: try a lower learning rate")
    if accelerator.is_main_process:
        record = {"step": step, "epoch": step / steps_per_epoch, "split": split, **values}
        pending = pending_metrics(folder)
        path = pending if pending.exists() else folder / "metrics.jsonl"
        with errors_that_name(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    prefix = f"{split}_ema" if values.pop("weights", "raw") == "ema" else split
    numbers = {f"{prefix}/{name}": value for name, value in values.items() if not isinstance(value, dict)}
    accelerator.log(numbers, step=step)


def resume_metrics(folder: Path, step: int):
    """Copies the lines of metrics.jsonl up to a step to where the resumed run logs.

    A line that was not written completely ends the copy.
    """
    path, lines = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            is_kept = record["step"] <= step and record["split"] != "test"
        except (ValueError, LookupError, TypeError):
            break
        if is_kept:
            lines.append(line + "\n")
    with errors_that_name(pending_metrics(folder)):
        pending_metrics(folder).write_text("".join(lines), encoding="utf-8")


# Checkpoints


def gather_bad_images(splits: Splits) -> dict[str, dict[str, str]]:
    """The images that each split has skipped in all processes: split -> row -> reason."""
    return {
        name: dict(item for items in gather_object([list(split.bad.items())]) for item in items)
        for name, split in splits.items()
    }


def count_changed_images(splits: Splits) -> dict[str, int]:
    """How many images a pipeline sees with other pixels: reason, see `load_rgb` -> number. Called by every process."""
    changed = {
        (name, row): reason
        for name, split in splits.items()
        for items in gather_object([list(split.changed.items())])
        for row, reason in items
    }
    return dict(sorted(Counter(changed.values()).items()))


class Checkpoints:
    """Saves and loads the checkpoints of a run. Every process calls `save` and `load`.

    Args:
        limit: how many are kept.
        data: the fingerprint of the dataset.

    Attributes:
        first_step: the number of steps of the checkpoint that the run resumed from, 0 for a new run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        meter: Meter,
        splits: Splits,
        ema: EMA,
        limit: int,
        data: dict[str, int | str],
    ):
        self.accelerator, self.folder, self.meter = accelerator, folder, meter
        self.splits, self.ema, self.limit, self.data = splits, ema, limit, data
        self.first_step = 0

    def save(self, step: int):
        """Writes checkpoints/step_N under another name, flushes and renames it; keeps the last `limit` checkpoints.

        Raises:
            RunError: the weights are not finite, or it cannot be written; earlier checkpoints are intact.
        """
        accelerator = self.accelerator
        self.meter.raise_if_not_finite(step)
        state = {
            "step": step,
            "processes": accelerator.num_processes,
            "loss_sums": accelerator.gather(self.meter.loss_sum).tolist(),
            "bad_images": gather_bad_images(self.splits),
            "data": self.data,
            "draws": DRAWS_VERSION,
        }
        if isinstance(self.splits["train"], StreamingSplit):
            state["places"] = gather_object([self.splits["train"].state_dict()])
        target = self.folder / "checkpoints" / f"step_{step:06d}"
        unfinished = target.with_name(f".{target.name}.new")  # not the name that `delete` gives to an older one
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                if averages := self.ema.state_dict():
                    safetensors.torch.save_file(averages, unfinished / "ema.safetensors")
                (unfinished / "state.json").write_text(json.dumps(state), encoding="utf-8")
                write_sums(unfinished)
                flush(unfinished)
                self.replace_earlier()
                unfinished.rename(target)
                flush(target.parent)
            accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the last two
            raise RunError(f"step {step} cannot be saved: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if accelerator.is_main_process:
            for old in complete_checkpoints(self.folder)[: -self.limit]:
                delete(old)

    def replace_earlier(self):
        """Removes what an earlier run has left after the step that this one resumed from.

        Called by the main process, once a checkpoint or the result that replaces it is complete.
        """
        pending = pending_metrics(self.folder)
        if not pending.exists():
            return
        (self.folder / FINISHED).unlink(missing_ok=True)
        for later in reversed(complete_checkpoints(self.folder)):
            if step_of(later) > self.first_step:
                delete(later)
        pending.replace(self.folder / "metrics.jsonl")

    def load(self, checkpoint: Path):
        """Restores everything that `save` wrote.

        Raises:
            UserError: a file is damaged, or the weights are not finite.
        """
        accelerator, state = self.accelerator, json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        try:
            accelerator.load_state(str(checkpoint))
            if self.ema.averages:
                self.ema.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
            self.meter.raise_if_not_finite(state["step"])
        except (EOFError, FileNotFoundError, RuntimeError, SafetensorError, UnpicklingError) as error:
            if is_machine_failure(error) and not isinstance(error, (FileNotFoundError, RunError)):
                raise
            raise damaged(checkpoint, f"{checkpoint} cannot be loaded: {error}") from error
        self.meter.loss_sum.fill_(state["loss_sums"][accelerator.process_index])
        for name, bad_images in state["bad_images"].items():
            self.splits[name].bad.update(bad_images)
        if isinstance(self.splits["train"], StreamingSplit):
            note = self.splits["train"].load_state_dict(state["places"][accelerator.process_index])
            if note:
                accelerator.print(terminal_text(note))
        accelerator.print(terminal_text(f"resuming from {checkpoint}"))
        self.first_step = state["step"]


# The result


def save_result(model: ViTSimpleForImageClassification, weights: dict, folder: Path, adapter_base: str | None = None):
    """Saves weights, config and code. They are written aside first, so that no full disk destroys an earlier result.

    Args:
        adapter_base: a checkpoint, to save the adapter that LoRA adds to it; by default, LoRA is merged.

    Raises:
        RunError: they cannot be written.
    """
    unfinished = folder / ".result"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        if adapter_base is not None:
            save_adapter(model, weights, adapter_base, unfinished)
        else:
            # transformers 4 would split weights of more than 5 GB into shards, transformers 5 of more than 50 GB.
            model.save_pretrained(unfinished, state_dict=merge_lora(weights), max_shard_size="50GB")
        flush(unfinished)
        for path in sorted(unfinished.iterdir()):
            path.replace(folder / path.name)
        for path in [folder / name for name in ADAPTER] if adapter_base is None else folder.glob("model*.safetensors*"):
            path.unlink(missing_ok=True)  # of a result of the other kind, which would be loaded, too
    except (OSError, SafetensorError) as error:
        raise RunError(f"the weights cannot be saved in {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def flush(folder: Path):
    """Waits until a folder and all its files are on the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
