"""The record and the model card of a converted checkpoint."""

from pathlib import Path

from ..conversion.convert import Checkpoint
from ..files import INHERITED, read_json
from .card import build_card, render
from .card_text import PLACEHOLDER, bullets, join, weights_of
from .markdown import fenced, markdown
from .record import record


def write_card(checkpoint: Checkpoint, folder: Path, to: str = "vit_simple"):
    """Writes README.md and, for "vit_simple", the record; the report gets a line for what the card cannot state."""
    if to == "vit_simple":
        record(folder, source=checkpoint.source, remarks=checkpoint.report, **checkpoint.inherited)
        card = build_card(folder)
    else:
        card = exported_card(checkpoint, folder, to)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name, title in (("license", "license"), ("base_model", "base model")):
        if name not in checkpoint.inherited:
            checkpoint.report.append(f"unknown {title}: add it to the model card, README.md")


def exported_card(checkpoint: Checkpoint, folder: Path, library: str) -> str:
    """The model card of a folder for timm or transformers: the origin of the weights, a snippet, and the report."""
    repo_id, has_classes = f"{PLACEHOLDER}/{folder.name}", "head.weight" in checkpoint.tensors
    if library == "timm":
        snippet = f'import timm\n\nmodel = timm.create_model("hf-hub:{repo_id}", pretrained=True)'
    else:
        (name,) = read_json(folder / "config.json")["architectures"]
        has_classes = name.endswith("ForImageClassification")
        options = ", add_pooling_layer=False" if name == "ViTModel" else ""
        snippet = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo_id}"{options})'
    task = "image-classification" if has_classes else "image-feature-extraction"
    weights = weights_of(checkpoint.source, join(checkpoint.inherited.get("base_model", "")))
    sections = [
        f"# {markdown(folder.name)}",
        f"A plain Vision Transformer for {library}{weights}.",
        f"## Use\n\n{fenced(snippet, 'python')}",
        f"## Conversion\n\n{bullets(map(markdown, checkpoint.report))}" if checkpoint.report else "",
    ]
    inherited = {name: value for name, value in checkpoint.inherited.items() if name in INHERITED}
    data = {"library_name": library, "pipeline_tag": task, **inherited}
    return render(data, "\n\n".join(filter(None, sections)))
