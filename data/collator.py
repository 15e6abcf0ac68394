"""Augmentation for `transformers.Trainer`."""

import torch
from transformers import BaseImageProcessor

from .augment import Augment
from .decoding import load_rgb
from .processors import process

MARK = "augment"


def mark_for_augmentation(rows: dict[str, list]) -> dict[str, list]:
    """Marks rows for TrainerCollator to augment: `train_dataset.with_transform(mark_for_augmentation)`."""
    return {**rows, MARK: [True] * len(next(iter(rows.values())))}


class TrainerCollator:
    """Makes `pixel_values` (B, C, H, W) and `labels` from rows; marked rows are augmented and get soft labels (B, K).

    Trainer uses the same collator for training and evaluation, so training rows are marked. Use it with
    `remove_unused_columns=False` and without `label_smoothing_factor` in TrainingArguments, and load the model with
    `problem_type="single_label_classification"`, which soft labels need.

    Args:
        processor: the checkpoint's image processor.
        augment: applied to batches of marked rows.
        image_column, label_column: the names of the columns.

    Raises:
        ValueError: a batch has marked rows and others.
    """

    def __init__(self, processor: BaseImageProcessor, augment: Augment, image_column="image", label_column="label"):
        self.processor, self.augment = processor, augment
        self.image_column, self.label_column = image_column, label_column

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pixels = process(self.processor, [load_rgb(row[self.image_column]) for row in rows])
        labels = torch.tensor([row[self.label_column] for row in rows])
        marks = {MARK in row for row in rows}
        if len(marks) > 1:
            raise ValueError("rows: expected all or none of a batch to be marked for augmentation, got some")
        if marks == {True}:
            pixel_values, labels = self.augment(pixels, labels)
        else:
            pixel_values = self.augment.normalize(pixels)
        return {"pixel_values": pixel_values, "labels": labels}
