"""The meaning of a label column (one class, several classes or a number) and the targets made from its values.

`B` batch, `K` classes.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from datasets import ClassLabel, Features, Value
from datasets.features import LargeList, List

from ..files import UserError

IGNORED = -100  # the target of padding and bad images, as in torch.nn.functional.cross_entropy; NaN if it is a float
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = {  # of each kind of column, see `column_kind`
    **{"class": SINGLE, "value": SINGLE},
    **{"classes": MULTI, "words": MULTI, "vector": MULTI},
    "number": REGRESSION,
}
MAX_DISTINCT = 20  # with more different values, a column of floats can hardly mean classes


class BadLabel(UserError):
    """A label that is not one of those expected."""


def column_kind(feature) -> str | None:
    """What the column can hold.

    Returns:
        "class": a ClassLabel. "value": an integer, boolean or string, which stands for a class. "classes": a list of
        ClassLabel. "words": a list of strings. "vector": a list of K zeros and ones. "number": a float, for regression.
        None: no labels.
    """
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


def stored_names(feature) -> list[str] | None:
    """The names of the classes that a column stores as numbers, if it does."""
    inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
    return inner.names if isinstance(inner, ClassLabel) else None


def label_kind(column: str, feature, problem_type: str | None = None) -> str:
    """As `column_kind`, for the problem type that the user asks for, if any.

    Raises:
        UserError: the labels cannot be read as that.
    """
    kind = column_kind(feature)
    if problem_type in (None, PROBLEM_TYPES[kind]):
        return kind
    if problem_type == SINGLE and kind == "number":
        return "value"
    is_text = isinstance(feature, Value) and "string" in feature.dtype
    if problem_type == REGRESSION and kind in ("class", "value") and not is_text:
        return "number"
    raise UserError(
        f"--problem_type: expected {PROBLEM_TYPES[kind]} for {column_names({column: feature})}, got {problem_type}"
    )


def numbers_of(column: str, feature, kind: str) -> dict[int, float]:
    """The numbers that the class names of a regression stand for, {} if the column holds numbers.

    Raises:
        UserError: a class name is not a number.
    """
    if kind != "number" or not isinstance(feature, ClassLabel):
        return {}
    try:
        return {index: float(name) for index, name in enumerate(feature.names)}
    except ValueError as error:
        raise UserError(f"--problem_type {REGRESSION}: the classes in {column!r} are not numbers: {error}") from error


def as_number(value, numbers: dict[int, float]):
    """The number that a class of a regression stands for, NaN for -1, which stands for none.

    Args:
        numbers: see `numbers_of`; with {}, the value stays as it is.
    """
    return numbers.get(value, math.nan) if numbers else value


def is_missing(value, kind: str) -> bool:
    """Whether a row has no label: None, NaN, an empty text, or -1 in a ClassLabel."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return (
        value is None or is_nan or (isinstance(value, str) and not value.strip()) or (kind == "class" and value == -1)
    )


def find_label_column(features: Features, name: str | None) -> str:
    """The column called `name`; without a name, the only column of ClassLabel or, if there is none, of other labels.

    The columns `__key__` and `__url__`, which WebDataset adds, are not taken for labels.

    Raises:
        UserError: the named column is missing or cannot hold labels; without a name, no column or several could be
            meant.
    """
    kinds = {column: column_kind(feature) for column, feature in features.items() if not column.startswith("__")}
    class_labels = [column for column, kind in kinds.items() if kind in ("class", "classes")]
    candidates = class_labels or [column for column, kind in kinds.items() if kind]
    if name is None and len(candidates) == 1:
        return candidates[0]
    if kinds.get(name):
        return name
    expected = "one column of labels" if name is None else f"labels in the column {name!r}"
    hint = "" if any(kinds.values()) else "; a folder of images needs train/CLASS/ or a metadata.csv (file_name, label)"
    raise UserError(f"--label_column_name: expected {expected}, got the columns {column_names(features)}{hint}")


def column_names(features: Features | dict) -> str:
    """The columns and their types, for an error."""
    return ", ".join(f"{column} ({column_type(feature)})" for column, feature in features.items())


def column_type(feature) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


@dataclass
class LabelCounts:
    """A summary of a column of labels.

    Args:
        num_rows: the number of rows.
        occurrences: label (a list as a tuple) -> (number of rows, first row); of floats only those that are missing or
            not finite.
        mean: of the finite floats.
        squared_deviations: sum over the finite floats of (value - mean) ** 2.
        distinct: the different finite floats, or the first of them if there are more than MAX_DISTINCT.
    """

    num_rows: int = 0
    occurrences: dict = field(default_factory=dict)
    mean: float = 0.0
    squared_deviations: float = 0.0
    distinct: set[float] = field(default_factory=set)

    def drop_missing(self, kind: str) -> int:
        """Forgets the rows without a label; returns how many there were."""
        missing = [value for value in self.occurrences if is_missing(value, kind)]
        dropped = sum(self.occurrences.pop(value)[0] for value in missing)
        self.num_rows -= dropped
        return dropped


def count_labels(values: Iterable, kind: str, numbers: dict | None = None) -> LabelCounts:
    """Summarizes a column of labels, for `kind` see `column_kind`, in one pass.

    Args:
        numbers: see `numbers_of`.
    """
    counts, num_finite, numbers = LabelCounts(), 0, numbers or {}
    for row, value in enumerate(values):
        counts.num_rows += 1
        if kind == "number" and value is not None:
            value = as_number(value, numbers)
            if math.isfinite(value):  # Welford's algorithm
                num_finite += 1
                if len(counts.distinct) <= MAX_DISTINCT:
                    counts.distinct.add(value)
                deviation = value - counts.mean
                counts.mean += deviation / num_finite
                counts.squared_deviations += deviation * (value - counts.mean)
                continue
        if isinstance(value, float) and math.isnan(value):
            value = math.nan  # the same object, so that the dict finds it
        value = tuple(value) if isinstance(value, list) else value
        count, first = counts.occurrences.get(value, (0, row))
        counts.occurrences[value] = count + 1, first
    return counts


@dataclass(frozen=True)
class LabelColumn:
    """A column of labels, and how the user wants it to be read.

    Args:
        feature: of the dataset.
        problem_type: by default, the one that fits the column.
        skip_missing: leave out rows without a label.
    """

    name: str
    feature: object
    problem_type: str | None = None
    skip_missing: bool = False

    @property
    def kind(self) -> str:
        """See `label_kind`."""
        return label_kind(self.name, self.feature, self.problem_type)

    @functools.cached_property
    def numbers(self) -> dict[int, float]:
        return numbers_of(self.name, self.feature, self.kind)

    def has_label(self, value) -> bool:
        return not is_missing(as_number(value, self.numbers), self.kind)

    def count(self, values: Iterable) -> LabelCounts:
        return count_labels(values, self.kind, self.numbers)

    def build(self, train: LabelCounts | None) -> "Labels":
        return build_labels(self.name, self.feature, train, self.problem_type)


@dataclass
class Labels:
    """The labels of a dataset.

    Args:
        column: the name of the column.
        kind: see `column_kind`.
        class_names: the names of the K classes, in the order of the model's outputs; for regression, the column's name.
        classes: value in the column -> class; for the classes of a regression, the number that each stands for.
        num_rows: the number of training rows, if they were counted.
        class_counts: the number of training rows with each class, if they were counted.
        mean, std: of the training labels of a regression, whose targets are standardized.
    """

    column: str
    kind: str
    class_names: list[str]
    classes: dict = field(default_factory=dict)
    num_rows: int | None = None
    class_counts: list[int] | None = None
    mean: float = 0.0
    std: float = 1.0

    @property
    def problem_type(self) -> str:
        return PROBLEM_TYPES[self.kind]

    @property
    def expected(self) -> str:
        """The labels that are allowed, for an error."""
        names = ", ".join(self.class_names[:10]) + (", ..." if len(self.class_names) > 10 else "")
        return {
            "class": f"labels from 0 to {len(self.class_names) - 1}",
            "value": f"the labels of 'train' ({names})",
            "words": f"lists of the labels of 'train' ({names})",
            "classes": f"lists of labels from 0 to {len(self.class_names) - 1}",
            "vector": f"lists of {len(self.class_names)} numbers, each 0 or 1 (lists of classes need List(ClassLabel))",
            "number": "finite numbers",
        }[self.kind]

    def target(self, value) -> int | list[float]:
        """The training target of a label: a class, a list of K zeros and ones, or a list of one standardized number.

        Raises:
            BadLabel: the label is not one of those expected.
        """
        if self.problem_type == SINGLE and value in self.classes:
            return self.classes[value]
        if self.kind in ("classes", "words") and value is not None and all(label in self.classes for label in value):
            present = set(value)
            return [float(label in present) for label in self.classes]
        if self.kind == "vector" and value and len(value) == len(self.class_names) and {0, 1}.issuperset(value):
            return [float(bit) for bit in value]
        if self.kind == "number":
            value = as_number(value, self.classes)
            if value is not None and math.isfinite(value):
                return [(value - self.mean) / self.std]
        raise BadLabel(f"label: expected {self.expected}, got {value}")

    def ignored_targets(self, count: int) -> torch.Tensor:
        """Targets of `count` images that are ignored by loss and metrics: int64 (B,) or float32 (B, K)."""
        if self.problem_type == SINGLE:
            return torch.full((count,), IGNORED)
        return torch.full((count, len(self.class_names)), math.nan)

    def are_hidden(self, counts: LabelCounts) -> bool:
        """Whether a split has no labels, as the test split of ImageNet-1k: all of them are missing or -1."""

        def is_hidden(value) -> bool:
            missing = is_missing(value, self.kind) or (value == -1 and self.problem_type == SINGLE)
            return missing and value not in self.classes

        return counts.num_rows == sum(count for value, (count, _) in counts.occurrences.items() if is_hidden(value))

    def check(self, split: str, counts: LabelCounts):
        """Raises UserError if a row of the split has a label that is not expected."""
        bad_rows, first_row, first_value = 0, math.inf, None
        for value, (count, row) in counts.occurrences.items():
            try:
                self.target(value)
            except BadLabel:
                bad_rows += count
                if row < first_row:
                    first_row, first_value = row, value
        if bad_rows:
            value = list(first_value) if isinstance(first_value, tuple) else first_value
            hint = advice = ""
            if is_missing(value, self.kind):
                hint = ""
                if value is None:
                    hint = ": they have no label, perhaps because a file is cut off, or says NA or None in a CSV column"
                advice = "; --on_missing_label skip leaves out the rows that have no label"
            raise UserError(
                f"--label_column_name: expected {self.expected}, got {value!r} in row {first_row} of the split "
                f"{split!r} ({bad_rows} such rows{hint}){advice}"
            )

    def fit(self, counts: LabelCounts):
        """Stores the class counts, or the mean and standard deviation, of the training rows.

        Raises:
            UserError: all rows have the same label.
        """
        self.num_rows, self.mean = counts.num_rows, counts.mean
        self.std = math.sqrt(counts.squared_deviations / counts.num_rows)
        if self.kind == "number" and not self.std:
            raise UserError(f"--dataset_name: expected different numbers in the split 'train', got only {self.mean:g}")
        if len(counts.occurrences) == 1:
            (only,) = counts.occurrences
            raise one_class(self.class_names[self.classes[only]] if only in self.classes else str(list(only)))
        self.class_counts = [0] * len(self.class_names)
        for value, (count, _) in counts.occurrences.items():
            target = self.target(value)
            classes = [target] if isinstance(target, int) else [i for i, present in enumerate(target) if present]
            for number in classes:
                self.class_counts[number] += count

    def weights(self) -> torch.Tensor:
        """Class weights for `--class_weights balanced`, float32 (K,).

        Single labels: rows / (classes * rows of the class), 1 on average over the rows; 0 for a class without rows.
        Several labels: the weight of positive targets, rows without the class / rows with it, clamped to [0.01, 100].
        """
        counts = torch.tensor(self.class_counts, dtype=torch.float32)
        if self.problem_type == MULTI:
            return ((self.num_rows - counts) / counts).clamp(0.01, 100)
        return torch.where(counts > 0, self.num_rows / ((counts > 0).sum() * counts), 0)


