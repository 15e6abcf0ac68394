"""What an evaluation measures for each kind of labels, and the tables that show it.

`B` batch, `K` classes, `N` images. Metrics are sums over all batches and processes, divided once at the end. Padding
and skipped images have the label IGNORED or NaN and do not count.
"""

import typing
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator

from ..data.labels import MULTI, REGRESSION, SINGLE, Labels
from ..data.reading import BadImage
from ..files import shorten, terminal_text, text_width
from .calibration import Fitted, Reliability
from .mistakes import NAME_WIDTH, Mistakes, Samples

LARGEST_CONFUSION = 1000  # classes
MANY_CLASSES = 30  # a table of more classes shows the ten lowest
COLUMNS = {
    "top1": ("top-1", "9.2%"),
    "top5": ("top-5", "9.2%"),
    "map": ("mAP", "9.2%"),
    "micro_f1": ("F1 micro", "9.2%"),
    "macro_f1": ("F1 macro", "9.2%"),
    "mae": ("error", "9.4g"),
    "r2": ("R2", "9.4f"),
}
CONFIDENCE = {  # of a table of its own
    "expected_calibration_error": "ECE",
    "negative_log_likelihood": "NLL",
    "brier_score": "Brier",
}


@dataclass
class Evaluation:
    """The result of an evaluation of a split.

    Args:
        values: `loss` and `count`, the number of images. One class per image: also `top1`, `top5` in [0, 1] and
            `correct`. Several classes per image: `map`, the mean average precision, and the F1 scores of `f1_scores`,
            in [0, 1]. A number: `mae`, the mean absolute error in the unit of the labels, and `r2`, the explained
            fraction of the variance. Of classes also what `Reliability` and `Fitted.values` have.
        per_class: accuracy or average precision of each class, None for a class without images.
        confusion: number of images of each class (row) predicted as each class (column), (K, K); only for one class per
            image and at most LARGEST_CONFUSION classes.
        mistakes: the images with the worst predictions: the most confident wrong classes, or the largest errors.
        reliability: see `Reliability.compute`.
        fitted: what was fitted to this split or, on the test split, to the validation split.
    """

    values: dict[str, typing.Any]
    per_class: list[float | None] = field(default_factory=list)
    confusion: torch.Tensor | None = None
    mistakes: Samples | None = None
    reliability: dict[str, torch.Tensor] = field(default_factory=dict)
    fitted: Fitted | None = None

    @property
    def score(self) -> float:
        """A number to compare evaluations by; higher is better."""
        values = self.values
        return -values["mae"] if "mae" in values else values.get("top1", values.get("map"))


