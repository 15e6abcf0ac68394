"""The text of a model card, section by section, from what the files of a checkpoint's folder record."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors

from ..data.decoding import DEEP, same_pixels_code
from ..files import MODEL_FIELDS, PREPROCESSOR, RECORD, RECORD_FIELDS, has_head, read_json, read_metrics
from ..training.lora import ADAPTER_CONFIG, adapter_base, loading_code
from . import card_confidence
from .card_plots import plots
from .exports import section as exports_section
from .markdown import fenced, markdown
from .outgoing import RECIPE, cut_paths, cut_record, recipe_text

PLACEHOLDER = "your-name"  # the user in snippets, until the checkpoint is pushed
METRICS = {  # name in metrics.jsonl: the Hub's name of the metric, if it has one, and the title in the card
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "map": ("map", "mean average precision"),
    "micro_f1": ("f1", "micro F1 at 0.5"),
    "macro_f1": ("f1", "macro F1 at 0.5"),
    "micro_f1_at_thresholds": ("f1", "micro F1 at the thresholds below"),
    "macro_f1_at_thresholds": ("f1", "macro F1 at the thresholds below"),
    "mae": ("mae", "mean absolute error"),
    "r2": ("r_squared", "R²"),
    "expected_calibration_error": (None, "expected calibration error"),
    "brier_score": (None, "Brier score"),
    "loss": (None, "loss"),
}
CITATION = """```bibtex
@article{dosovitskiy2020vit,
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and
            Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and
            Uszkoreit, Jakob and Houlsby, Neil},
  journal = {arXiv:2010.11929},
  year = {2020}
}
```"""


@dataclass
class Facts:
    """What the files of a checkpoint's folder say: provenance.json, config.json, metrics.jsonl and the others.

    Their texts are foreign: they go through `markdown` or `fenced` into the card.
    """

    folder: Path
    record: dict
    config: dict
    processor: dict
    metrics: list[dict]

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Raises UserError, naming file and field, if one of them is damaged."""
        record, config = (
            {field: value for field, value in read_json(folder / file, fields).items() if value is not None}
            for file, fields in ((RECORD, RECORD_FIELDS), ("config.json", MODEL_FIELDS))
        )
        return cls(folder, cut_record(record), config, read_json(folder / PREPROCESSOR), read_metrics(folder))

    @property
    def result(self) -> dict:
        """The last test result or, if nothing was tested, the last validation result; {} without either."""
        for split in ("test", "validation"):
            if results := [line for line in self.metrics if line["split"] == split]:
                return results[-1]
        return {}

    @property
    def result_metrics(self) -> list[str]:
        """The metrics of the result that mean something: with five classes or fewer, top-5 accuracy is always 1."""
        few_classes = len(self.config.get("id2label", {})) <= 5
        return [name for name in METRICS if name in self.result and not (name == "top5" and few_classes)]

    @property
    def score(self) -> str:
        """The title of the metric that curves.png shows beside the loss."""
        kinds = {"regression": "mae", "multi_label_classification": "map"}
        return METRICS[kinds.get(self.config.get("problem_type"), "top1")][1]

    @property
    def dataset(self) -> dict:
        return self.record.get("dataset") or {}

    @property
    def base_model(self) -> str:
        return join(self.record.get("base_model") or "")

    @property
    def source(self) -> str:
        """The checkpoint that was converted to this one; the base model if an earlier version did not record it."""
        return self.record.get("source") or self.base_model

    @property
    def task(self) -> str:
        """The Hub's name of the task; the outputs of CLIP's projection are features."""
        labels = self.config.get("id2label", {"": ""}).values()
        is_projection = all(re.fullmatch(r"feature \d+", label) for label in labels)
        return "image-classification" if has_head(self.config) and not is_projection else "image-feature-extraction"


