"""What an evaluation measures, for each kind of labels, and how a person sees it.

`B` batch, `K` classes, `N` images. Sums over all batches and processes, divided once; padding and skipped images, with
the label IGNORED or NaN, have no part.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..data.decoding import BadImage
from ..data.labels import MULTI, REGRESSION, SINGLE, Labels

LARGEST_CONFUSION = 1000  # classes
MANY_CLASSES = 30  # of more than these, a table has the lowest ten
COLUMNS = {
    "top1": ("top-1", "9.2%"),
    "top5": ("top-5", "9.2%"),
    "map": ("mAP", "9.2%"),
    "mae": ("error", "9.4g"),
    "r2": ("R2", "9.4f"),
}


@dataclass
class Evaluation:
    """What one pass over a split has found.

    Args:
        values: `loss`, `count` images and, for single labels, `top1`, `top5` in [0, 1] and `correct`; for several
            labels, `map`, the mean average precision in [0, 1]; for a number, `mae`, the mean absolute error, and `r2`,
            the part of the variance that is explained.
        per_class: the accuracy, or the average precision, of each class; None without an image of it.
        confusion: how many images of each class were taken for each class (K, K), for single labels of up to
            LARGEST_CONFUSION classes.
    """

    values: dict[str, float]
    per_class: list[float | None] = field(default_factory=list)
    confusion: torch.Tensor | None = None

    @property
    def score(self) -> float:
        """The higher, the better."""
        values = self.values
        return -values["mae"] if "mae" in values else values.get("top1", values.get("map"))


class SingleLabelMetrics:
    """Of logits (B, K) and classes (B,)."""

    def __init__(self, labels: Labels, device: torch.device):
        classes = len(labels.class_names)
        self.classes, self.confused = classes, classes <= LARGEST_CONFUSION
        self.loss = torch.zeros(1, device=device)
        self.right, self.right5, self.seen = torch.zeros(3, classes + 1, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(classes**2 + 1 if self.confused else 0, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor):
        best = logits.topk(min(5, self.classes)).indices  # (B, 5)
        hits = (best == labels[:, None]).long()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        rows = torch.where(labels >= 0, labels, self.classes)  # the last: what does not count
        self.right.scatter_add_(0, rows, hits[:, 0])
        self.right5.scatter_add_(0, rows, hits.sum(1))
        self.seen.scatter_add_(0, rows, torch.ones_like(rows))
        if self.confused:
            cells = torch.where(labels >= 0, labels * self.classes + best[:, 0], self.classes**2)
            self.confusion.scatter_add_(0, cells, torch.ones_like(cells))

    def compute(self, accelerator: Accelerator) -> Evaluation:
        sums = (self.loss, self.right[:-1], self.right5[:-1], self.seen[:-1], self.confusion[:-1])
        loss, right, right5, seen, confusion = (accelerator.reduce(tensor, "sum").cpu() for tensor in sums)
        correct, count = right.sum().item(), seen.sum().item()
        require_images(count)
        values = {"loss": loss.item() / count, "top1": correct / count, "top5": right5.sum().item() / count}
        per_class = [hit / all if all else None for hit, all in zip(right.tolist(), seen.tolist())]
        confusion = confusion.view(self.classes, self.classes) if self.confused else None
        return Evaluation({**values, "correct": correct, "count": count}, per_class, confusion)


class MultiLabelMetrics:
    """Of logits (B, K) and zeros and ones (B, K), all of which are kept: (N, K) floats, twice."""

    def __init__(self, labels: Labels, device: torch.device):
        self.logits, self.targets = [], []

    def update(self, logits: torch.Tensor, targets: torch.Tensor):
        self.logits.append(logits)
        self.targets.append(targets)

    def compute(self, accelerator: Accelerator) -> Evaluation:
        logits, targets = (accelerator.gather(torch.cat(parts)).cpu() for parts in (self.logits, self.targets))
        counts = ~targets[:, 0].isnan()
        logits, targets = logits[counts], targets[counts]
        require_images(len(targets))
        loss = F.binary_cross_entropy_with_logits(logits, targets).item()
        per_class = [average_precision(*pair) for pair in zip(logits.T.numpy(), targets.T.numpy() > 0)]
        known = [value for value in per_class if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        return Evaluation({"loss": loss, "map": mean, "count": len(targets)}, per_class)


class RegressionMetrics:
    """Of values (B, 1) and values (B, 1), both in standard deviations from the mean."""

    def __init__(self, labels: Labels, device: torch.device):
        self.std = labels.std
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=exact, device=device)

    def update(self, values: torch.Tensor, targets: torch.Tensor):
        counts = ~targets.isnan()
        targets, errors = torch.where(counts, targets, 0), torch.where(counts, values - targets, 0)
        parts = (errors.square(), errors.abs(), targets, targets.square(), counts)
        self.sums += torch.stack([part.to(self.sums.dtype).sum() for part in parts])

    def compute(self, accelerator: Accelerator) -> Evaluation:
        squares, absolutes, total, total_squares, count = accelerator.reduce(self.sums, "sum").tolist()
        require_images(count)
        variance = total_squares - total**2 / count
        values = {"loss": squares / count, "mae": absolutes / count * self.std}
        return Evaluation({**values, "r2": 1 - squares / variance if variance > 0 else 0.0, "count": int(count)})


METRICS_OF = {SINGLE: SingleLabelMetrics, MULTI: MultiLabelMetrics, REGRESSION: RegressionMetrics}


def require_images(count: float):
    if not count:
        raise BadImage("--on_bad_image: expected an image to be left in every split, got one of bad images alone")


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The sum over all thresholds of precision times what it adds to recall, of (N,) scores; None without a positive.

    Images of equal scores pass a threshold together.
    """
    if not positive.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = positive[order].cumsum()
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # of those with the same score
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def table(title: str, rows: dict[str, Evaluation]) -> str:
    """A line for each of the named evaluations of one kind."""
    first = next(iter(rows.values())).values
    shown = [name for name in COLUMNS if name in first]
    lines = [f"{title:<18}" + "".join(f"{COLUMNS[name][0]:>9}" for name in shown) + "     loss   images"]
    for name, row in rows.items():
        values = row.values
        numbers = "".join(format(values[column], COLUMNS[column][1]) for column in shown)
        images = f"{values['correct']} of {values['count']} right" if "correct" in values else str(values["count"])
        lines.append(f"  {name:<16}{numbers} {values['loss']:8.4f}   {images}")
    return "\n".join(lines)


