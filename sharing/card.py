"""The model card of a checkpoint, README.md: generated metadata and text, merged with what the user wrote."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..files import INHERITED, UserError, open_card, read_text
from .card_text import METRICS, Facts, card_text
from .markdown import MARKER

BEGIN = f"{MARKER} every run and push replaces the text from here to the end mark; write above or below it -->"
END = f"{MARKER} end -->"
OLD_BEGIN = "<!-- vit_simple: written anew by every run and push, up to the line that says end -->"  # of earlier cards


def build_card(
    folder: Path,
    repo_id: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    old_card: str | None = None,
) -> str:
    """README.md of a checkpoint's folder; of an old card, all but the generated text and the measured results is kept.

    Args:
        repo_id: USER/NAME on the Hub, for the snippet; by default a placeholder.
        tag: the revision that the snippet loads.
        license: a license id of the Hub; by default the old card's or the base model's.
        old_card: the card on the Hub, to keep the user's text of this card instead of that in the folder's README.md.
            Metadata is kept of both; where they differ, of this one.

    Raises:
        UserError: a file of the folder, or the old card, is damaged.
    """
    facts, file = Facts.read(folder), folder / "README.md"
    data = card_data(facts, repo_id)
    text = f"{BEGIN}\n{card_text(facts, repo_id, tag)}\n{END}"
    old_cards = [read_text(file) if file.exists() else "", old_card or ""]
    opened = [open_card(card, str(file)) for card in old_cards if card.strip()]
    for old in opened:
        data = merge_data(old.data, data)
    if opened:
        user_parts = split_at_markers(opened[-1].text)
        text = text.join(user_parts) if len(user_parts) == 2 else user_parts[0]
    if license is not None:
        data["license"] = license
    return render(data, text)


def render(data: dict, text: str) -> str:
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}\n"


# The user's part


def split_at_markers(text: str) -> list[str]:
    """The texts before and after the generated text, or the whole text if nothing in it is generated.

    Raises:
        UserError: a marker is missing or repeated.
    """
    text = text.strip().replace(OLD_BEGIN, BEGIN)
    parts = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, maxsplit=1, flags=re.DOTALL)
    if any(marker in part for marker in (BEGIN, END) for part in parts):
        raise UserError(f"README.md: expected {BEGIN} and {END} once and in this order, or neither")
    return parts


def user_text(card: str) -> str:
    """The text of a card without metadata and generated text."""
    return "\n".join(split_at_markers(open_card(card, "README.md").text)).strip() if card.strip() else ""


def merge_data(old: ModelCardData, new: dict) -> dict:
    """The old metadata, with new values for what a run or push determines; results on other datasets are kept."""
    determined = {name: new[name] for name in ("datasets", "metrics", "base_model", "model_name") if name in new}
    kept = {name: value for name, value in old.to_dict().items() if name != "model-index"}
    data = new | kept | determined
    results = new.get("eval_results", [])
    evaluated = {(result.dataset_type, result.dataset_split) for result in results}
    evaluated |= {(result.dataset_type, None) for result in results}  # an earlier validation of the same run
    others = [
        result for result in old.eval_results or [] if (result.dataset_type, result.dataset_split) not in evaluated
    ]
    if others:
        data["model_name"] = data.get("model_name", old.model_name)
        data["eval_results"] = [*data.get("eval_results", []), *others]
    return data


# The generated part


def card_data(facts: Facts, repo_id: str | None) -> dict:
    """The metadata by which the Hub finds and shows the checkpoint."""
    data = {
        "library_name": "transformers",
        "pipeline_tag": facts.task,
        "tags": ["vision", "vit", "vit_simple"],
        **{name: facts.record[name] for name in (*INHERITED, "base_model_relation") if facts.record.get(name)},
    }
    dataset, result = facts.dataset, facts.result
    if dataset.get("on_hub"):
        data["datasets"] = [dataset["name"]]
    if dataset and result:
        metrics = {name: METRICS[name] for name in facts.result_metrics if METRICS[name][0] is not None}
        data["metrics"] = list(dict.fromkeys(metric_type for metric_type, _ in metrics.values()))
        data["model_name"] = (repo_id or facts.folder.name).rpartition("/")[2]
        data["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset["name"] if dataset.get("on_hub") else "imagefolder",
                dataset_name=dataset["name"],
                dataset_config=dataset.get("config"),
                # A validation split may be held out of train, so it is not one that the Hub knows.
                dataset_split=result["split"] if result["split"] == "test" else None,
                dataset_revision=dataset.get("revision"),
                metric_type=metric_type,
                metric_name=title,
                metric_value=result[name],
            )
            for name, (metric_type, title) in metrics.items()
        ]
    return data
