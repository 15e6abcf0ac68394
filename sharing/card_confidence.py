"""The section of a model card that says how far the probabilities can be trusted, and how to use them."""

from .markdown import markdown

MANY_CLASSES = 30  # with more, thresholds are named in provenance.json alone
COLUMNS = {
    "expected_calibration_error": "expected calibration error",
    "negative_log_likelihood": "negative log likelihood",
    "brier_score": "Brier score",
}
MOMENTS = {"before": "as trained", "after": "divided by the temperature"}


def section(result: dict, record: dict, problem_type: str | None) -> str:
    """The section; "" for a regression, and for a run of an earlier version.

    Args:
        result: the line of metrics.jsonl.
        record: provenance.json.
    """
    if (error := result.get("expected_calibration_error")) is None:
        return ""
    several = problem_type == "multi_label_classification"
    subject, event = "the probability of the predicted class", "it is right"
    if several:
        subject, event = "the probability of a class", "an image has it"
    parts = [
        f"On average over {result['count']:,} {markdown(result['split'])} images, {subject} is "
        f"{100 * error:.1f} percentage points away from how often {event} "
        "(expected calibration error, 15 bins)."
    ]
    if (temperature := record.get("temperature")) is None:
        parts[0] += " No temperature was fitted."
    else:
        parts += [temperature_text(temperature, bool(record.get("calibrated")), several)]
        parts += filter(None, [before_and_after(result.get("calibration") or {})])
    if (score := record.get("keep_score")) is not None:
        parts.append(
            f"95% of the validation images have a highest probability of at least {score:.3g}. An image with a lower "
            "one may show none of the classes."
        )
    if thresholds := record.get("thresholds"):
        parts.append(thresholds_text(thresholds))
    return "\n\n".join(parts)


def temperature_text(temperature: float, calibrated: bool, several: bool) -> str:
    if calibrated:
        return (
            f"The head was divided by {temperature:.4g}, the temperature that fits the validation images best. The "
            "logits of this checkpoint are calibrated as they are."
        )
    return (
        f"The temperature that fits the validation images best is {temperature:.4g}. The weights do not contain it: "
        f"divide the logits by it before the {'sigmoid' if several else 'softmax'}."
    )


def before_and_after(calibration: dict[str, dict[str, float]]) -> str:
    """A table of the metrics of the logits as trained, and divided by the temperature."""
    found = {
        title: calibration[name] for name, title in MOMENTS.items() if calibration.get(name, {}).keys() >= {*COLUMNS}
    }
    lines = [["logits", *COLUMNS.values()], ["---"] * 4]
    lines += [[title, *(f"{values[name]:.4f}" for name in COLUMNS)] for title, values in found.items()]
    return table(lines) if found else ""


def thresholds_text(thresholds: dict[str, float]) -> str:
    """A table of the classes' thresholds, if they are few."""
    text = "Each class has its own threshold for the probability, the one with the highest F1 on the validation images"
    if len(thresholds) > MANY_CLASSES:
        lowest, highest = min(thresholds.values()), max(thresholds.values())
        return f"{text}. provenance.json has them, from {lowest:.3g} to {highest:.3g}."
    rows = [[markdown(name), f"{threshold:.3f}"] for name, threshold in thresholds.items()]
    return f"{text}:\n\n{table([['class', 'threshold'], ['---'] * 2, *rows])}"


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
