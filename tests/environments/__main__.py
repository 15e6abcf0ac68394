"""Runs the whole life of a small model in one environment after another, and prints a table of what works.

python -m tests.environments                                                       every cell of the table
python -m tests.environments newest "newest torchvision" "transformers==5.17.0 torchvision"    three of them

A cell is what pip installs over the packages of this environment: requirements, `newest` or `oldest` for the newest
release of each library or the oldest that pyproject.toml allows, and `torchvision` for its Python part, which is all
that image processors need. torch stays the one that is installed here.
"""

import argparse
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

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
OLDEST = dict(line.split(">=") for line in DEPENDENCIES)  # name: version
LIBRARIES = ("transformers", "accelerate", "datasets", "huggingface-hub", "kornia", "kornia-rs", "safetensors")
TRANSFORMERS = (OLDEST["transformers"], "5.0.0", "5.3.0", "5.4.0", "5.8.1", "5.12.1", "5.15.1", "5.17.0", "5.18.0")
TRANSFORMERS += ("5.20.2", "5.21.1")
NEED_TORCHVISION = ("5.4.0", "5.8.1", "5.12.1", "5.15.1", "5.17.0")  # transformers itself demands it there
OTHERS = [f"{name}=={OLDEST[name]}" for name in ("accelerate", "datasets")]  # beside the transformers of today
ROWS = [*(f"transformers=={number}" for number in TRANSFORMERS), "newest", "oldest", *OTHERS]
NAMED = (*LIBRARIES, "tokenizers", "torch", "torchvision", "numpy", "pillow")  # in the message of a failure
LIST_PACKAGES = """
import importlib.metadata, json
found = reversed(list(importlib.metadata.distributions()))  # the first of a name is the one that is imported
print(json.dumps({one.name.lower().replace("_", "-"): one.version for one in found}))
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def make_environment(folder: Path, cell: str) -> Path:
    """The Python of a virtual environment with the packages of this one, but for those that the cell installs.

    Raises:
        CalledProcessError: pip finds no versions that fit together.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin/python"
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", command, check=True).stdout.strip())
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    words = set(cell.split())
    if "newest" in words:
        run(*pip, "--upgrade", *LIBRARIES, check=True)
    else:
        oldest = (
            [f"{name}=={number}" for name, number in OLDEST.items() if name != "torch"] if "oldest" in words else []
        )
        run(*pip, *(words - {"oldest", "torchvision"}), *oldest, *DEPENDENCIES, check=True)
    if "torchvision" in words:
        minor = int(version("torch").split(".")[1]) + 15  # torch 2.N has torchvision 0.(N + 15)
        run(*pip, "--no-deps", f"torchvision==0.{minor}.*", check=True)
        (site / "torchvision_operators.py").write_text((HERE / "torchvision_operators.py").read_text())
        (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    return python


def run_cell(cell: str, slow: bool) -> tuple[str, dict[str, str]]:
    """What the table says of a cell, and the versions that pip chose for it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            python = make_environment(folder / "environment", cell)
        except subprocess.CalledProcessError as error:
            return f"cannot be installed: {error.stderr.strip().splitlines()[-1]}", {}
        versions = json.loads(run(python, "-c", LIST_PACKAGES, check=True).stdout)
        versions = {name: versions[name] for name in NAMED if name in versions}
        (folder / "package").mkdir()
        (folder / "package/vit_simple").symlink_to(ROOT)
        variables = {"PYTHONPATH": str(folder / "package"), "OMP_NUM_THREADS": "1", "COLUMNS": "2000"}
        needs_it = versions["transformers"] in NEED_TORCHVISION and "torchvision" not in versions
        tests = (
            [HERE / "without_torchvision.py"]
            if needs_it
            else [HERE / "life.py", ROOT / "tests/data/test_pixel_contract.py"]
        )
        choice = [] if slow else ["-k", "not compiled and not pushed"]
        options = ["-n", "0", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "--basetemp", folder / "tests"]
        result = run(python, "-m", "pytest", *options, *choice, *tests, cwd=ROOT, env={**os.environ, **variables})
    if result.returncode == 0:
        return "needs torchvision, and says so" if needs_it else "trains", versions
    print(result.stdout[-6000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?([^/\s]+)(?: - (.*))?$", result.stdout, flags=re.MULTILINE)
    return ": ".join(failed[-1]) if failed else (result.stdout + result.stderr).strip().splitlines()[-1], versions


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.environments", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cells", nargs="*", metavar="CELL", help="what pip installs; default: all cells of the table")
    parser.add_argument("--slow", action="store_true", help="also compile a model and push it to the test Hub")
    parser.add_argument("--jobs", type=int, default=2, help="cells that run at the same time; default: 2")
    options = parser.parse_args()
    cells = options.cells or [*(f"{row} torchvision" for row in ROWS[: -len(OTHERS)]), *ROWS]

    def run_and_print(cell: str) -> tuple[str, dict[str, str]]:
        result, versions = run_cell(cell, options.slow)
        print(f"{cell}: {result}", json.dumps(versions), file=sys.stderr, flush=True)
        return result, versions

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(cells, pool.map(run_and_print, cells)))
    print("| installed | without torchvision | with torchvision |\n|---|---|---|")
    for row in dict.fromkeys(cell.removesuffix("torchvision").strip() for cell in cells):
        results = [found.get(cell, ("", {})) for cell in (row, f"{row} torchvision")]
        newest = next((versions for _, versions in results if versions), {}) if row == "newest" else {}
        label = ", ".join([row, *(f"{name} {newest[name]}" for name in LIBRARIES if name in newest)])
        print("|", " | ".join([label, *(result for result, _ in results)]), "|")
    broken = [
        f"{cell}: {result} (with {', '.join(f'{name} {number}' for name, number in versions.items())})"
        for cell, (result, versions) in found.items()
        if result not in ("trains", "needs torchvision, and says so")
    ]
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
