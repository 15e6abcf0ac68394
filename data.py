"""The host side of the data: from a data set on the Hub or on disk to `uint8` pixels and to evaluation batches."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

DECODE_BATCH = 256  # images decoded at a time


@dataclass
class ImageData:
    """A data set whose columns and labels are known; `splits` are "train", "validation" and, if labelled, "test"."""

    splits: DatasetDict
    image_column: str
    label_column: str
    class_names: list[str]


def find_column(dataset: Dataset, feature: type, name: str | None, option: str) -> str:
    """The column called `name` or, without a name, the only one whose feature is of the type.

    Raises:
        ValueError: the named column is missing or of another type; without a name, none or several fit.
    """
    fitting = [column for column, kind in dataset.features.items() if isinstance(kind, feature)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name in fitting:
        return name
    columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in dataset.features.items())
    wanted = f"one {feature.__name__} column" if name is None else f"the {feature.__name__} column {name!r}"
    raise ValueError(f"{option}: expected {wanted}, got the columns {columns}")


def load_image_data(
    name: str, image_column: str | None, label_column: str | None, validation_fraction: float, seed: int
) -> ImageData:
    """Loads a data set from the Hub or a local folder and checks all its labels once.

    Args:
        name: a Hub id, or a folder of image or parquet files; `data/digits` is also found beside this file.
        image_column, label_column: their names, needed where a data set has several candidates.
        validation_fraction: the part of "train", in (0, 1), that becomes "validation" where the data set has none:
            stratified by class, and always the same for a seed.

    Raises:
        ValueError: no such data set, column or "train" split, an empty split, fewer than two classes, or a label
            that is not one of them; a `validation_fraction` too small or too large for the classes.
    """
    shipped = Path(__file__).parent / name
    try:
        splits = load_dataset(str(shipped) if shipped.is_dir() and not Path(name).exists() else name)
    except Exception as error:  # the Hub, the file system and every builder have errors of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"--dataset_name: {name!r} cannot be loaded: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"--dataset_name: expected a 'train' split in {name!r}, got {', '.join(splits)}")
    image_column = find_column(splits["train"], Image, image_column, "--image_column_name")
    label_column = find_column(splits["train"], ClassLabel, label_column, "--label_column_name")
    class_names = splits["train"].features[label_column].names
    if len(class_names) < 2:
        raise ValueError(f"--label_column_name: expected at least two classes in {label_column!r}, got {class_names}")

    used = DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})
    if "test" in used and set(used["test"][label_column]) <= {None, -1}:  # kept secret, as for ImageNet-1k
        del used["test"]
    for split, rows in used.items():
        check_labels(split, rows[label_column][:], class_names)
    if "validation" not in used:
        try:
            parts = used["train"].train_test_split(validation_fraction, seed=seed, stratify_by_column=label_column)
        except ValueError as error:
            raise ValueError(f"--train_val_split: {validation_fraction} does not suit {name!r}: {error}") from error
        used["train"], used["validation"] = parts["train"], parts["test"]
    return ImageData(used, image_column, label_column, class_names)


def check_labels(split: str, labels: list, class_names: list[str]):
    """Raises ValueError unless every row has one of the classes, and "train" more than one of them."""
    bad = [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(class_names)]
    if bad:
        raise ValueError(
            f"--label_column_name: expected labels from 0 to {len(class_names) - 1}, got {labels[bad[0]]} in row "
            f"{bad[0]} of the split {split!r} ({len(bad)} such rows)"
        )
    if split == "train" and len(set(labels)) == 1:
        raise ValueError(f"--dataset_name: expected several classes in the split 'train', got {labels[0]} only")


def decode(data: ImageData, split: str, processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole split in memory: the processor's pixels before it scales them, uint8 (n, C, H, W), and labels (n,)."""
    rows = data.splits[split].select_columns([data.image_column, data.label_column])
    pixels, labels = [], []
    for batch in rows.iter(DECODE_BATCH):
        images = batch[data.image_column]
        pixels.append(processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values)
        labels.extend(batch[data.label_column])
    return torch.cat(pixels), torch.tensor(labels)


def evaluation_batches(data: ImageData, split: str, processor: BaseImageProcessor, batch_size: int) -> DataLoader:
    """Batches of `pixel_values`, as the checkpoint's pipeline makes them, and `labels`, in the order of the split."""

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = processor([row[data.image_column] for row in rows], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([row[data.label_column] for row in rows])}

    return DataLoader(data.splits[split], batch_size, collate_fn=collate)
