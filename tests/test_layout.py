"""The modules import each other in one direction, and files and functions stay short enough to read."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vit_simple.files import ROOT

# What the modules of a folder and the files of the root may import; files that are not named are commands.
MODEL = ("configuration_vit_simple", "modeling_vit_simple")
LEAVES = {"files", *MODEL, "__init__"}
ALLOWED = {
    "files": set(),
    "data": {"files", "data", "configuration_vit_simple"},
    "training": {*LEAVES, "data", "training"},
    "inference": {*LEAVES, "data", "inference"},
    "conversion": {*LEAVES, "data", "conversion"},
    "sharing": {*LEAVES, "data", "training", "inference", "conversion", "sharing"},
    "configuration_vit_simple": set(),
    "modeling_vit_simple": {"configuration_vit_simple"},
    "__init__": set(MODEL),
}
FOLDERS = [name for name in ALLOWED if (ROOT / name).is_dir()]
MODULES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))])


def name_of(path: Path) -> str:
    """data/labels.py is data.labels, data/__init__.py is data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of the package that a file imports, and whether by an absolute name."""
    folder = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vit_simple":
                    yield alias.name.removeprefix("vit_simple").lstrip(".") or "__init__", True
        elif isinstance(node, ast.ImportFrom):
            module, absolute = node.module or "", node.level == 0
            if absolute and module.split(".")[0] != "vit_simple":
                continue
            base = module.split(".")[1:] if absolute else [*folder[: len(folder) + 1 - node.level], *module.split(".")]
            base = [part for part in base if part]
            for alias in node.names:  # from .labels import Labels, or from . import labels
                inner = ".".join([*base, alias.name])
                yield inner if inner in NAMES else ".".join(base) or "__init__", absolute


GRAPH = {name: {target for target, _ in imports(path)} - {name} for name, path in NAMES.items()}


def test_imports_lead_to_modules_that_exist():
    assert {target for targets in GRAPH.values() for target in targets} <= set(NAMES)


def test_imports_have_no_cycle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_point_one_way():
    wrong = {
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if target.split(".")[0] not in ALLOWED.get(name.split(".")[0], {*ALLOWED})  # commands may import everything
    }
    assert not wrong


def test_imports_are_relative_inside_folders():
    """So that a folder can be read, and a checkpoint's code run, where the package is not installed."""
    commands = {name for name, path in NAMES.items() if path.parent == ROOT} - LEAVES
    wrong = {name for name in NAMES.keys() - commands if any(absolute for _, absolute in imports(NAMES[name]))}
    assert not wrong


def test_model_files_need_torch_and_transformers_alone():
    """Whoever loads a checkpoint with remote code must have installed what these files import."""
    for name in MODEL:
        tree = ast.parse(NAMES[name].read_text(encoding="utf-8"))
        found = {
            module.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for module in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        assert found - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_root_has_few_python_files():
    assert len(list(ROOT.glob("*.py"))) <= 11


def test_files_are_short_enough_to_read():
    most = {"README.md": 200, "train.py": 280, "modeling_vit_simple.py": 400}
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in most}
    assert not {name: count for name, count in lines.items() if count > most[name]}


def test_functions_have_at_most_60_lines():
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60
    }
    long.pop("train.py: main", None)
    assert not long
