"""A plain install, as `pip install .` makes it."""

import shutil
import subprocess
import sys
import tomllib

from tests.conftest import environment_without_package, run_python
from vit_simple.files import ROOT


def test_plain_install_trains_on_its_digits_and_has_the_commands(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "outputs", "*.egg-info"))
    python = environment_without_package(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, source], check=True)
    shutil.rmtree(source)
    code = """
import sys
import tomllib
from vit_simple.files import ROOT
from vit_simple.train import main
assert str(ROOT).startswith(sys.argv[1]), ROOT
assert (ROOT / "py.typed").exists() and (ROOT / "sharing/page/resize.js").exists()
main(["--num_train_epochs", "1"])
"""
    run_python(python, tmp_path / "work", code, tmp_path / "environment")
    assert (tmp_path / "work/outputs/digits/model.safetensors").exists()
    with open(ROOT / "pyproject.toml", "rb") as file:
        commands = tomllib.load(file)["project"]["scripts"]
    for name in commands:
        subprocess.run([python.parent / name, "--help"], cwd=tmp_path, check=True, capture_output=True)
