"""Which folders in checkpoints/ are checkpoints, and whether they are as they were saved."""

import hashlib
import re
import shlex
import shutil
from pathlib import Path

from ..files import UserError, check_types, read_json, read_text

NAME = re.compile(r"step_([0-9]{6}|[1-9][0-9]{6,})")
UNFINISHED = re.compile(rf"\.{NAME.pattern}(\.new)?")  # being deleted, or written
STATE = "state.json"
SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` reads it, too
STATE_FIELDS = {
    "step": int,
    "processes": int,
    "loss_sums": list[float],
    "bad_images": dict[str, dict[str, str]],
    "places": list[dict[str, list[int]]] | None,
    "data": dict | None,  # the dataset's fingerprint
}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest last. Other files and folders beside them are ignored."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted((path for path in found if NAME.fullmatch(path.name) and (path / STATE).is_file()), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(complete_checkpoints(folder)), None)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(checkpoint: Path):
    """Writes the hashes of a checkpoint's files into it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(checkpoint).as_posix()}\n" for path in files]
    (checkpoint / SUMS).write_text("".join(lines), encoding="utf-8")


def read_state(checkpoint: Path) -> dict:
    """The content of state.json. Every file of the checkpoint is compared with its hash, if it has hashes.

    Raises:
        UserError: a file is missing or is not as it was saved.
    """
    sums = checkpoint / SUMS
    lines = [line.partition("  ") for line in read_text(sums).splitlines()] if sums.is_file() else []
    for expected, _, name in lines:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name} is missing")
        if sha256(checkpoint / name) != expected:
            raise UserError(f"{checkpoint / name} is not as it was saved: its SHA-256 differs from {SUMS}")
    state = read_json(checkpoint / STATE)
    check_types(state, STATE_FIELDS, str(checkpoint / STATE))
    if state.get("data") is not None and STATE not in [name for _, _, name in lines]:
        raise UserError(f"{sums} is missing or damaged")
    if len(state["loss_sums"]) != state["processes"] or state["step"] != step_of(checkpoint):
        raise UserError(f"{checkpoint / STATE} does not fit {checkpoint.name}")
    return state


def open_checkpoint(checkpoint: Path) -> dict:
    """As `read_state`, but the error also says which other checkpoint is good."""
    try:
        return read_state(checkpoint)
    except UserError as error:
        raise damaged(checkpoint, str(error)) from error


def damaged(checkpoint: Path, reason: str) -> UserError:
    """The error for a checkpoint that cannot be used; it names the newest other one that is good."""
    for other in reversed(complete_checkpoints(checkpoint.parent.parent)):
        if other.name != checkpoint.name and is_good(other):
            option = shlex.join(["--resume_from_checkpoint", str(other)])
            return UserError(f"{reason}; the newest other good checkpoint: {option}")
    return UserError(f"{reason}; there is no other good checkpoint")


def is_good(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except UserError:
        return False
    return True


def delete(checkpoint: Path):
    """Deletes a checkpoint. Renames it first, so that the rest after a kill does not look like a checkpoint."""
    renamed = checkpoint.with_name(f".{checkpoint.name}")
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)
