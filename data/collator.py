"""Augmentation for `transformers.Trainer`."""

import torch
from transformers import BaseImageProcessor

from .augment import Augment
from .decoding import load_rgb
from .processors import process

MARK = "augment"


def mark_for_augmentation(rows: dict[str, list]) -> dict[str, list]:
    """The transform of a training set, `dataset.with_transform(mark_for_augmentation)`, for `TrainerCollator`."""
    return {**rows, MARK: [True] * len(next(iter(rows.values())))}


class TrainerCollator:
    """Rows to `pixel_values` and `labels`, augmented and mixed if they are marked, else as the processor makes them.

    Trainer has one collator for training and evaluation; this one smooths and mixes the labels of marked rows alone. It
    needs `remove_unused_columns=False` in TrainingArguments, no `label_smoothing_factor` there, and a model loaded with
    `problem_type="single_label_classification"`, since marked rows get soft labels (B, K).

    Args:
        processor: the checkpoint's image processor.
        augment: what happens to marked rows.
        image_column, label_column: their names.

    Raises:
        ValueError: some rows of a batch are marked and others not.
    """

    def __init__(self, processor: BaseImageProcessor, augment: Augment, image_column="image", label_column="label"):
        self.processor, self.augment = processor, augment
        self.image_column, self.label_column = image_column, label_column

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pixels = process(self.processor, [load_rgb(row[self.image_column]) for row in rows])
        labels = torch.tensor([row[self.label_column] for row in rows])
        marks = {MARK in row for row in rows}
        if len(marks) > 1:
            raise ValueError("rows: expected all of them marked for augmentation or none, got some")
        if marks == {True}:
            pixel_values, labels = self.augment(pixels, labels)
        else:
            pixel_values = self.augment.normalize(pixels)
        return {"pixel_values": pixel_values, "labels": labels}
