import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_hub.hub import Hub
from vit_simple.sharing.card import build_card

TOKEN = "hf_plantedplantedplantedplanted"
NAME = "user/digits"
PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def hub():
    with Hub({TOKEN: "user"}) as hub:
        yield hub


@pytest.fixture
def folder(run_folder, tmp_path) -> Path:
    """The folder of a run, with a license in its card."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "digits"))
    (folder / "README.md").write_text(build_card(folder, license="mit"))
    return folder


def edit(file: Path, old: str, new: str):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def call(hub: Hub, work: Path, *command, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """Runs Python in a fresh process that knows no Hub but this one; it must not print the token."""
    variables = {**hub.environment(work / "home", token), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert TOKEN not in result.stdout + result.stderr
    return result


def call_program(hub: Hub, work: Path, name: str, *arguments, **options) -> str:
    """The output of a file in programs/."""
    result = call(hub, work, PROGRAMS / name, *arguments, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout
