"""The folder of a run: which one it is, whether a run can start or resume in it, and when it is finished."""

import contextlib
import json
import os
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from ..data.fingerprint import differences
from ..data.loading import local_path
from ..data.randaugment import DRAWS_VERSION
from ..files import UserError, check_types, file_name, read_text, write_atomically
from .config import OPTIONS, TrainConfig
from .integrity import NAME, UNFINISHED, latest_checkpoint, open_checkpoint
from .lock import LOCK, lock

FINISHED = "finished.json"  # is there once the weights, the metrics and the model card of a run are complete

# These options may change when a run resumes. They change no weight, except the number of workers of a stream.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "lora_save",
    "probe",
    "on_bad_image",
    "report_to",
    "card_images",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "license",
}


def how_to_resume(folder: Path) -> str:
    """What to do after a failure, as the end of an error message."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return f"there is no checkpoint in {folder}"
    options = shlex.join(["--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    return f"the last good checkpoint is {checkpoint}; to continue, repeat the command with {options}"


def check_output_dir(config: TrainConfig):
    """Raises UserError if the run's folder would be inside the dataset's, where its files are taken for data."""
    dataset, resume = local_path(config.dataset_name), config.resume_from_checkpoint
    output = Path(config.output_dir or ("outputs" if resume in (None, "latest") else resume)).resolve()
    if dataset.is_dir() and not config.eval_only and output.is_relative_to(dataset.resolve()):
        raise UserError(f"--output_dir: expected a folder outside the dataset {dataset}, got {output} inside it")


def folder_of(checkpoint: Path, output_dir: str | None) -> Path:
    """The folder of the run that a checkpoint belongs to; checkpoints/ may be a link to another disk.

    Raises:
        UserError: the path is not a checkpoint, or belongs to a run in another folder.
    """
    absolute = Path(os.path.abspath(checkpoint))
    candidates = dict.fromkeys([absolute.parent.parent, checkpoint.resolve().parent.parent])
    if output_dir is not None:
        candidates = {Path(output_dir): None, **candidates}
    folders = [folder for folder in candidates if (folder / "checkpoints" / absolute.name).exists()]
    folders = [folder for folder in folders if (folder / "checkpoints" / absolute.name).samefile(checkpoint)]
    if not (NAME.fullmatch(absolute.name) and (checkpoint / "state.json").is_file() and folders):
        raise UserError(f"--resume_from_checkpoint: expected latest or a checkpoints/step_N folder, got {checkpoint}")
    if output_dir is not None and Path(output_dir).resolve() != folders[0].resolve():
        raise UserError(f"--output_dir: expected {folders[0]}, the run of the checkpoint, got {output_dir}")
    return folders[0]


def choose_folder(config: TrainConfig) -> Path:
    """The folder that the options ask for.

    A new run without --output_dir gets the next outputs/NAME[-N]; `latest` gets the last one in use.
    """
    resume = config.resume_from_checkpoint
    if resume not in (None, "latest"):
        return folder_of(Path(resume), config.output_dir)
    if config.output_dir is not None:
        return Path(config.output_dir)
    name = file_name(Path(config.dataset_name).resolve().name)
    outputs, numbered = Path("outputs"), re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    outputs.mkdir(exist_ok=True)
    while True:
        matches = filter(None, (numbered.fullmatch(path.name) for path in outputs.iterdir()))
        used = {int(match[1] or 1): outputs / match[0] for match in matches}
        last = max(used, default=0)
        if resume and used:
            return used[last]
        folder = outputs / (f"{name}-{last + 1}" if used else name)
        with contextlib.suppress(FileExistsError):  # another run has just taken the name
            folder.mkdir()
            return folder


def open_folder(config: TrainConfig, processes: int, data: dict[str, int | str]) -> tuple[Path, Path | None]:
    """Opens the folder of a new or resumed run and makes this process its owner. No file in it changes.

    Args:
        data: the fingerprint of the dataset.

    Returns:
        The folder, and the checkpoint to resume from, if there is one.

    Raises:
        UserError: the folder of a new run has files in it; that of a resumed run is finished, belongs to another
            process, or has another recipe, dataset or number of processes; the checkpoint is not one or is damaged; or
            the folder cannot be written.
    """
    try:
        folder = choose_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder, config)
        lock(folder)
        check_folder(folder, config)  # again, since another run may have just ended in it
    except OSError as error:
        raise UserError(f"--output_dir: {error.filename or folder} cannot be written: {error.strerror}") from error
    if config.resume_from_checkpoint is None:
        return folder, None
    checkpoint = latest_checkpoint(folder)
    if config.resume_from_checkpoint != "latest":
        checkpoint = folder / "checkpoints" / Path(os.path.abspath(config.resume_from_checkpoint)).name
    if checkpoint is not None:
        check_checkpoint(checkpoint, processes, data, config.randaugment_num_ops > 0)
    return folder, checkpoint


def check_folder(folder: Path, config: TrainConfig):
    """Raises UserError if no run with these options can start or resume in the folder."""
    names = {path.name for path in folder.iterdir()} - {LOCK}
    if config.resume_from_checkpoint is None:
        if names:
            raise UserError(f"--output_dir: expected a new or empty folder, got {folder} with files in it")
        return
    if "train_config.yaml" in names:
        check_recipe(folder, recipe_of(config))
    elif any(not name.startswith(".") for name in names):
        raise UserError(f"--output_dir: expected the folder of a run, got {folder} without train_config.yaml")
    if config.resume_from_checkpoint == "latest" and FINISHED in names:
        raise UserError(
            f"--resume_from_checkpoint latest: this run is finished, and its result is in {folder}; "
            "to train from one of its checkpoints again, name that one"
        )


def recipe_of(config: TrainConfig) -> dict:
    """The options that are kept in the run's folder."""
    recipe = asdict(config)
    del recipe["output_dir"], recipe["resume_from_checkpoint"]
    return recipe


