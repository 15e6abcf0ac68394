"""Builds the lesson's two notebooks from docs/lesson/sections and runs their code once.

python docs/lesson/build.py

A section is a markdown file. `<!-- en -->`, `<!-- ja -->` and `<!-- code -->`, each alone on a line, begin a cell: text
in English, text in Japanese, and code for both.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "ja")
MARKER = re.compile(r"^<!-- (en|ja|code) -->\n", re.MULTILINE)
FENCE = re.compile(r"```python\n(.*?)\n?```", re.DOTALL)
# Line breaks that Markdown would show as a space inside a Japanese sentence.
JAPANESE_BREAK = re.compile(r"(?<=[^\x00-\x7f])\n(?=[^\x00-\x7f])|(?<=[、。\uff09])\n(?=\S)|(?<=\S)\n(?=\uff08)")


def read_cells() -> list[tuple[str, str]]:
    """The kind, en, ja or code, and the content of every cell of the sections.

    Raises:
        ValueError: a section has text before its first marker, or a code cell is not one python block.
    """
    cells = []
    for path in sorted((FOLDER / "sections").glob("*.md")):
        before, *parts = MARKER.split(path.read_text(encoding="utf-8"))
        if before.strip():
            raise ValueError(f"{path.name}: expected a marker such as <!-- en --> first, got {before!r}")
        for kind, content in zip(parts[::2], parts[1::2]):
            code = FENCE.fullmatch(content.strip()) if kind == "code" else None
            if kind == "code" and not code:
                raise ValueError(f"{path.name}: expected one python block after <!-- code -->, got {content!r}")
            text = JAPANESE_BREAK.sub("", content.strip()) if kind == "ja" else content.strip()
            cells.append((kind, code[1] if code else text))
    return cells


def build_notebook(language: str) -> nbformat.NotebookNode:
    """The notebook of a language, without outputs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    for kind, content in read_cells():
        if kind in (language, "code"):
            cell = new_code_cell(content) if kind == "code" else new_markdown_cell(content)
            cell.id = f"cell-{len(notebook.cells)}"  # random ones would change with every build
            notebook.cells.append(cell)
    return notebook


def run(notebook: nbformat.NotebookNode):
    """Runs a notebook and keeps its outputs, without what libraries write to stderr.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": FOLDER}}, record_timing=False)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def copy_outputs(source: nbformat.NotebookNode, target: nbformat.NotebookNode):
    """Gives the code cells of a notebook the outputs of the same cells of another one."""
    codes = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (source, target)]
    for ran, cell in zip(*codes):
        cell.outputs, cell.execution_count = ran.outputs, ran.execution_count


def main():
    notebooks = {language: build_notebook(language) for language in LANGUAGES}
    first, *others = notebooks.values()
    run(first)
    for other in others:
        copy_outputs(first, other)
    for language, notebook in notebooks.items():
        path = FOLDER / f"vit.{language}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
