"""A run's folder: the names of its files, and how they are written and read. Imports nothing of this package."""

import json
import os
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

ROOT = Path(__file__).parent
CODE = ("configuration_vit_simple.py", "modeling_vit_simple.py")
RECORD = "provenance.json"
INHERITED = ("base_model", "license", "license_name", "license_link")


class UserError(ValueError):
    """A mistake of the user: commands print it in one line and end with exit status 2."""


def write_atomically(path: Path, text: str):
    """Writes a file aside and puts it in its place, so that it is never there in part."""
    aside = path.with_name(f".{path.name}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_json(path: Path) -> dict:
    """The content of a JSON file, {} where there is none.

    Raises:
        ValueError: it is no JSON.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, none where there is no such file."""
    file = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object in each line: {error}") from error


def open_card(text: str, file: str) -> ModelCard:
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: expected a card of the Hub: {error}") from error


def inherited(folder: Path) -> dict:
    """Licence and base model, as the card of a folder names them."""
    file = folder / "README.md"
    if not file.exists():
        return {}
    data = open_card(file.read_text(encoding="utf-8"), str(file)).data.to_dict()
    return {name: data[name] for name in INHERITED if data.get(name)}


def has_head(config: dict) -> bool:
    return config.get("architectures") == ["ViTSimpleForImageClassification"]
