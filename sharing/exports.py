"""The exported models of a checkpoint in its record and its model card: what was measured when they were written."""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

from ..files import RECORD, read_json, write_atomically
from .markdown import markdown
from .outgoing import cut_record
from .record import processor_name

PACKAGES = ("torch", "onnxscript", "onnxruntime", "torchao")
HEADER = ["model", "size", "images/s", "largest difference", "agreement", "accuracy"]


def record_exports(folder: Path, measured: dict) -> dict:
    """Adds what `export_checkpoint` measured to provenance.json, with the machine and the versions; returns it."""
    installed = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    versions = {name: importlib.metadata.version(name) for name in installed}
    exports = {**measured, "hardware": f"{os.cpu_count()} cores of {processor_name()}", "versions": versions}
    content = cut_record(read_json(folder / RECORD) | {"exports": exports})
    write_atomically(folder / RECORD, json.dumps(content, indent=2) + "\n")
    return content["exports"]


def rows(exports: dict) -> list[list[str]]:
    """The cells of a table of what was measured."""
    models = exports["models"].items()
    return [
        [
            name if values.get("kept", True) else f"{name} (not written)",
            f"{values['bytes'] / 1e6:,.2f} MB",
            f"{values['images_per_second']:,.1f}" if values["images_per_second"] else "",
            f"{values['difference']:.2g}",
            f"{100 * values['agreement']:.2f}%",
            f"{100 * values['accuracy']:.2f}%" if "accuracy" in values else "",
        ]
        for name, values in models
    ]


def conditions(exports: dict) -> str:
    """What was measured on what."""
    threads = f"{exports['threads']} thread{'s' if exports['threads'] > 1 else ''}"
    versions = ", ".join(map(" ".join, exports["versions"].items()))
    return (
        f"{exports['images']:,} {exports['split']} images of {exports['dataset']} in batches of "
        f"{exports['batch_size']}, on {threads} of {exports['hardware']}, with {versions}"
    )


def report(exports: dict) -> list[str]:
    """What was measured, as lines for a terminal."""
    table = [HEADER, *rows(exports)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    left_out = [name for name, values in exports["models"].items() if not values.get("kept", True)]
    advice = f"{', '.join(left_out)}: agreement below 99%; --force writes such files, too"
    return [f"measured on {conditions(exports)}", *lines, *([advice] if left_out else [])]


def section(exports: dict) -> str:
    """What was measured, as Markdown for the model card."""
    table = [HEADER, ["---"] * len(HEADER), *([markdown(name), *cells] for name, *cells in rows(exports))]
    return "\n".join(
        [
            f"Measured on {markdown(conditions(exports))}. The difference is the largest one between an output and "
            "PyTorch's. The agreement is the fraction of images, or of labels, with PyTorch's prediction; for numbers "
            "and features, 1 minus the relative error. Files in `aot/` work on one kind of machine and are not shared.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
        ]
    )
