"""Hold out a validation split, and draw subsets."""

import math

import numpy as np
from datasets import Dataset

from ..files import UserError
from .labels import SINGLE, Labels


def subsample(rows: Dataset, size: int | None, seed: int) -> Dataset:
    """A random subset of this size, or all rows if there are no more."""
    if size is None or size >= len(rows):
        return rows
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:size])


def split_rows(targets: list, labels: Labels, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers to train on and those to hold out, at random; single labels are stratified by class.

    Raises:
        UserError: nothing is left to train on, or a class is too small to be in both.
    """
    rng, held_out = np.random.default_rng(seed), math.ceil(fraction * len(targets))
    hint = "; integers and strings are classes, floats are numbers" if labels.kind == "value" else ""
    if held_out == len(targets):
        raise UserError(f"--train_val_split: {fraction} would hold out all of the {held_out} images")
    if labels.problem_type != SINGLE:
        rows = rng.permutation(len(targets))
        return rows[held_out:], rows[:held_out]
    classes, counts = np.unique(targets, return_counts=True)
    if counts.min() == 1:
        smallest = labels.class_names[classes[counts.argmin()]]
        raise UserError(
            f"--train_val_split: expected at least two images of each class, one to hold out, got one of "
            f"{smallest!r}{hint}"
        )
    if min(held_out, len(targets) - held_out) < len(classes):
        raise UserError(
            f"--train_val_split: {fraction} would hold out {held_out} of {len(targets)} images, too few or too many to "
            f"have each of the {len(classes)} classes in both splits{hint}"
        )
    return stratified_split(np.asarray(targets), held_out, rng)


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