def one_class(name: str) -> UserError:
    """The error for a dataset whose training images all have the same label."""
    return UserError(
        f"--dataset_name: expected several classes in the split 'train', got only {name!r}: one class cannot be "
        f"learned; add images of at least one other class, such as images without {name!r}"
    )


def class_name(value) -> str:
    """The name of a class that a value stands for: 1.0 is called 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def build_labels(column: str, feature, train: LabelCounts | None, problem_type: str | None = None) -> Labels:
    """The labels of a column, from its feature or, if that does not name the classes, from its values in "train".

    Raises:
        UserError: a classification has fewer than two classes.
    """
    kind, classes = label_kind(column, feature, problem_type), {}
    if kind == "number":
        return Labels(column, kind, [column], numbers_of(column, feature, kind))
    if kind == "value":
        values = sorted(value for value in train.occurrences if not is_missing(value, kind))
        names, classes = [class_name(value) for value in values], {value: number for number, value in enumerate(values)}
    elif kind == "words":
        names = sorted({word for value in train.occurrences if value for word in value if word is not None})
        classes = {word: number for number, word in enumerate(names)}
    elif kind == "vector":
        longest = max((len(value) for value in train.occurrences if value), default=0)
        length = longest if feature.length < 0 else feature.length
        names = [str(number) for number in range(length)]
    else:
        names = (feature if kind == "class" else feature.feature).names
        names = [str(name) for name in names]  # in a card's YAML an unquoted no is False
        classes = {number: number for number in range(len(names))}
    if len(names) == 1:
        raise one_class(names[0])
    if not names:
        raise UserError(f"--label_column_name: expected at least two classes in {column!r}, got none")
    return Labels(column, kind, names, classes)


def label_notes(labels: Labels, feature, train: LabelCounts | None) -> list[str]:
    """What the user should know of the labels before training: how they are read, and classes that cannot be learned.

    Args:
        train: the labels of the training rows, if they were read.
    """
    notes = []
    kind = column_type(feature)
    if labels.kind == "number":
        few = train is not None and len(train.distinct) <= MAX_DISTINCT
        values = f"{len(train.distinct)} different numbers" if few else "numbers"
        notes.append(
            f"the labels in {labels.column!r} are {values} ({kind}), so the model learns a {REGRESSION}; if they are "
            f"classes, use --problem_type {SINGLE}"
        )
    elif labels.kind == "value" and kind.startswith(("int", "uint", "float")):
        notes.append(
            f"the labels in {labels.column!r} are {len(labels.class_names)} different numbers ({kind}), each of them a "
            f"class; if the model shall predict the number, use --problem_type {REGRESSION}"
        )
    if labels.kind != "number" and 0 in (labels.class_counts or []):
        absent = [name for name, count in zip(labels.class_names, labels.class_counts) if count == 0]
        names = ", ".join(map(repr, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        notes.append(f"no training image has the class {names}: the model cannot learn to predict it")
    first: dict[str, str] = {}
    for name in labels.class_names if labels.kind != "number" else []:
        other = first.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            notes.append(f"the classes {other!r} and {name!r} differ only in spaces or capitals: are they one class?")
    return notes
