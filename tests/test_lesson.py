"""Both notebooks of the lesson are what its sections say, and its exercises accept the right answers alone."""

import importlib.util
import re

import nbformat
import pytest

from vit_simple.files import ROOT

FOLDER = ROOT / "docs" / "lesson"
LANGUAGES = ("en", "ja")


def load_build():
    spec = importlib.util.spec_from_file_location("lesson_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(language: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"vit.{language}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[str]:
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
    assert not re.search(r"\d\s?(%|％|seconds|秒)", texts)