def class_table(split: str, evaluation: Evaluation, class_names: list[str]) -> str:
    """A line for each class, or for the ten lowest of many."""
    rows = [(name, value) for name, value in zip(class_names, evaluation.per_class) if value is not None]
    title = f"{split}, {'average precision' if 'map' in evaluation.values else 'right'} of each class"
    if len(rows) > MANY_CLASSES:
        title += f", the lowest 10 of {len(rows)}"
        rows = sorted(rows, key=lambda row: row[1])[:10]
    width = max([16, *(len(name) for name, _ in rows)])
    return "\n".join([title, *(f"  {name:<{width}}{value:9.2%}" for name, value in rows)])


def captions(logits: torch.Tensor, targets: list, labels: Labels) -> list[tuple[str, bool]]:
    """What logits (B, K) say and, where that is wrong, what is true; whether it is right. Numbers are in their unit."""
    names, found = labels.class_names, []
    for scores, target in zip(logits, targets):
        if labels.problem_type == REGRESSION:
            truth = target[0] * labels.std + labels.mean
            found.append((f"{scores.item():.3g} ({truth:.3g})", True))
            continue
        if labels.problem_type == SINGLE:
            said, true = names[scores.argmax()], names[target]
        else:
            said, true = (", ".join(n for n, yes in zip(names, row) if yes) for row in (scores > 0, target))
        found.append((said if said == true else f"{said or 'none'} ({true or 'none'})", said == true))
    return found