class SingleLabelMetrics:
    """Accuracy of logits (B, K) and classes (B,)."""

    def __init__(self, labels: Labels, device: torch.device, fitted: Fitted):
        classes, self.mistakes = len(labels.class_names), Mistakes()
        self.fitted, self.reliability = fitted, Reliability(device, fitted)
        self.classes, self.has_confusion = classes, classes <= LARGEST_CONFUSION
        self.correct, self.correct5, self.count = torch.zeros(3, classes + 1, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(classes**2 + 1 if self.has_confusion else 0, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor | None = None):
        self.reliability.update(logits, labels)
        logits = logits / self.fitted.divisor
        best = logits.topk(min(5, self.classes)).indices  # (B, 5)
        hits = (best == labels[:, None]).long()
        if pixels is not None:
            is_wrong = (labels >= 0) & (hits[:, 0] == 0)
            self.mistakes.update(logits.softmax(dim=-1).amax(dim=-1) * is_wrong, pixels, logits, labels)
        slots = torch.where(labels >= 0, labels, self.classes)  # the last slot does not count
        self.correct.scatter_add_(0, slots, hits[:, 0])
        self.correct5.scatter_add_(0, slots, hits.sum(1))
        self.count.scatter_add_(0, slots, torch.ones_like(slots))
        if self.has_confusion:
            cells = torch.where(labels >= 0, labels * self.classes + best[:, 0], self.classes**2)
            self.confusion.scatter_add_(0, cells, torch.ones_like(cells))

    def compute(self, accelerator: Accelerator) -> Evaluation:
        sums = (self.correct[:-1], self.correct5[:-1], self.count[:-1], self.confusion[:-1])
        corrects, corrects5, counts, confusion = (accelerator.reduce(tensor, "sum").cpu() for tensor in sums)
        correct, count = corrects.sum().item(), counts.sum().item()
        require_images(count)
        values, bins = self.reliability.compute(accelerator)
        scores = {"top1": correct / count, "top5": corrects5.sum().item() / count, "correct": correct, "count": count}
        values = {"loss": values["negative_log_likelihood"], **scores, **values}
        per_class = [hits / images if images else None for hits, images in zip(corrects.tolist(), counts.tolist())]
        confusion = confusion.view(self.classes, self.classes) if self.has_confusion else None
        mistakes = self.mistakes.compute(accelerator)
        return Evaluation(values, per_class, confusion, mistakes, bins, self.fitted)


class MultiLabelMetrics:
    """Average precision and F1 of logits (B, K) and targets of zeros and ones (B, K). Keeps both for all N images."""

    def __init__(self, labels: Labels, device: torch.device, fitted: Fitted):
        self.class_names, self.fitted, self.reliability = labels.class_names, fitted, Reliability(device, fitted)
        self.logits, self.targets, self.mistakes = [], [], Mistakes()

    def update(self, logits: torch.Tensor, targets: torch.Tensor, pixels: torch.Tensor | None = None):
        self.reliability.update(logits, targets)
        logits = logits / self.fitted.divisor
        if pixels is not None:
            errors = (logits.sigmoid() - targets).abs().amax(dim=-1).nan_to_num(0)
            self.mistakes.update(torch.where(errors > 0.5, errors, 0), pixels, logits, targets)
        self.logits.append(logits)
        self.targets.append(targets)

    def compute(self, accelerator: Accelerator) -> Evaluation:
        logits, targets = (accelerator.gather(torch.cat(parts)).cpu() for parts in (self.logits, self.targets))
        is_image = ~targets[:, 0].isnan()
        logits, targets = logits[is_image], targets[is_image]
        require_images(len(targets))
        positive = targets.numpy() > 0
        per_class = [average_precision(*pair) for pair in zip(logits.T.numpy(), positive.T)]
        known = [value for value in per_class if value is not None]
        scores = {"map": sum(known) / len(known) if known else 0.0, **f1_scores(logits.numpy() > 0, positive)}
        if self.fitted.thresholds is not None:
            thresholds = np.array([self.fitted.thresholds[name] for name in self.class_names])
            at_thresholds = f1_scores(logits.sigmoid().numpy() >= thresholds, positive)
            scores |= {f"{name}_at_thresholds": score for name, score in at_thresholds.items()}
        values, bins = self.reliability.compute(accelerator)
        values = {"loss": values["negative_log_likelihood"], **scores, "count": len(targets), **values}
        mistakes = self.mistakes.compute(accelerator)
        return Evaluation(values, per_class, mistakes=mistakes, reliability=bins, fitted=self.fitted)


class RegressionMetrics:
    """Errors of predictions (B, 1) and targets (B, 1), both normalized by the mean and deviation of the labels."""

    def __init__(self, labels: Labels, device: torch.device, fitted: Fitted):
        self.std, self.mistakes = labels.std, Mistakes()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)

    def update(self, predictions: torch.Tensor, targets: torch.Tensor, pixels: torch.Tensor | None = None):
        is_image = ~targets.isnan()
        if pixels is not None:
            distances = (predictions - targets).abs().amax(dim=-1).nan_to_num(0)
            self.mistakes.update(distances, pixels, predictions, targets)
        targets, errors = torch.where(is_image, targets, 0), torch.where(is_image, predictions - targets, 0)
        terms = (errors.square(), errors.abs(), targets, targets.square(), is_image)
        self.sums += torch.stack([term.to(self.sums.dtype).sum() for term in terms])

    def compute(self, accelerator: Accelerator) -> Evaluation:
        squares, absolutes, total, total_squares, count = accelerator.reduce(self.sums, "sum").tolist()
        require_images(count)
        variance = total_squares - total**2 / count
        values = {"loss": squares / count, "mae": absolutes / count * self.std}
        values |= {"r2": 1 - squares / variance if variance > 0 else 0.0, "count": int(count)}
        return Evaluation(values, mistakes=self.mistakes.compute(accelerator))


