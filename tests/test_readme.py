"""What README.md and docs/ show runs as it stands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import run_python
from vit_simple import convert_checkpoint, explain, export, predict, probe, push_to_hub
from vit_simple.files import ROOT
from vit_simple.training.config import parse_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_readme_begins_with_two_commands():
    install, tests = blocks(ROOT / "README.md", "bash")[:2]
    assert install == "python -m pip install -e . -c constraints.txt && python train.py\n"
    assert tests == 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest -n 2\n'


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in zip(NAMES, PAGES) if blocks(page, "python")])
def test_python_blocks_run_in_order(name, run_folder, tmp_path):
    """In a folder that holds what a fresh clone does after `python train.py`, here of one epoch."""
    setup = f"""
import shutil
shutil.copytree({str(run_folder)!r}, "outputs/digits")
shutil.copytree({str(ROOT / "data/digits")!r}, "data/digits")
"""
    run_python(sys.executable, tmp_path / "work", "\n".join([setup, *blocks(ROOT / name, "python")]))


def joined(block: str) -> list[str]:
    """The lines of a block, those that end with a backslash joined with the next."""
    return block.replace("\\\n", "").splitlines()


def commands(script: str) -> list[list[str]]:
    """The arguments of every line that calls a script."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in joined(block)]
    words = [re.split(r"; done$", line)[0] for line in lines]
    words = [shlex.split(line, comments=True) for line in words]
    return [line[line.index(script) + 1 :] for line in words if script in line]


@pytest.mark.parametrize(
    "script, parse",
    [
        ("train.py", parse_config),
        ("convert_checkpoint.py", convert_checkpoint.build_parser().parse_args),
        ("push_to_hub.py", push_to_hub.build_parser().parse_args),
        ("explain.py", explain.build_parser().parse_args),
        ("export.py", export.build_parser().parse_args),
        ("probe.py", probe.build_parser().parse_args),
        ("predict.py", predict.build_parser().parse_args),
    ],
)
def test_commands_have_options_that_exist(script, parse):
    found = [words for words in commands(script) if "$seed" not in words]
    assert len(found) >= 2
    for words in found:
        parse(words)


def test_benchmarks_have_the_options_that_the_pages_show():
    pages = [*PAGES, ROOT / "benchmarks/README.md"]
    texts = [re.sub(r"\\\n", " ", page.read_text(encoding="utf-8")) for page in pages]
    found = [command for text in texts for command in re.findall(r"python -m benchmarks\.(\w+)([^`\n]*)", text)]
    wrong = {
        f"{module} {option}"
        for module, arguments in found
        for option in re.findall(r"--\w+", arguments)
        if f'"{option}"' not in (ROOT / f"benchmarks/{module}.py").read_text(encoding="utf-8")
    }
    assert len(found) >= 15 and not wrong


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing
