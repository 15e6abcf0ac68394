"""What a label column means: classes, several classes at a time, or a number; and how its values become targets.

`B` batch, `K` classes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from datasets import ClassLabel, Features, Value
from datasets.features import LargeList, List

IGNORED = -100  # the label of what does not count, as in torch.nn.functional.cross_entropy; NaN among floats
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class BadLabel(ValueError):
    """A label that is none of those expected."""


def column_kind(feature) -> str | None:
    """What a column can hold: "class", "value", "classes", "words", "vector", "number", or, for None, no labels."""
    inner = getattr(feature, "feature", None) if isinstance(feature, (List, LargeList)) else None
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(inner, ClassLabel):
        return "classes"
    if isinstance(inner, Value):
        return "words" if inner.dtype in ("string", "large_string") else "vector"
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        return "number"
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool", "string", "large_string")):
        return "value"
    return None


def find_label_column(features: Features, name: str | None) -> str:
    """The column called `name`; without a name the only one of ClassLabel or, if there is none, that can hold labels.

    Columns of WebDataset's own, `__key__` and `__url__`, are not taken for labels.

    Raises:
        ValueError: the named column is missing or cannot hold labels; without a name, none or several fit.
    """
    kinds = {column: column_kind(feature) for column, feature in features.items() if not column.startswith("__")}
    named = [column for column, kind in kinds.items() if kind in ("class", "classes")]
    fitting = named or [column for column, kind in kinds.items() if kind]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if kinds.get(name):
        return name
    wanted = "one column of labels" if name is None else f"labels in the column {name!r}"
    hint = "" if any(kinds.values()) else "; pictures in train/CLASS/ have labels, as may a metadata.csv beside them"
    raise ValueError(f"--label_column_name: expected {wanted}, got the columns {column_names(features)}{hint}")


def column_names(features: Features) -> str:
    """The columns, as an error names them."""
    names = {column: getattr(kind, "dtype", None) for column, kind in features.items() if isinstance(kind, Value)}
    return ", ".join(f"{column} ({names.get(column) or type(kind).__name__})" for column, kind in features.items())


@dataclass
class LabelCounts:
    """What is in a column of labels, in the order of its rows.

    Args:
        rows: how many.
        found: value (a list as a tuple) -> how often it is there, and the first row with it; of numbers only those that
            are missing or not finite.
        mean, spread: of the finite numbers, the latter their sum of squares about the mean.
    """

    rows: int = 0
    found: dict = field(default_factory=dict)
    mean: float = 0.0
    spread: float = 0.0


def count_labels(values: Iterable, kind: str) -> LabelCounts:
    counts, numbers = LabelCounts(), 0
    for row, value in enumerate(values):
        counts.rows += 1
        if kind == "number" and value is not None:
            if math.isfinite(value):
                numbers += 1
                step = value - counts.mean
                counts.mean += step / numbers
                counts.spread += step * (value - counts.mean)
                continue
            value = math.nan if math.isnan(value) else value
        value = tuple(value) if isinstance(value, list) else value
        count, first = counts.found.get(value, (0, row))
        counts.found[value] = count + 1, first
    return counts


@dataclass
class Labels:
    """The labels of a data set.

    Args:
        column: its name.
        kind: see `column_kind`.
        class_names: of the K classes, in the order of the network's outputs; in a regression the column's name alone.
        classes: value in the column -> class.
        rows, counts: how many training rows there are in all and with each class, where they were counted.
        mean, std: of the numbers of a regression, whose targets are deviations from the mean.
    """

    column: str
    kind: str
    class_names: list[str]
    classes: dict = field(default_factory=dict)
    rows: int | None = None
    counts: list[int] | None = None
    mean: float = 0.0
    std: float = 1.0

    @property
    def problem_type(self) -> str:
        return {"number": REGRESSION, "classes": MULTI, "words": MULTI, "vector": MULTI}.get(self.kind, SINGLE)

    @property
    def expected(self) -> str:
        """What a value must be, in the words of an error."""
        few = self.class_names if len(self.class_names) <= 10 else [*self.class_names[:10], "..."]
        return {
            "class": f"labels from 0 to {len(self.class_names) - 1}",
            "value": f"the labels of 'train' ({', '.join(few)})",
            "words": f"lists of the labels of 'train' ({', '.join(few)})",
            "classes": f"lists of labels from 0 to {len(self.class_names) - 1}",
            "vector": f"lists of {len(self.class_names)} numbers, each 0 or 1 (lists of classes need List(ClassLabel))",
            "number": "finite numbers",
        }[self.kind]

    def target(self, value) -> int | list[float]:
        """A class, K zeros and ones, or one number in a list, in standard deviations from the mean.

        Raises:
            BadLabel: the value is none of these.
        """
        if self.problem_type == SINGLE and value in self.classes:
            return self.classes[value]
        if self.kind in ("classes", "words") and value is not None and all(one in self.classes for one in value):
            present = set(value)
            return [float(one in present) for one in self.classes]
        if self.kind == "vector" and value and len(value) == len(self.class_names) and {0, 1}.issuperset(value):
            return [float(one) for one in value]
        if self.kind == "number" and value is not None and math.isfinite(value):
            return [(value - self.mean) / self.std]
        raise BadLabel(f"label: expected {self.expected}, got {value}")

    def ignored_targets(self, count: int) -> torch.Tensor:
        """Targets that do not count: int64 (B,) or float32 (B, K)."""
        if self.problem_type == SINGLE:
            return torch.full((count,), IGNORED)
        return torch.full((count, len(self.class_names)), math.nan)

    def are_hidden(self, part: LabelCounts) -> bool:
        """Whether a split keeps its labels secret, as the test split of ImageNet-1k does: all of them missing or -1."""
        return part.rows == sum(
            count
            for value, (count, _) in part.found.items()
            if value is None or value is math.nan or (value == -1 and self.problem_type == SINGLE)
            if value not in self.classes
        )

    def check(self, split: str, part: LabelCounts):
        """Raises ValueError unless every row of a split has a label that is expected."""
        bad = {}
        for value in part.found:
            try:
                self.target(value)
            except BadLabel:
                bad[value] = part.found[value]
        if bad:
            value, (_, row) = min(bad.items(), key=lambda item: item[1][1])
            value = list(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"--label_column_name: expected {self.expected}, got {value} in row {row} of the split {split!r} "
                f"({sum(count for count, _ in bad.values())} such rows)"
            )

    def count(self, train: LabelCounts):
        """Takes the training rows down.

        Raises:
            ValueError: all rows have the same label.
        """
        self.rows, self.mean, self.std = train.rows, train.mean, math.sqrt(train.spread / train.rows)
        if len(train.found) == 1 or (self.kind == "number" and not self.std):
            only = self.mean if self.kind == "number" else next(iter(train.found))
            raise ValueError(f"--dataset_name: expected several classes in the split 'train', got {only} only")
        self.counts = [0] * len(self.class_names)
        for value, (count, _) in train.found.items():
            target = self.target(value)
            for number in [target] if self.problem_type == SINGLE else [i for i, one in enumerate(target) if one]:
                self.counts[number] += count

    def weights(self) -> torch.Tensor:
        """For `--class_weights balanced`, float32 (K,): what makes classes count alike.

        Single labels: rows / (classes * rows of the class), which is 1 on average over the rows; a class without rows
        has no part. Several labels, for positive targets: rows without the class / rows with it, from 0.01 to 100.
        """
        counts = torch.tensor(self.counts, dtype=torch.float32)
        if self.problem_type == MULTI:
            return ((self.rows - counts) / counts).clamp(0.01, 100)
        return torch.where(counts > 0, self.rows / ((counts > 0).sum() * counts), 0)


def build_labels(column: str, feature, train: LabelCounts | None) -> Labels:
    """What a column's feature and, where that does not say it, its values in "train" make of the labels.

    Raises:
        ValueError: a classification has fewer than two classes.
    """
    kind, classes = column_kind(feature), {}
    if kind == "number":
        return Labels(column, kind, [column])
    if kind == "value":
        values = sorted(value for value in train.found if value is not None)
        names, classes = [str(value) for value in values], {value: number for number, value in enumerate(values)}
    elif kind == "words":
        names = sorted({word for value in train.found if value for word in value if word is not None})
        classes = {word: number for number, word in enumerate(names)}
    elif kind == "vector":
        longest = max((len(value) for value in train.found if value), default=0)
        length = feature.length if feature.length >= 0 else longest
        names = [str(number) for number in range(length)]
    else:
        names = (feature if kind == "class" else feature.feature).names
        names = [str(name) for name in names]  # in a card's YAML an unquoted no is False
        classes = {number: number for number in range(len(names))}
    if len(names) < 2:
        raise ValueError(f"--label_column_name: expected at least two classes in {column!r}, got {names}")
    return Labels(column, kind, names, classes)
