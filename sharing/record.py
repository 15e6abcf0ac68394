"""provenance.json: how a checkpoint was made."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .. import __version__
from ..files import RECORD, ROOT, read_json, write_atomically
from .outgoing import cut_record

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")


def processor_name() -> str:
    """The name of the CPU; platform.processor() does not know it on Linux."""
    cpu = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def hardware() -> str:
    """The devices that this process computes on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores of {processor_name()}"


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of those that it needs."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "vit_simple": __version__, **packages}


def source_commit() -> str | None:
    """The git commit of this package, None if it is installed without its repository or there is no git."""

    def git(*arguments) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return None
    repository = git("rev-parse", "--show-toplevel")
    if not repository or not ROOT.samefile(repository):  # a repository above an installed package is another one
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def record(folder: Path, **facts):
    """Adds the command, the machine, the versions and `facts` to provenance.json; a fact that is None is removed.

    Absolute paths are cut to their last part, because the file is shared.
    """
    content = read_json(folder / RECORD)
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    content |= {
        "commands": [*(content.get("commands") or []), command],
        "hardware": hardware(),
        "versions": versions(),
        "commit": source_commit(),
        **facts,
    }
    content = cut_record({name: value for name, value in content.items() if value is not None or name not in facts})
    content["commands"] = list(dict.fromkeys(content["commands"]))
    write_atomically(folder / RECORD, json.dumps(content, indent=2) + "\n")
