"""The folder of a run: which one it is, and whether a run can resume in it."""

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from ..files import UserError, file_name, write_atomically
from .config import TrainConfig

# These options may change when a run resumes. They change no weight, except the number of workers of a stream.
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


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest last. A name with a dot is a checkpoint being written or deleted."""
    return sorted((folder / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(complete_checkpoints(folder)), None)


def how_to_resume(folder: Path) -> str:
    """What to do after a failure, as the end of an error message."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return f"there is no checkpoint in {folder}"
    return (
        f"the last good checkpoint is {checkpoint}; to continue, repeat the command with "
        f"--output_dir {folder} --resume_from_checkpoint latest"
    )


def choose_folder(config: TrainConfig) -> tuple[Path, Path | None]:
    """The folder that the options ask for, and the checkpoint if they name one.

    A new run without --output_dir gets the next free outputs/NAME[-N]; `latest` gets the newest one in use.

    Raises:
        UserError: the path is not a checkpoint, or belongs to a run in another folder.
    """
    resume = config.resume_from_checkpoint
    if resume not in (None, "latest"):
        checkpoint = Path(resume)
        if not (checkpoint / "state.json").is_file():
            raise UserError(f"--resume_from_checkpoint: expected latest or a checkpoints/step_N folder, got {resume}")
        folder = checkpoint.resolve().parent.parent
        if config.output_dir is not None and Path(config.output_dir).resolve() != folder:
            raise UserError(f"--output_dir: expected {folder}, the run of the checkpoint, got {config.output_dir}")
        return folder, checkpoint
    if config.output_dir is not None:
        return Path(config.output_dir), None
    name = file_name(Path(config.dataset_name).resolve().name)
    numbered = (Path("outputs") / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    in_use = list(itertools.takewhile(Path.exists, numbered))
    if resume and in_use:
        return in_use[-1], None
    folder = Path("outputs") / (f"{name}-{len(in_use) + 1}" if in_use else name)
    folder.mkdir(parents=True)  # fails if another run has just taken the name
    return folder, None


def open_folder(config: TrainConfig, processes: int) -> tuple[Path, Path | None]:
    """Opens the folder of a new or resumed run; returns it and the checkpoint to resume from, if any.

    Raises:
        UserError: the folder of a new run has files in it, that of a resumed run has another recipe or number of
            processes, the checkpoint is not one, or the folder cannot be written.
    """
    try:
        folder, checkpoint = choose_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if config.resume_from_checkpoint is None and any(folder.iterdir()):
            raise UserError(f"--output_dir: expected a new or empty folder, got {folder} with files in it")
        if config.resume_from_checkpoint == "latest":
            checkpoint = latest_checkpoint(folder)
        recipe = asdict(config)
        del recipe["output_dir"], recipe["resume_from_checkpoint"]
        if (folder / "train_config.yaml").is_file():
            check_same_recipe(folder, recipe, checkpoint, processes)
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"--output_dir: expected the folder of a run, got {folder} without train_config.yaml")
        write_atomically(folder / "train_config.yaml", yaml.safe_dump(recipe, sort_keys=False))
        for path in (folder / "checkpoints").glob(".step_*"):
            shutil.rmtree(path)
        if checkpoint is not None:
            checkpoints = complete_checkpoints(folder)
            for later in checkpoints[checkpoints.index(folder / "checkpoints" / checkpoint.name) + 1 :]:
                delete(later)  # the resumed run writes its own
    except OSError as error:
        raise UserError(f"--output_dir: {error.filename} cannot be written: {error.strerror}") from error
    return folder, checkpoint


def check_same_recipe(folder: Path, recipe: dict, checkpoint: Path | None, processes: int):
    """Raises UserError with the options that differ from those of the run in the folder."""
    before = asdict(TrainConfig()) | yaml.safe_load((folder / "train_config.yaml").read_text(encoding="utf-8"))
    if checkpoint is not None:
        before["number of processes"] = json.loads((checkpoint / "state.json").read_text("utf-8"))["processes"]
        recipe = recipe | {"number of processes": processes}
    names = [name for name in recipe if name not in FREE and recipe[name] != before.get(name)]
    if names:
        changes = ", ".join(f"{name} was {before.get(name)!r}, is now {recipe[name]!r}" for name in names)
        raise UserError(f"cannot resume {folder} with other options: {changes}")


def delete(checkpoint: Path):
    """Deletes a checkpoint. Renames it first, so that the rest after a kill does not look like a checkpoint."""
    renamed = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)