def join(names: str | list[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def at_revision(name: str, revision: str | None) -> str:
    return markdown(name) + (f" (revision `{markdown(revision)}`)" if revision else "")


def weights_of(source: str, base_model: str, revision: str | None = None) -> str:
    """Whose weights were converted, and which model these are based on if that is another one."""
    base = at_revision(base_model, revision)
    if source == base_model:
        return f" with the weights of {base}"
    return f" with the weights of {markdown(source)}" + (f", based on {base}" if base else "")


def card_text(facts: Facts, repo_id: str | None, tag: str | None) -> str:
    """The sections of the card; a section without facts is left out."""
    repo_id = repo_id or f"{PLACEHOLDER}/{facts.folder.resolve().name}"
    images = plots(facts.folder, facts.score, facts.config.get("problem_type"))
    confidence = card_confidence.section(facts.result, facts.record, facts.config.get("problem_type"))
    remarks, exports = facts.record.get("remarks"), facts.record.get("exports")
    sections = [
        f"# {markdown(repo_id.rpartition('/')[2])}",
        summary(facts),
        f"## Use\n\n{usage(facts, repo_id, tag)}",
        f"## Results\n\n{results(facts)}" if facts.result else "",
        f"## How sure it is\n\n{confidence}" if confidence else "",
        *images,
        legend(facts) if images else "",
        f"## Exported models\n\n{exports_section(exports)}" if exports else "",
        f"## Training\n\n{training(facts)}" if (facts.folder / RECIPE).exists() or "method" in facts.record else "",
        f"## Conversion\n\n{bullets(map(markdown, remarks))}" if remarks else "",
        f"## Intended use and limitations\n\n{limitations(facts)}",
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(filter(None, sections))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def legend(facts: Facts) -> str:
    """The names of the classes that the plots show by number."""
    labels = facts.config.get("id2label", {})
    names = [
        f"{number} is {markdown(labels[str(number)])}" for number in facts.record.get("classes_shown_by_number", [])
    ]
    rest = f" and {len(names) - 100} more, which config.json names" if len(names) > 100 else ""
    return f"Classes that the plots show by number: {', '.join(names[:100])}{rest}." if names else ""


def summary(facts: Facts) -> str:
    """What the checkpoint is, and where its weights come from."""

    def sides(value) -> str:
        return " x ".join(map(str, value if isinstance(value, list) else [value, value]))

    parameters = 0
    for path in facts.folder.glob("*model*.safetensors"):  # or of an adapter
        with safetensors.safe_open(path, "pt") as file:
            parameters += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    config, dataset = facts.config, markdown(facts.dataset.get("name", ""))
    origin, revision = "", facts.record.get("base_model_revision")
    if dataset:
        base = at_revision(facts.base_model, revision)
        origin = f" fine-tuned from {base} on {dataset}" if base else f" trained on {dataset}"
    elif facts.source:
        origin = weights_of(facts.source, facts.base_model, revision)
    whose = "The adapter" if (facts.folder / ADAPTER_CONFIG).exists() else "It"
    return (
        f"A plain Vision Transformer{origin}. It has {config['num_hidden_layers']} blocks of width "
        f"{config['hidden_size']} and takes images of {sides(config['image_size'])} pixels in patches of "
        f"{sides(config['patch_size'])}. {whose} has {parameters / 1e6:.2f} million parameters."
    )


def usage(facts: Facts, repo_id: str, tag: str | None) -> str:
    """A snippet that loads and calls the checkpoint, and how to pin a revision."""
    if (facts.folder / ADAPTER_CONFIG).exists():
        code = loading_code(str(facts.folder.name), cut_paths(adapter_base(facts.folder)))
        return f"It is an adapter, which PEFT adds to the weights of another checkpoint:\n\n{fenced(code, 'python')}"
    options = json.dumps(repo_id, ensure_ascii=False) + (f", revision={json.dumps(tag)}" if tag else "")
    is_of_arrays = facts.processor.get("do_resize") is False
    if is_of_arrays or facts.task == "image-feature-extraction":  # no pipeline takes these
        lines = model_lines(facts, options, is_of_arrays)
    else:
        raw = ', function_to_apply="none"' if facts.config.get("problem_type") == "regression" else ""
        lines = "from transformers import pipeline\n\n"
        lines += f'predict = pipeline("{facts.task}", model={options}{raw}, trust_remote_code=True)\n'
        lines += 'predict("image.png")'
    advice = "" if tag else '\nTo pin code and weights, add `revision="..."` with the hash of a commit.'
    note = "`trust_remote_code=True` runs the two Python files of this repository."
    return f"{fenced(lines, 'python')}\n\n{note}{advice}"


def model_lines(facts: Facts, options: str, is_of_arrays: bool) -> str:
    """The lines that load the image processor and the model, and call them."""
    name, output = "AutoModel", "pooler_output"
    if has_head(facts.config):
        name, output = "AutoModelForImageClassification", "logits"
    load, images = "\nfrom transformers.image_utils import load_image", 'load_image("image.png")'
    if is_of_arrays:  # (channels, height, width)
        load, images = "", '[array], input_data_format="channels_first"'
    return (
        f"from transformers import AutoImageProcessor, {name}{load}\n\n"
        f"processor = AutoImageProcessor.from_pretrained({options})\n"
        f"model = {name}.from_pretrained({options}, trust_remote_code=True)\n"
        f'pixel_values = processor({images}, return_tensors="pt").pixel_values'
        f"{'  # array: uint8, (channels, height, width)' if is_of_arrays else ''}\n"
        f"model(pixel_values).{output}"
    )


def results(facts: Facts) -> str:
    """A table of metrics, with confidence intervals for the accuracies."""
    result = facts.result
    rows = []
    for name in facts.result_metrics:
        title, value, interval = METRICS[name][1], f"{result[name]:.4g}", ""
        if name in ("top1", "top5"):
            low, high = confidence_interval(result[name], result["count"])
            value, interval = f"{100 * result[name]:.2f}%", f"{100 * low:.2f}% to {100 * high:.2f}%"
        rows.append([title, value, interval])
    header = ["metric", "value", "95% confidence interval"]
    if not any(interval for *_, interval in rows):
        header, *rows = (row[:2] for row in (header, *rows))
    table = [header, ["---"] * len(header), *rows]
    dataset = markdown(facts.dataset.get("name", "the dataset"))
    caption = f"On {result['count']:,} {markdown(result['split'])} images of {dataset}"
    caption += f" ({result['correct']:,} correct)" if "correct" in result else ""
    caption += ", using the EMA weights" if result.get("weights") == "ema" else ""
    caption += f", at step {result['step']:,}" if result["step"] != facts.metrics[-1]["step"] else ""
    return "\n".join([f"{caption}:", "", *(f"| {' | '.join(row)} |" for row in table)])


def confidence_interval(fraction: float, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a fraction of `count` (Wilson, 1927)."""
    z = 1.96
    center = fraction + z**2 / (2 * count)
    margin = z * math.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return (center - margin) / (1 + z**2 / count), (center + margin) / (1 + z**2 / count)


def training(facts: Facts) -> str:
    """How the run was made, with all that is needed to repeat it."""
    record, lines = facts.record, []
    if facts.dataset:
        revision, images = (facts.dataset.get(field) for field in ("revision", "images"))
        at = f" at revision `{markdown(revision)}`" if revision else ""
        count = "" if images is None else f", {images:,} training images"
        lines.append(f"dataset: {markdown(facts.dataset['name'])}{at}{count}")
    if "method" in record:
        lines.append(f"method: {markdown(record['method'])}")
    if steps := [line for line in facts.metrics if line["split"] == "train"]:
        lines.append(f"length: {steps[-1]['step']:,} steps ({plural(steps[-1]['epoch'], 'epoch')})")
        speeds = sorted(line["images_per_second"] for line in steps)
        machine = f" on {markdown(record['hardware'])}" if "hardware" in record else ""
        lines.append(f"speed: {speeds[len(speeds) // 2]:,.0f} images per second (median){machine}")
    if "seconds" in record:
        lines.append(f"time: {plural(round(record['seconds']), 'second')}, including evaluation")
    if "versions" in record:
        lines.append("versions: " + markdown(", ".join(map(" ".join, record["versions"].items()))))
    if record.get("commit"):
        lines.append(f"commit of vit_simple: `{markdown(record['commit'])}`")
    commands = "".join(f"\n{fenced(command, 'bash')}\n" for command in record.get("commands", []))
    if not (facts.folder / RECIPE).exists():
        return f"{bullets(lines)}\n{commands}"
    options = fenced(recipe_text(facts.folder).strip(), "yaml")
    return (
        f"{bullets(lines)}\n{commands}\n<details><summary>All options ({RECIPE})</summary>\n\n{options}\n\n</details>"
    )


def plural(count: float, noun: str) -> str:
    number = f"{count:,.4g}" if count < 1000 else f"{count:,.0f}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def changed_images(facts: Facts) -> str:
    """Which images a pipeline sees with other pixels than the training did, and the code that avoids it."""
    changed, bit_depth = facts.record.get("changed_images"), facts.dataset.get("bit_depth") or 16
    if changed is None and facts.dataset.get("has_16_bit_images"):
        changed = {DEEP: None}  # of a run before the images were counted, or not at its end
    if not changed:
        return ""
    counts = [
        f"{plural(count, 'image')} ({markdown(reason)})" if count else markdown(reason)
        for reason, count in changed.items()
    ]
    code = same_pixels_code(" ".join(changed), bit_depth)
    imports = ["import numpy as np"] if any("np." in line for line in code) else []
    imports += ["from PIL import Image", ""]
    kinds = markdown(", ".join(counts))
    return (
        f"For some images, a pipeline gives the model other pixels than training did: {kinds}. Training scaled gray "
        "values to 8 bits and drew transparent images on white. To do the same, before the pipeline:\n\n"
        f"{fenced(chr(10).join([*imports, *code]), 'python')}\n"
    )


def limitations(facts: Facts) -> str:
    """What the checkpoint is for, what it outputs, and what it was not evaluated for."""
    labels, problem = list(facts.config.get("id2label", {}).values()), facts.config.get("problem_type")
    classes = f"{len(labels):,} classes" + (f": {', '.join(map(markdown, labels))}" if len(labels) <= 20 else "")
    lines = []
    if facts.dataset:
        dataset = markdown(facts.dataset["name"])
        lines.append(f"It is meant for images like those in {dataset}, and as a starting point for fine-tuning.")
    if changed := changed_images(facts):
        lines.append(changed)
    if not has_head(facts.config):
        lines.append("It outputs features, not classes.")
    elif facts.task == "image-feature-extraction":
        lines.append("Its logits are features, not classes.")
    elif problem == "regression":
        lines.append(f"It predicts numbers ({', '.join(map(markdown, labels))}), not class probabilities.")
    elif problem == "multi_label_classification":
        lines.append(f"For each image, it predicts any number of its {classes}.")
    elif len(labels) > 1:
        lines.append(f"It has {classes}. It always predicts one of them, even if the image shows none.")
    if facts.result:
        lines.append("It was not evaluated on other datasets or for demographic bias.")
    elif facts.dataset or not facts.source:
        lines.append("It was not evaluated.")
    elif facts.source == facts.base_model:
        lines.append(
            f"The converted weights were not re-evaluated; for the original results, see {markdown(facts.source)}."
        )
    else:
        lines.append("The converted weights were not re-evaluated.")
    return "\n".join(lines)
