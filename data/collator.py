"""Augmentation for `transformers.Trainer`."""

import random

import numpy as np
import PIL.Image
import torch
from transformers import BaseImageProcessor

from .augment import Augment
from .decoding import crop_and_resize, load_rgb, sample_crop_box
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
        random_resized_crop: the smallest fraction of an image that a random crop of a marked row keeps, in [0, 1];
            0: no crop.

    Raises:
        ValueError: a batch has marked rows and others.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        augment: Augment,
        image_column: str = "image",
        label_column: str = "label",
        random_resized_crop: float = 0.0,
    ):
        self.processor, self.augment = processor, augment
        self.image_column, self.label_column = image_column, label_column
        self.random_resized_crop = random_resized_crop
        _, _, height, width = process(processor, [PIL.Image.new("RGB", (64, 64))]).shape
        self.size = height, width

    def crop(self, image: PIL.Image.Image) -> torch.Tensor:
        """The pixels (C, H, W) of a random crop, drawn from torch's global generator."""
        generator = random.Random(torch.randint(2**62, ()).item())
        box = sample_crop_box(*image.size, self.random_resized_crop, generator)
        return crop_and_resize(np.asarray(image), box, self.size)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [load_rgb(row[self.image_column]) for row in rows]
        labels = torch.tensor([row[self.label_column] for row in rows])
        marks = {MARK in row for row in rows}
        if len(marks) > 1:
            raise ValueError("rows: expected all or none of a batch to be marked for augmentation, got some")
        if marks == {False}:
            return {"pixel_values": self.augment.normalize(process(self.processor, images)), "labels": labels}
        crops = [self.crop(image) for image in images] if self.random_resized_crop else None
        pixels = torch.stack(crops) if crops else process(self.processor, images)
        return dict(zip(("pixel_values", "labels"), self.augment(pixels, labels)))