def stored_recipe(folder: Path) -> dict:
    """All options of the run in the folder, {} if it has not begun.

    Raises:
        UserError: train_config.yaml is damaged.
    """
    file = folder / "train_config.yaml"
    if not file.is_file():
        return {}
    try:
        before = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: expected YAML: {error}") from error
    if not isinstance(before, dict):
        raise UserError(f"{file}: expected a mapping of options, got {type(before).__name__}")
    before = asdict(TrainConfig()) | before
    check_types(before, {name: option.type for name, option in OPTIONS.items()}, str(file))
    return before


def check_recipe(folder: Path, recipe: dict):
    """Raises UserError with the options that differ from those of the run in the folder."""
    before = stored_recipe(folder)
    if before["mixed_precision"] is None:  # an earlier version did not store the precision of `accelerate launch`
        before["mixed_precision"] = recipe["mixed_precision"]
    names = [name for name in recipe if name not in FREE and recipe[name] != before[name]]
    if names:
        changes = ", ".join(f"{name} was {before[name]!r}, is now {recipe[name]!r}" for name in names)
        raise UserError(f"cannot resume {folder} with other options: {changes}")


def check_checkpoint(checkpoint: Path, processes: int, data: dict[str, int | str], uses_randaugment: bool):
    """Raises UserError if the checkpoint is damaged, or is of another dataset, number of processes or RandAugment."""
    state = open_checkpoint(checkpoint)
    run = checkpoint.parent.parent
    if state["processes"] != processes:
        was = f"number of processes was {state['processes']}, is now {processes}"
        raise UserError(f"cannot resume {run} with other options: {was}")
    version = state.get("draws", 1)
    if uses_randaugment and version != DRAWS_VERSION:
        raise UserError(
            f"cannot resume {run}: it was trained with version {version} of RandAugment's random numbers, and this is "
            f"version {DRAWS_VERSION}; resume it with the code that started it, or start a new run"
        )
    if state.get("data") is None:
        print(
            f"warning: {checkpoint} was saved by an earlier version, without hashes: "
            "whether its files and the dataset are unchanged cannot be checked"
        )
    elif changes := differences(state["data"], data):
        raise UserError(f"cannot resume {run} with another dataset: {', '.join(changes)}")


def start_in(folder: Path, config: TrainConfig):
    """Writes the recipe, and deletes what an earlier run left unfinished. Called once the run can train."""
    write_atomically(folder / "train_config.yaml", yaml.safe_dump(recipe_of(config), sort_keys=False))
    for path in (folder / "checkpoints").glob(".step_*"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def mark_finished(folder: Path, step: int):
    """Says in the folder that the run is finished, so that it is not resumed by mistake."""
    write_atomically(folder / FINISHED, json.dumps({"step": step}) + "\n")
