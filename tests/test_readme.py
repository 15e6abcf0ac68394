"""What the README shows, run as it stands."""

import json
import re
import shlex
import sys

import pytest

from tests.conftest import run_python, tiny
from vit_simple import convert_checkpoint, push_to_hub
from vit_simple.data.processors import stock_processor
from vit_simple.files import ROOT
from vit_simple.training.config import parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_are_one_command_each():
    job, tests = blocks("bash")[:2]
    assert job == "python -m pip install -e . -c constraints.txt && python train.py\n"
    assert tests == 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest\n'


def test_every_python_block_runs(tmp_path):
    """The blocks name a checkpoint of the Hub; a folder of that name stands in for it."""
    digits = tiny(num_hidden_layers=1, image_size=8, patch_size=2, num_labels=10)  # small, since a block compiles it
    digits.save_pretrained(tmp_path / "digits")
    (tmp_path / "digits/preprocessor_config.json").write_text(json.dumps(stock_processor((8, 8))))
    setup = f"""
import shutil
shutil.copytree({str(tmp_path / "digits")!r}, "your-name/vit-simple-digits")
shutil.copytree({str(ROOT / "data")!r}, "data")
"""
    printed = run_python(sys.executable, tmp_path / "work", "\n".join([setup, *blocks("python")]))
    assert (tmp_path / "work/outputs/fine-tuned/modeling_vit_simple.py").exists(), printed


def commands(script: str) -> list[list[str]]:
    """The arguments of every line that calls a script."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words[words.index(script) + 1 :] for words in lines if script in words and words[0] != "for"]


@pytest.mark.parametrize(
    "script, parse, least",
    [
        ("train.py", parse_config, 10),
        ("convert_checkpoint.py", convert_checkpoint.build_parser().parse_args, 4),
        ("push_to_hub.py", push_to_hub.build_parser().parse_args, 3),
    ],
)
def test_every_command_has_options_that_exist(script, parse, least):
    assert len(commands(script)) > least
    for words in commands(script):
        parse(words)
