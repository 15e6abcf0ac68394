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


Tally = dict[object, tuple[int, int]]  # a value (a list as a tuple) -> how often it is there, and the first row with it


class BadLabel(ValueError):
    """A label that is none of those expected."""


def kind_of(feature) -> str | None:
    """What a column of this feature can hold: "class", "value", "classes", "vector", "number", or no labels."""
    inner = getattr(feature, "feature", None) if isinstance(feature, (List, LargeList)) else None
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(inner, ClassLabel):
        return "classes"
    if isinstance(inner, Value) and not inner.dtype.endswith("string"):
        return "vector"
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
    kinds = {column: kind_of(feature) for column, feature in features.items() if not column.startswith("__")}
    named = [column for column, kind in kinds.items() if kind in ("class", "classes")]
    fitting = named or [column for column, kind in kinds.items() if kind]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if kinds.get(name):
        return name
    wanted = "one column of labels" if name is None else f"labels in the column {name!r}"
    raise ValueError(f"--label_column_name: expected {wanted}, got the columns {column_names(features)}")


def column_names(features: Features) -> str:
    """The columns, as an error names them."""
    names = {column: getattr(kind, "dtype", None) for column, kind in features.items() if isinstance(kind, Value)}
    return ", ".join(f"{column} ({names.get(column) or type(kind).__name__})" for column, kind in features.items())


def tally(values: Iterable) -> Tally:
    found = {}
    for row, value in enumerate(values):
        value = tuple(value) if isinstance(value, list) else value
        count, first = found.get(value, (0, row))
        found[value] = count + 1, first
    return found


@dataclass
class Labels:
    """The labels of a data set.

    Args:
        column: its name.
        kind: see `kind_of`.
        class_names: of the K classes, in the order of the network's outputs; in a regression the column's name alone.
        classes: value in the column -> class.
        rows, counts: how many training rows there are in all and with each class, where they were counted.
    """

    column: str
    kind: str
    class_names: list[str]
    classes: dict = field(default_factory=dict)
    rows: int | None = None
    counts: list[int] | None = None

    @property
    def problem_type(self) -> str:
        return {"number": REGRESSION, "classes": MULTI, "vector": MULTI}.get(self.kind, SINGLE)

    @property
    def expected(self) -> str:
        """What a value must be, in the words of an error."""
        few = self.class_names if len(self.class_names) <= 10 else [*self.class_names[:10], "..."]
        return {
            "class": f"labels from 0 to {len(self.class_names) - 1}",
            "value": f"the labels of 'train' ({', '.join(few)})",
            "classes": f"lists of labels from 0 to {len(self.class_names) - 1}",
            "vector": f"lists of {len(self.class_names)} numbers, each 0 or 1 (lists of classes need List(ClassLabel))",
            "number": "finite numbers",
        }[self.kind]

    def target(self, value) -> int | list[float]:
        """A class, K zeros and ones, or one number in a list.

        Raises:
            BadLabel: the value is none of these.
        """
        if self.problem_type == SINGLE and value in self.classes:
            return self.classes[value]
        if self.kind == "classes" and value is not None and all(one in self.classes for one in value):
            present = set(value)
            return [float(one in present) for one in self.classes]
        if self.kind == "vector" and value and len(value) == len(self.class_names) and {0, 1}.issuperset(value):
            return [float(one) for one in value]
        if self.kind == "number" and value is not None and math.isfinite(value):
            return [value]
        raise BadLabel(f"label: expected {self.expected}, got {value}")

    def blank(self, count: int) -> torch.Tensor:
        """Targets that do not count: int64 (B,) or float32 (B, K)."""
        if self.problem_type == SINGLE:
            return torch.full((count,), IGNORED)
        return torch.full((count, len(self.class_names)), math.nan)

    def secret(self, found: Tally) -> bool:
        """Whether a split keeps its labels secret, as the test split of ImageNet-1k does: all of them missing or -1."""
        return self.problem_type == SINGLE and set(found) <= {None, -1} - set(self.classes)

    def check(self, split: str, found: Tally):
        """Raises ValueError unless every row of a split has a label that is expected."""
        bad = {}
        for value in found:
            try:
                self.target(value)
            except BadLabel:
                bad[value] = found[value]
        if bad:
            value, (_, row) = min(bad.items(), key=lambda item: item[1][1])
            value = list(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"--label_column_name: expected {self.expected}, got {value} in row {row} of the split {split!r} "
                f"({sum(count for count, _ in bad.values())} such rows)"
            )

    def count(self, found: Tally):
        """Takes the training rows down.

        Raises:
            ValueError: the rows of a classification all have the same label.
        """
        self.rows = sum(count for count, _ in found.values())
        if self.problem_type == REGRESSION:
            return
        if len(found) == 1:
            raise ValueError(
                f"--dataset_name: expected several classes in the split 'train', got {next(iter(found))} only"
            )
        self.counts = [0] * len(self.class_names)
        for value, (count, _) in found.items():
            target = self.target(value)
            for number in [target] if self.problem_type == SINGLE else [i for i, one in enumerate(target) if one]:
                self.counts[number] += count

    def weights(self) -> torch.Tensor:
        """For `--class_weights balanced`, float32 (K,): what makes classes count alike.

        Single labels: rows / (classes * rows of the class), which is 1 on average over the rows; a class without rows
        has no part. Multi-label, for positive targets: rows without the class / rows with it.
        """
        counts = torch.tensor(self.counts, dtype=torch.float32)
        if self.problem_type == MULTI:
            return torch.where(counts > 0, (self.rows - counts) / counts, 1)
        return torch.where(counts > 0, self.rows / ((counts > 0).sum() * counts), 0)


def labels_of(column: str, feature, found: Tally | None) -> Labels:
    """What a column's feature and, where that does not say it, its values in "train" make of the labels.

    Raises:
        ValueError: a classification has fewer than two classes.
    """
    kind, classes = kind_of(feature), {}
    if kind == "number":
        return Labels(column, kind, [column])
    if kind == "value":
        values = sorted(value for value in found if value is not None)
        names, classes = [str(value) for value in values], {value: number for number, value in enumerate(values)}
    elif kind == "vector":
        length = feature.length if feature.length >= 0 else max((len(value) for value in found if value), default=0)
        names = [str(number) for number in range(length)]
    else:
        names = (feature if kind == "class" else feature.feature).names
        names = [str(name) for name in names]  # in a card's YAML an unquoted no is False
        classes = {number: number for number in range(len(names))}
    if len(names) < 2:
        raise ValueError(f"--label_column_name: expected at least two classes in {column!r}, got {names}")
    return Labels(column, kind, names, classes)
