"""What the README shows, run as it stands."""

import re
import shlex
import sys

from benchmarks.scale import table
from conftest import run_python
from vit_simple.options import ROOT, parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_are_one_command_each():
    job, tests = blocks("bash")[:2]
    assert job == "python -m pip install -e . -c constraints.txt && python train.py\n"
    assert tests == 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest\n'


def test_every_python_block_runs(run_folder, tmp_path):
    """The blocks name a checkpoint of the Hub; a folder of that name stands in for it."""
    setup = f"""
import shutil
shutil.copytree({str(run_folder)!r}, "your-name/vit-simple-digits")
shutil.copytree({str(ROOT / "data")!r}, "data")
"""
    printed = run_python(sys.executable, tmp_path / "work", "\n".join([setup, *blocks("python")]))
    assert (tmp_path / "work/outputs/parity/modeling_vit_simple.py").exists(), printed


def test_the_costs_at_scale_are_those_that_the_benchmark_computes():
    assert table(989e12, 0.4, 8) in (ROOT / "docs/scale.md").read_text(encoding="utf-8")


def test_every_training_command_has_options_that_exist():
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    training = [words[words.index("train.py") + 1 :] for words in commands if "train.py" in words and words[0] != "for"]
    assert len(training) > 10
    for words in training:
        parse_config(words)
