"""A run's folder: its recipe, its metrics and its checkpoints, written so that a run can be killed at any moment."""

import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import yaml
from accelerate import Accelerator

from ..data.randaugment import DRAWS_VERSION
from ..files import write_atomically
from .config import TrainConfig
from .optim import EMA

# What may change when a run goes on: nothing of it changes a weight, but for the decoding processes of a stream.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "on_bad_image",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "license",
}


def flush(folder: Path):
    """Waits until a folder and all files in it are on the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest last; one that is being written or deleted has a name with a dot."""
    return sorted((folder / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def delete(checkpoint: Path):
    """Renames it first: what a kill leaves is not taken for a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def open_folder(config: TrainConfig, processes: int) -> tuple[Path, Path | None]:
    """The run's folder, made where it is new, and the checkpoint to go on from, if any.

    A new run gets the folder asked for, or the next free outputs/NAME[-N]; `latest` gets the newest of those.

    Raises:
        ValueError: a new run's folder has files in it, a resumed one's recipe or number of processes is another, the
            checkpoint is not one, or the folder cannot be written.
    """
    resume = config.resume_from_checkpoint
    name = Path(config.dataset_name).resolve().name
    numbered = (Path("outputs") / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    taken = []
    free = next(folder for folder in numbered if not folder.exists() or taken.append(folder))
    checkpoint = None
    if resume not in (None, "latest"):
        checkpoint = Path(resume)
        if not (checkpoint / "state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint: expected latest or a run's checkpoints/step_N, got {resume}")
        folder = checkpoint.resolve().parent.parent
        if config.output_dir is not None and Path(config.output_dir).resolve() != folder:
            raise ValueError(f"--output_dir: expected {folder}, the run of the checkpoint, got {config.output_dir}")
    elif config.output_dir is not None:
        folder = Path(config.output_dir)
    else:
        folder = taken[-1] if resume and taken else free
    try:
        folder.mkdir(parents=True, exist_ok=folder != free)  # two runs may have found the same free name
        if resume is None and any(folder.iterdir()):
            raise ValueError(f"--output_dir: expected a new or an empty folder, got {folder} with files in it")
        if resume == "latest":
            checkpoint = next(reversed(complete_checkpoints(folder)), None)
        recipe = asdict(config)
        del recipe["output_dir"], recipe["resume_from_checkpoint"]
        if (folder / "train_config.yaml").is_file():
            refuse_another_recipe(folder, recipe, checkpoint, processes)
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"--output_dir: expected a run's folder, got {folder} without train_config.yaml")
        write_atomically(folder / "train_config.yaml", yaml.safe_dump(recipe, sort_keys=False))
        for path in (folder / "checkpoints").glob(".step_*"):
            shutil.rmtree(path)
        if checkpoint is not None:
            checkpoints = complete_checkpoints(folder)
            for later in checkpoints[checkpoints.index(folder / "checkpoints" / checkpoint.name) + 1 :]:
                delete(later)  # of a way that is not gone on
    except OSError as error:
        raise ValueError(f"--output_dir: {folder} cannot be written: {error.strerror}") from error
    return folder, checkpoint


def refuse_another_recipe(folder: Path, recipe: dict, checkpoint: Path | None, processes: int):
    """Raises ValueError with the fields in which the recipe differs from that of the run in the folder."""
    before = asdict(TrainConfig()) | yaml.safe_load((folder / "train_config.yaml").read_text(encoding="utf-8"))
    if checkpoint is not None:
        state = json.loads((checkpoint / "state.json").read_text("utf-8"))
        before["number of processes"], version = state["processes"], state.get("draws", 1)
        if recipe["randaugment_num_ops"] and version != DRAWS_VERSION:
            raise ValueError(
                f"--resume_from_checkpoint: expected version {DRAWS_VERSION} of RandAugment's draws, got version "
                f"{version} in {checkpoint}: resume it with the code that began it, or begin a new run"
            )
        recipe = recipe | {"number of processes": processes}
    names = [name for name in recipe if name not in FREE and recipe[name] != before.get(name)]
    if names:
        differing = ", ".join(f"{name} ({before.get(name)!r} there, {recipe[name]!r} here)" for name in names)
        raise ValueError(f"--resume_from_checkpoint: expected the recipe of {folder}, which differs in {differing}")


def cut_metrics(folder: Path, step: int):
    """Leaves in metrics.jsonl what a run had logged when it reached the step; a line written in part goes, too."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step and row["split"] != "test":
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, state: dict, averaged: EMA | None, limit: int):
    """Writes checkpoints/step_N aside, flushes it and renames it; keeps the last `limit`. Called by every process.

    Raises:
        OSError, RuntimeError, safetensors.SafetensorError: it cannot be written; what was there before still is.
    """
    target = folder / "checkpoints" / f"step_{step:06d}"
    aside = target.with_name(f".{target.name}")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(aside))
        averages = averaged.state_dict() if averaged else None
        if accelerator.is_main_process:
            if averages:
                safetensors.torch.save_file(averages, aside / "ema.safetensors")
            write_atomically(
                aside / "state.json",
                json.dumps({"step": step, "processes": accelerator.num_processes, "draws": DRAWS_VERSION, **state}),
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            flush(aside)
            aside.rename(target)
            flush(target.parent)
        accelerator.wait_for_everyone()
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in complete_checkpoints(folder)[:-limit]:
            delete(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, averaged: EMA | None) -> dict:
    """Puts a checkpoint into what `accelerator` has prepared and into the averages; returns its state.json."""
    accelerator.load_state(str(checkpoint))
    if averaged:
        averaged.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
