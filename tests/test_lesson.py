"""Both notebooks of the lesson are what its sections say, and its exercises accept the right answers alone."""

import ast
import importlib.util
import logging
import re
import warnings
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vit_simple.files import ROOT

nbformat = pytest.importorskip("nbformat", reason='the lesson needs nbformat: pip install -e ".[lesson]"')
pytest.importorskip("nbclient", reason='the lesson needs nbclient: pip install -e ".[lesson]"')
FOLDER = ROOT / "docs" / "lesson"
LANGUAGES = ("en", "ja")


def load_build():
    spec = importlib.util.spec_from_file_location("lesson_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(language: str) -> "nbformat.NotebookNode":
    return nbformat.read(FOLDER / f"vit.{language}.ipynb", as_version=4)


def code(notebook: "nbformat.NotebookNode") -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def cells_of(language: str) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook(language).cells]


@pytest.mark.parametrize("language", LANGUAGES)
def test_notebook_is_built_from_the_sections(language):
    expected = load_build().build_notebook(language)
    assert cells_of(language) == [(cell.cell_type, cell.source) for cell in expected.cells]


def test_notebooks_have_the_same_code_and_as_many_texts():
    english, japanese = map(notebook, LANGUAGES)
    assert code(english) == code(japanese)
    assert [cell.cell_type for cell in english.cells] == [cell.cell_type for cell in japanese.cells]


@pytest.mark.parametrize("language", LANGUAGES)
def test_notebook_shows_clean_outputs(language):
    path = FOLDER / f"vit.{language}.ipynb"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 900_000
    outputs = [output for cell in notebook(language).cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # no errors
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    shown = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(^|[\s'\"])/\w+/\w+|Warning|\r|it/s", shown)
    assert str(ROOT) not in text
    assert sum(output.output_type == "display_data" for output in outputs) >= 16


@pytest.mark.parametrize("language", LANGUAGES)
def test_notebook_texts_measure_nothing(language):
    """Percentages and seconds of one machine belong into cells that check them."""
    texts = "\n".join(source for kind, source in cells_of(language) if kind == "markdown")
    assert not re.search(r"\d\s?(%|seconds|秒)", texts)


@pytest.fixture
def exercises() -> dict:
    """The checkers of the exercises, and what they need of the cells before them."""
    torch.manual_seed(0)
    space = {"torch": torch, "nn": nn, "F": F, "D": 128, "h": 4, "tokens": torch.randn(1, 197, 128)}
    space |= {"qkv": nn.Linear(128, 3 * 128), "proj": nn.Linear(128, 128)}
    wanted = {"verdict", "attention", "check_tokens", "check_attention", "check_slip", "check_head"}
    for source in code(notebook("en")):
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                exec(ast.unparse(node), space)
    return space


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    "check, answer",
    [("check_tokens", "num_tokens"), ("check_attention", "short_attention"), ("check_head", "MeanHead")],
)
def test_exercise_accepts_the_folded_solution(exercises, language, check, answer):
    texts = [source for kind, source in cells_of(language) if kind == "markdown" and "<details>" in source]
    (solution,) = [text for text in texts if re.search(rf"(def|class) {answer}\(", text)]
    exec(re.search(r"```python\n(.*?)```", solution, re.DOTALL)[1], exercises)
    assert exercises[check](exercises[answer]).startswith("OK")


WRONG_ATTENTION = """
def answer(x):
    query, key, value = (each.view(1, 197, h, D // h){move} for each in qkv(x).chunk(3, dim=-1))
    return {end}
"""
ATTEND = "F.scaled_dot_product_attention(query, key, value)"


@pytest.mark.parametrize(
    "check, answer, hint",
    [
        ("check_tokens", "answer = lambda height, width, size: None", "write your answer"),
        (
            "check_tokens",
            "answer = lambda height, width, size: (height // size) * (width // size)",
            "counted the patches",
        ),
        ("check_tokens", "answer = lambda height, width, size: (height // size) ** 2 + 1", "may differ"),
        ("check_attention", "answer = lambda x: None", "write your answer"),
        ("check_attention", WRONG_ATTENTION.format(move="", end=f"proj({ATTEND}.flatten(2))"), "before the tokens"),
        (
            "check_attention",
            WRONG_ATTENTION.format(move=".transpose(1, 2)", end=f"{ATTEND}.transpose(1, 2).flatten(2)"),
            "proj",
        ),
        ("check_slip", "answer = 2", "transpose is there"),
        ("check_slip", "answer = 5", "line by line"),
        (
            "check_head",
            "class answer(nn.Linear):\n    forward = lambda self, x: F.linear(x[:, 0], self.weight, self.bias)",
            "alone",
        ),
        (
            "check_head",
            "class answer(nn.Linear):\n    forward = lambda self, x: F.linear(x.mean(1), self.weight, self.bias)",
            "no patch",
        ),
        ("check_head", "answer = nn.Linear", "each image"),
    ],
)
def test_exercise_teaches_after_a_wrong_answer(exercises, check, answer, hint):
    exec(answer, exercises)
    message = exercises[check](exercises["answer"])
    assert message.startswith("Not yet") and re.search(hint, message)
    assert "もう少しです。" in message


def test_slip_in_the_exercise_is_the_third(exercises):
    assert exercises["check_slip"](3).startswith("OK")


@pytest.mark.slow
def test_notebook_runs():
    load_build().run(notebook("ja"))


@pytest.fixture
def run_slips(monkeypatch):
    """Runs the cells from the first patches to the sixth slip, without drawing and without touching outputs/."""
    pyplot = MagicMock()
    pyplot.subplots = lambda *args, **kwargs: (MagicMock(), MagicMock())
    pyplot.figure().subfigures.return_value = MagicMock(), MagicMock()
    monkeypatch.setattr(warnings, "filters", warnings.filters[:])  # the cells silence both
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    cells = code(notebook("en"))[1:]
    (last,) = [number for number, source in enumerate(cells) if "start(0.0)" in source]

    def run_slips(old: str, new: str):
        assert sum(old in source for source in cells[: last + 1]) == 1
        space = {"plt": pyplot}
        for source in cells[: last + 1]:
            for text in ("import matplotlib.pyplot as plt", "shutil.rmtree(OUTPUT, ignore_errors=True)"):
                source = source.replace(text, "")
            exec(source.replace(old, new), space)

    return run_slips


def test_slip_cells_run_as_they_stand(run_slips):
    run_slips("start(0.0)", "start(0.0)")


@pytest.mark.parametrize(
    "slip, right",
    [
        ('slip == "projection"', "False"),
        ('slip != "heads"', "True"),
        ("key.mT * D**-0.5", "key.mT * (D // h) ** -0.5"),
        ("if not slip:", "if True:"),
        ("(x if slip else y)", "y"),
        ("start(0.0)", "start(0.02)"),
    ],
    ids=["projection", "heads", "scale", "positions", "residual", "zero"],
)
def test_slip_cell_fails_if_the_slip_is_put_right(run_slips, slip, right):
    with pytest.raises(AssertionError):
        run_slips(slip, right)