METRICS_OF: dict[str, type] = {SINGLE: SingleLabelMetrics, MULTI: MultiLabelMetrics, REGRESSION: RegressionMetrics}


def require_images(count: float):
    if not count:
        raise BadImage("every image of a split is unreadable")


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The sum of precision times the gain in recall over all thresholds; None without a positive image.

    Args:
        scores: (N,) floats; images with equal scores pass a threshold together.
        positive: (N,) booleans.
    """
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = positive[order].cumsum()
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # image with this score
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def f1_scores(predicted: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """The F1 of all decisions together (micro), and the mean of the classes' F1 (macro), of booleans (N, K).

    The F1 of a class that is neither there nor predicted is 0, as in scikit-learn.
    """
    hits, total = (predicted & positive).sum(0), predicted.sum(0) + positive.sum(0)  # (K,)
    macro = (2 * hits / np.maximum(total, 1)).mean()
    return {"micro_f1": float(2 * hits.sum() / max(total.sum(), 1)), "macro_f1": float(macro)}


def table(title: str, evaluations: dict[str, Evaluation]) -> str:
    """One line for each named evaluation; all of them have the same metrics."""
    metrics = next(iter(evaluations.values())).values
    columns = [name for name in COLUMNS if name in metrics]
    lines = [f"{title:<18}" + "".join(f"{COLUMNS[name][0]:>9}" for name in columns) + "     loss   images"]
    for name, evaluation in evaluations.items():
        values = evaluation.values
        numbers = "".join(format(values[column], COLUMNS[column][1]) for column in columns)
        images = f"{values['correct']} of {values['count']} correct" if "correct" in values else str(values["count"])
        lines.append(f"  {name:<16}{numbers} {values['loss']:8.4f}   {images}")
    return "\n".join(lines)


def confidence_table(evaluations: dict[str, Evaluation]) -> str:
    """How far the probabilities can be trusted, one line for each evaluation, or before and after a temperature."""
    lines = [f"{'probabilities':<26}" + "".join(f"{title:>9}" for title in CONFIDENCE.values())]
    for name, evaluation in evaluations.items():
        for moment, values in evaluation.values.get("calibration", {"": evaluation.values}).items():
            lines.append(f"  {f'{name} {moment}':<24}" + "".join(f"{values[column]:9.4f}" for column in CONFIDENCE))
    return "\n".join(lines)


def class_table(split: str, evaluation: Evaluation, class_names: list[str]) -> str:
    """One line for each class, or for the ten lowest of many."""
    pairs = zip(class_names, evaluation.per_class)
    classes = [(terminal_text(name), value) for name, value in pairs if value is not None]
    title = f"{split}, {'average precision' if 'map' in evaluation.values else 'accuracy'} of each class"
    if len(classes) > MANY_CLASSES:
        title += f", the lowest 10 of {len(classes)}"
        classes = sorted(classes, key=lambda item: item[1])[:10]
    width = max([16, *(len(name) for name, _ in classes)])
    return "\n".join([title, *(f"  {name:<{width}}{value:9.2%}" for name, value in classes)])


def captions(logits: torch.Tensor, targets: list, labels: Labels) -> list[tuple[str, bool]]:
    """A caption for each image, and whether the prediction is correct.

    It gives the prediction from the logits (B, K) and, in parentheses, the label if that is another. In a regression it
    gives both numbers, in the unit of the labels. Long names are cut; two that are too long for one line get two.
    """
    names, found = labels.class_names, []
    for scores, target in zip(logits, targets):
        if labels.problem_type == REGRESSION:
            predicted, true = (value * labels.std + labels.mean for value in (scores.item(), target[0]))
            found.append((f"{predicted:.3g} ({true:.3g})", True))
            continue
        if labels.problem_type == SINGLE:
            predicted, true = names[scores.argmax()], names[target]
        else:
            predicted, true = (
                ", ".join(name for name, is_positive in zip(names, row) if is_positive) for row in (scores > 0, target)
            )
        is_correct = predicted == true
        predicted, true = (shorten(name or "none", NAME_WIDTH) for name in (predicted, true))
        gap = "\n" if text_width(predicted + true) > NAME_WIDTH else " "
        found.append((predicted if is_correct else f"{predicted}{gap}({true})", is_correct))
    return found
