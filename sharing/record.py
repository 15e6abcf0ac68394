"""provenance.json and the other JSON of a folder: how a checkpoint came to be, and what was measured."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from ..files import RECORD, ROOT, read_json, write_atomically

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy")


def hardware() -> str:
    """The processors that this process computes on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return f"{os.cpu_count()} cores of {named[1] if named else platform.processor() or platform.machine()}"


def record(folder: Path, **facts):
    """Adds to provenance.json how the checkpoint came to be: the command, the machine, versions, and `facts`."""
    found = read_json(folder / RECORD)

    def git(*words) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    here = (top := git("rev-parse", "--show-toplevel")) and ROOT.samefile(top)  # not of a folder above
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    found |= {
        "commands": list(dict.fromkeys([*found.get("commands", []), command])),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if here else None,
        **{name: value for name, value in facts.items() if value is not None},
    }
    write_atomically(folder / RECORD, json.dumps(found, indent=2) + "\n")
