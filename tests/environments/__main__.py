"""Runs the life of a small model in one environment after another, and prints a table of what works.

python -m tests.environments                                    every cell of the table
python -m tests.environments newest "transformers==5.17.0 torchvision"    two of them

A cell is what pip installs over the packages of this environment: requirements, `newest` or `oldest` for the newest
release of each library or the oldest that pyproject.toml allows, and `torchvision` for its Python part, which is all
that image processors need. torch stays the one that is installed here.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
OLDEST = dict(line.split(">=") for line in DEPENDENCIES)  # name: version
LIBRARIES = ("transformers", "accelerate", "datasets", "huggingface-hub", "kornia-rs", "safetensors")
TRANSFORMERS = (
    "4.57.6",
    "5.0.0",
    "5.3.0",
    "5.4.0",
    "5.8.1",
    "5.12.1",
    "5.15.1",
    "5.17.0",
    "5.18.0",
    "5.20.2",
    "5.21.1",
)
ROWS = [*(f"transformers=={number}" for number in TRANSFORMERS), "newest", "oldest"]
OTHERS = [f"{name}=={OLDEST[name]}" for name in ("accelerate", "datasets")]  # beside the transformers installed here
WORKS, REFUSES = "trains", "needs torchvision, and says so"
LIST_PACKAGES = """
import importlib.metadata, json
found = reversed(list(importlib.metadata.distributions()))  # the first of a name is the one that is imported
print(json.dumps({one.name.lower().replace("_", "-"): one.version for one in found}))
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def requirements(words: list[str]) -> list[str]:
    """What pip is asked for. The dependencies stand beside it, so that pip moves those that do not fit."""
    if "newest" in words:
        return ["--upgrade", *LIBRARIES]
    oldest = [f"{name}=={number}" for name, number in OLDEST.items() if name != "torch"]
    named = [word for word in words if word not in ("oldest", "torchvision")]
    return [*named, *(oldest if "oldest" in words else []), *DEPENDENCIES]


def make_environment(folder: Path, words: list[str]) -> Path:
    """The Python of a virtual environment with the packages of this one, but for those that a cell installs.

    Raises:
        CalledProcessError: pip finds no versions that fit together.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin/python"
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", command, check=True).stdout.strip())
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    run(*pip, *requirements(words), check=True)
    if "torchvision" in words:
        minor = int(version("torch").split(".")[1]) + 15  # torch 2.N has torchvision 0.(N + 15)
        run(*pip, "--no-deps", f"torchvision==0.{minor}.*", check=True)
        (site / "torchvision_operators.py").write_text((HERE / "torchvision_operators.py").read_text())
        (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    return python


def run_cell(cell: str, slow: bool) -> tuple[str, dict[str, str]]:
    """What the table says of a cell, and the versions of its packages."""
    words = cell.split()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            python = make_environment(folder / "environment", words)
        except subprocess.CalledProcessError as error:
            return f"cannot be installed: {last_line(error.stderr)}", {}
        versions = json.loads(run(python, "-c", LIST_PACKAGES, check=True).stdout)
        # transformers itself demands torchvision in these versions.
        refused = "torchvision" not in words and Version("5.4") <= Version(versions["transformers"]) < Version("5.18")
        tests = ["life.py", "../data/test_pixel_contract.py"] if not refused else ["without_torchvision.py"]
        options = ["-n", "0", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "--basetemp", folder / "tests"]
        options += [] if slow else ["-k", "not compiled and not pushed"]
        (folder / "package").mkdir()
        (folder / "package/vit_simple").symlink_to(ROOT)
        variables = {"PYTHONPATH": str(folder / "package"), "OMP_NUM_THREADS": "1", "COLUMNS": "2000"}
        command = [python, "-m", "pytest", *options, *(HERE / test for test in tests)]
        result = run(*command, cwd=ROOT, env={**os.environ, **variables})
    if result.returncode == 0:
        return REFUSES if refused else WORKS, versions
    print(result.stdout[-6000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
    return last_line(result.stdout + result.stderr), versions


def last_line(printed: str) -> str:
    """The last error that pip or pytest names, or else the last line."""
    errors = re.findall(r"^(?:ERROR: (.*)|(?:FAILED|ERROR) \S*::(.*))$", printed, flags=re.MULTILINE)
    return " ".join(errors[-1]).strip() if errors else printed.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.environments", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cells", nargs="*", metavar="CELL", help="what pip installs; default: all cells of the table")
    parser.add_argument("--slow", action="store_true", help="also compile a model and push it to the test Hub")
    parser.add_argument("--jobs", type=int, default=2, help="cells that run at the same time; default: 2")
    options = parser.parse_args()
    if importlib.util.find_spec("torchvision"):
        parser.error("expected an environment without torchvision, which every cell would have")
    cells = options.cells or [*(f"{row} torchvision" for row in ROWS), *ROWS, *OTHERS]

    def run_and_report(cell: str) -> tuple[str, dict[str, str]]:
        result, versions = run_cell(cell, options.slow)
        named = (*LIBRARIES, "tokenizers", "torch", "torchvision", "numpy", "pillow")
        print(f"{cell}: {result} ({describe(versions, named)})", file=sys.stderr, flush=True)
        return result, versions

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(cells, pool.map(run_and_report, cells)))
    print("| installed | without torchvision | with torchvision |\n|---|---|---|")
    for row in dict.fromkeys(cell.removesuffix(" torchvision") for cell in cells):
        results = [found.get(cell, ("", {})) for cell in (row, f"{row} torchvision")]
        label = row
        if row in ("newest", "oldest"):
            label += ": " + describe(next((versions for _, versions in results if versions), {}), LIBRARIES)
        print(f"| {label} |", " | ".join(result for result, _ in results), "|")
    failed = [cell for cell, (result, _) in found.items() if result not in (WORKS, REFUSES)]
    if failed:
        raise SystemExit("\n".join(f"{cell}: {found[cell][0]} ({describe(found[cell][1])})" for cell in failed))


def describe(versions: dict[str, str], names: tuple[str, ...] = LIBRARIES) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


if __name__ == "__main__":
    main()
