"""Hold out a validation split, draw subsets, and remember where the rows came from."""

import math
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..files import UserError
from .labels import SINGLE, Labels


@dataclass
class Selection:
    """Rows of a dataset.

    Args:
        rows: the selected rows.
        split: the split of the dataset that has them.
        numbers: the number of each in that split.
    """

    rows: Dataset
    split: str
    numbers: np.ndarray

    def select(self, rows: np.ndarray | list[int]) -> "Selection":
        return Selection(self.rows.select(rows), self.split, self.numbers[rows])

    def sample(self, size: int | None, seed: int) -> "Selection":
        """A random subset of this size, or all rows if there are no more."""
        if size is None or size >= len(self.rows):
            return self
        return self.select(np.random.default_rng(seed).permutation(len(self.rows))[:size])


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, at equal distances, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()))


def split_rows(
    targets: list, labels: Labels, fraction: float, seed: int, report: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers to train on and those to hold out, at random; single labels are stratified by class.

    Both splits get at least as many images as there are classes, and no class loses its only image.

    Args:
        report: gets a line if another number of images is held out, or none of some classes.

    Raises:
        UserError: nothing is left to train on, or most classes have a single image.
    """
    rng, held_out = np.random.default_rng(seed), math.ceil(fraction * len(targets))
    if held_out == len(targets):
        raise UserError(f"--train_val_split: {fraction} would hold out all of the {held_out} images")
    if labels.problem_type != SINGLE:
        rows = rng.permutation(len(targets))
        return rows[held_out:], rows[:held_out]
    targets = np.asarray(targets)
    classes, counts = np.unique(targets, return_counts=True)
    single = classes[counts == 1]
    if 2 * len(single) > len(classes):
        raise UserError(
            f"--train_val_split: expected at least two images of each class, one to hold out, but {len(single)} of "
            f"{len(classes)} classes have a single image, such as {labels.class_names[single[0]]!r}; integers and "
            "strings are classes, unless --problem_type is regression"
        )
    if len(single):
        names = ", ".join(repr(labels.class_names[number]) for number in single[:5])
        report.append(f"not held out for validation, because it is the only image of its class: {names}")
    divided, others = np.flatnonzero(~np.isin(targets, single)), np.flatnonzero(np.isin(targets, single))
    num_classes = len(classes) - len(single)
    fitting = min(max(held_out, num_classes), len(divided) - num_classes)
    if fitting != held_out:
        report.append(
            f"{fitting} images are held out for validation instead of {held_out} (--train_val_split {fraction}), "
            f"because there are {num_classes} classes"
        )
    train, validation = stratified_split(targets[divided], fitting, rng)
    train = np.concatenate([divided[train], others]) if len(others) else train
    return train, divided[validation]


def stratified_split(targets: np.ndarray, held_out: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers to train on and those to hold out, with the same class proportions in both.

    Draws the same rows as `Dataset.train_test_split(stratify_by_column=...)`, which takes 6 s for 50,000 labels.
    """
    _, counts = np.unique(targets, return_counts=True)
    rows_of_classes = np.split(np.argsort(targets, kind="stable"), counts.cumsum()[:-1])
    train_size = len(targets) - held_out
    exact = train_size * counts / len(targets)
    train_counts = np.floor(exact).astype(int)
    missing = train_size - train_counts.sum()
    for remainder in np.unique(exact - train_counts)[::-1]:  # rounds the largest remainders up; ties are drawn
        if missing:
            tied = np.flatnonzero(exact - np.floor(exact) == remainder)
            rounded_up = rng.choice(tied, size=min(len(tied), missing), replace=False)
            train_counts[rounded_up] += 1
            missing -= len(rounded_up)
    shuffled = [rng.permutation(rows) for rows in rows_of_classes]
    train = np.concatenate([rows[:count] for rows, count in zip(shuffled, train_counts)])
    validation = np.concatenate([rows[count:] for rows, count in zip(shuffled, train_counts)])
    return rng.permutation(train), rng.permutation(validation)
