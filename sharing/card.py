"""The model card, README.md, of a checkpoint: what the files of its folder record, and nothing else."""

import math
import re
from pathlib import Path

import safetensors
from huggingface_hub import EvalResult, ModelCardData
from transformers import PretrainedConfig

from ..conversion.convert import Checkpoint
from ..files import INHERITED, RECORD, has_head, open_card, read_json, read_metrics

BEGIN = "<!-- vit_simple: written anew by every run and push, up to the line that says end -->"
END = "<!-- vit_simple: end -->"
PLACEHOLDER = "your-name"
METRICS = {  # of an evaluation: the Hub's name of the metric, and ours
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "map": ("map", "mean average precision"),
    "mae": ("mae", "mean absolute error"),
    "r2": ("r_squared", "R2"),
    "loss": ("loss", "loss"),
}
PICTURES = {
    "curves.png": "Loss, score and learning rate",
    "confusion.png": "How often each class was taken for each",
    "predictions.png": "Test images and what the network says; red where it is wrong",
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


# What a folder records


def final_result(folder: Path) -> dict:
    """The last test of a run or, where nothing was tested, its last validation; {} without either."""
    rows = read_metrics(folder)
    for split in ("test", "validation"):
        found = [row for row in rows if row["split"] == split]
        if found:
            return found[-1]
    return {}


def interval(part: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a part of so many (Wilson, 1927)."""
    z = 1.96
    middle, spread = part + z**2 / (2 * count), z * math.sqrt(part * (1 - part) / count + z**2 / (4 * count**2))
    return (middle - spread) / (1 + z**2 / count), (middle + spread) / (1 + z**2 / count)


# The card


def split_at_markers(text: str) -> list[str]:
    """What stands before and behind the generated part, or all of a text without one."""
    parts = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text.strip(), maxsplit=1, flags=re.DOTALL)
    if any(mark in part for mark in (BEGIN, END) for part in parts):
        raise ValueError(f"README.md: expected {BEGIN} and {END} once, in this order, or neither")
    return parts


def user_text(card: str) -> str:
    """What a card has beside its metadata and its generated part."""
    return "\n".join(split_at_markers(open_card(card, "README.md").text)).strip() if card.strip() else ""


def build_card(
    folder: Path,
    repo_id: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    base: str | None = None,
) -> str:
    """README.md of a checkpoint's folder; of one that stands there all but what was measured and generated is kept.

    Args:
        repo_id: USER/NAME on the Hub; without it a placeholder stands in the snippets.
        tag: to which the snippet is pinned.
        license: as the Hub names it; by default that of the card or of the base model.
        base: another README.md to be kept in place of the folder's.

    Raises:
        ValueError: a file of the folder is damaged.
    """
    facts, config, file = read_json(folder / RECORD), read_json(folder / "config.json"), folder / "README.md"
    data = card_data(folder, facts, config, repo_id)
    text = f"{BEGIN}\n{card_text(folder, facts, config, repo_id, tag)}\n{END}"
    if base is None and file.exists():
        base = file.read_text(encoding="utf-8")
    if base is not None and base.strip():
        old = open_card(base, str(file))
        around = split_at_markers(old.text)
        text = text.join(around) if len(around) == 2 else around[0]
        ours = {(result.dataset_type, result.dataset_split) for result in data.get("eval_results", [])}
        others = [one for one in old.data.eval_results or [] if (one.dataset_type, one.dataset_split) not in ours]
        fresh = {name: data[name] for name in ("datasets", "metrics", "base_model", "model_name") if name in data}
        kept = {name: value for name, value in old.data.to_dict().items() if name != "model-index"}
        data |= kept | fresh
        if others:
            data |= {"model_name": data.get("model_name", old.data.model_name)}
            data["eval_results"] = [*data.get("eval_results", []), *others]
    if license is not None:
        data["license"] = license
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}\n"


def card_data(folder: Path, facts: dict, config: dict, repo_id: str | None) -> dict:
    """The metadata of the card, by which the Hub finds and shows a checkpoint."""
    data = {
        "library_name": "transformers",
        "pipeline_tag": task_of(config),
        "tags": ["vision", "vit", "vit_simple"],
        **{name: facts[name] for name in (*INHERITED, "base_model_relation") if facts.get(name)},
    }
    dataset, result = facts.get("dataset"), final_result(folder)
    if dataset and dataset.get("on_hub"):
        data["datasets"] = [dataset["name"]]
    if dataset and result:
        named = {name: METRICS[name] for name in measured(result, config)}
        data["metrics"] = list(dict.fromkeys(kind for kind, _ in named.values()))
        data["model_name"] = (repo_id or folder.name).rpartition("/")[2]
        data["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset["name"] if dataset.get("on_hub") else "imagefolder",
                dataset_name=dataset["name"],
                dataset_config=dataset["config"],
                dataset_split=result["split"] if result["split"] == "test" else None,  # others may be held out of train
                dataset_revision=dataset["revision"],
                metric_type=kind,
                metric_name=title,
                metric_value=result[name],
            )
            for name, (kind, title) in named.items()
        ]
    return data


def card_text(folder: Path, facts: dict, config: dict, repo_id: str | None, tag: str | None) -> str:
    """The card's sections, each of which is left out where nothing is recorded for it."""
    name, result = repo_id or f"{PLACEHOLDER}/{folder.resolve().name}", final_result(folder)
    pictures = [f"![{title}]({file})\n\n*{title}.*" for file, title in PICTURES.items() if (folder / file).exists()]
    sections = [
        f"# {name.rpartition('/')[2]}",
        summary(folder, facts, config),
        "## Use",
        use(config, read_json(folder / "preprocessor_config.json"), name, tag),
        *(["## Results", results(result, facts, config, read_metrics(folder)[-1]["step"])] if result else []),
        *pictures,
        *(["## Training", training(folder, facts)] if (folder / "train_config.yaml").exists() else []),
        *(["## Conversion", bullets(facts["remarks"])] if facts.get("remarks") else []),
        "## Intended use and limits",
        limits(config, result, facts),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(sections)


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def summary(folder: Path, facts: dict, config: dict) -> str:
    """What the checkpoint is, and where its weights come from."""

    def sides(value):
        return " x ".join(map(str, value if isinstance(value, list) else [value, value]))

    parameters = 0
    for path in folder.glob("model*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    base, data = facts.get("base_model"), facts.get("dataset", {}).get("name")
    way = f"fine-tuned from {base} on {data}" if base and data else f"trained on {data}" if data else ""
    way = way or (f"with the weights of {base}" if base else "")
    return (
        f"A plain Vision Transformer{way and f' {way}'}: {config['num_hidden_layers']} blocks of width "
        f"{config['hidden_size']}, {parameters / 1e6:.2f} million parameters, images of {sides(config['image_size'])} "
        f"pixels in patches of {sides(config['patch_size'])}."
    )


def use(config: dict, processor: dict, name: str, tag: str | None) -> str:
    """One line that opens the checkpoint, and how to pin it."""
    pin = f', revision="{tag}"' if tag else ""
    raw = ', function_to_apply="none"' if config.get("problem_type") == "regression" else ""
    advice = "" if tag else ' Add `revision="..."`, a commit of this repository, and both stay what they are today.'
    task, line = task_of(config), f'pipeline("{task_of(config)}", model="{name}"{pin}{raw}, trust_remote_code=True)'
    names, line = "pipeline", f'answers = {line}("picture.png")'
    if processor.get("do_resize") is False or task == "image-feature-extraction":  # arrays, or features: no pipeline
        names = "AutoModelForImageClassification" if has_head(config) else "AutoModel"
        line = f'model = {names}.from_pretrained("{name}"{pin}, trust_remote_code=True)'
    return (
        f"```python\nfrom transformers import {names}\n\n{line}\n```\n\n"
        f"`trust_remote_code=True` runs the two model files of this repository.{advice}"
    )


def results(result: dict, facts: dict, config: dict, last_step: int) -> str:
    """A table of the metrics, with intervals for those that are parts of a number of images."""
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name in measured(result, config):
        title = METRICS[name][1]
        if name in ("top1", "top5"):
            low, high = interval(result[name], result["count"])
            rows.append(f"| {title} | {100 * result[name]:.2f} % | {100 * low:.2f} to {100 * high:.2f} % |")
        else:
            rows.append(f"| {title} | {result[name]:.4g} | |")
    data = facts.get("dataset", {}).get("name", "the data set")
    right = f", {result['correct']:,} of them right" if "correct" in result else ""
    weights = " with averaged weights" if result.get("weights") == "ema" else ""
    when = "" if result["step"] == last_step else f", as measured at step {result['step']:,}"
    what = f"On {result['count']:,} {result['split']} images of {data}{right}{weights}{when}:"
    return "\n".join([what, "", *rows])


def training(folder: Path, facts: dict) -> str:
    """How the run was made, as far as it can be repeated."""
    steps, lines = [row for row in read_metrics(folder) if row["split"] == "train"], []
    if steps:
        speeds = sorted(row["images_per_second"] for row in steps)
        lines.append(f"{steps[-1]['step']:,} steps, {steps[-1]['epoch']:.4g} epochs")
        machine = f", on {facts['hardware']}" if "hardware" in facts else ""
        lines.append(f"{speeds[len(speeds) // 2]:,.0f} images per second, the median{machine}")
    if "seconds" in facts:
        lines.append(f"{facts['seconds']:,.0f} s from the first step to the saved folder, evaluations included")
    if data := facts.get("dataset"):
        revision = f" at revision `{data['revision']}`" if data["revision"] else ""
        lines.append(f"data: {data['name']}{revision}, {data['images']:,} training images")
    if "versions" in facts:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    if facts.get("commit"):
        lines.append(f"commit of vit_simple: `{facts['commit']}`")
    commands = "".join(f"\n```bash\n{command}\n```\n" for command in facts.get("commands", []))
    recipe = (folder / "train_config.yaml").read_text(encoding="utf-8").strip()
    return (
        f"{bullets(lines)}\n{commands}\n"
        f"<details><summary>The whole recipe (train_config.yaml)</summary>\n\n```yaml\n{recipe}\n```\n\n</details>"
    )


def limits(config: dict, result: dict, facts: dict) -> str:
    """What the record allows to say, and what it does not."""
    names, data = list(config.get("id2label", {}).values()), facts.get("dataset", {}).get("name")
    lines = []
    if data:
        lines.append(f"It is meant for images like those of {data}, and as a start for fine-tuning.")
    if facts.get("dataset", {}).get("has_16_bit_images"):
        lines.append(
            "16-bit images were scaled to 8 bits in training; a pipeline clips them at 255, so convert them first."
        )
    if not has_head(config):
        lines.append("It gives features, no classes.")
    elif task_of(config) == "image-feature-extraction":
        lines.append("Its logits are features, no classes.")
    elif config.get("problem_type") is None and len(names) > 1:
        known = ", ".join(names) if len(names) <= 20 else f"{len(names):,} classes"
        lines.append(f"It takes every picture for one of these: {known}; also one that shows nothing of the kind.")
    if result:
        lines.append("Nothing was measured on other data, and nothing for groups of people.")
    elif facts.get("base_model"):
        lines.append(f"Nothing was measured here; what holds for {facts['base_model']} holds for it.")
    return "\n".join(lines) or "Nothing was measured."


def task_of(config: dict) -> str:
    """What the Hub calls the task; the logits of CLIP's projection are features."""
    features = all(re.fullmatch(r"feature \d+", name) for name in config.get("id2label", {"": ""}).values())
    return "image-classification" if has_head(config) and not features else "image-feature-extraction"


def measured(result: dict, config: dict) -> list[str]:
    """The metrics of a result that say something; of five classes and less, the first five are always right."""
    few = len(config.get("id2label", {})) <= 5
    return [name for name in METRICS if name in result and not (name == "top5" and few)]


def write_card(checkpoint: Checkpoint, config: PretrainedConfig | dict, folder: Path, notes: list[str]):
    """Writes README.md of a folder for another library: where its weights come from, and how to open it."""
    name, library = f"{PLACEHOLDER}/{folder.name}", "timm" if isinstance(config, dict) else "transformers"
    use, classes = f'timm.create_model("hf-hub:{name}", pretrained=True)', "head.weight" in checkpoint.tensors
    if library == "transformers":
        (kind,) = config.architectures
        classes = kind.endswith("ForImageClassification")
        options = ", add_pooling_layer=False" if kind == "ViTModel" else ""
        use = f'transformers.{kind}.from_pretrained("{name}"{options})'
    task = "image-classification" if classes else "image-feature-extraction"
    data = ModelCardData(library_name=library, pipeline_tag=task, **checkpoint.card)
    origin = checkpoint.card.get("base_model", "another checkpoint")
    origin = ", ".join(origin) if isinstance(origin, list) else origin
    lines = [f"# {folder.name}", f"The weights of {origin}:", f"```python\nimport {library}\n\nmodel = {use}\n```"]
    text = "\n\n".join([*lines, *(f"- {note}" for note in notes)])
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}\n", encoding="utf-8")
