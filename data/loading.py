"""From a name to a data set whose columns and labels are known, on the Hub or on disk, as a whole or as a stream."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import (
    Array2D,
    Array3D,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.utils.stratify import stratified_shuffle_split_generate_indices
from tqdm import tqdm

from ..files import ROOT
from .labels import SINGLE, Labels, build_labels, column_kind, column_names, count_labels, find_label_column

FEW = 1_000  # rows that tell whether a stream's labels are secret
LABEL_BATCH = 1_000  # labels read at a time from a stream
FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # what reads a file


# From a name to splits whose columns and labels are known


@dataclass
class ImageData:
    """A data set, its images not decoded yet.

    Args:
        splits: "train" and, where they exist, "validation" and "test"; each has the two columns alone.
        image_column: images as {"path", "bytes"}, or uint8 arrays.
        labels: what the other column means.
        sizes: the number of rows of each split.
        array_shape: (C, H, W) of the arrays; None for images.
    """

    splits: dict[str, Dataset | IterableDataset]
    image_column: str
    labels: Labels
    sizes: dict[str, int]
    array_shape: tuple[int, int, int] | None = None

    @property
    def channels(self) -> int:
        return 3 if self.array_shape is None else self.array_shape[0]


def find_image_column(features: Features, name: str | None) -> str:
    """The column called `name` or, without a name, the only one with images or, if there is none, with arrays.

    Raises:
        ValueError: the named column is missing or of another type; without a name, none or several fit.
    """
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    arrays = [column for column, feature in features.items() if isinstance(feature, (Array2D, Array3D))]
    fitting = images or arrays
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name in images + arrays:
        return name
    wanted = "one Image column" if name is None else f"images in the column {name!r}"
    hint = "" if images or arrays else "; a folder of pictures with a metadata.csv (file_name, label) has images"
    raise ValueError(f"--image_column_name: expected {wanted}, got the columns {column_names(features)}{hint}")


def array_shape(feature: Array2D | Array3D) -> tuple[int, int, int]:
    """(C, H, W) of a column of arrays, of which two dimensions are one channel.

    Raises:
        ValueError: they are not uint8, or have no fixed shape.
    """
    if feature.dtype != "uint8" or None in feature.shape:
        raise ValueError(
            "--image_column_name: expected uint8 arrays of a fixed shape (channels, height, width) or (height, width), "
            f"got {feature.dtype} of shape {tuple(feature.shape)}"
        )
    return (1, *feature.shape) if isinstance(feature, Array2D) else tuple(feature.shape)


def load_splits(
    name: str,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    label_column: str | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """A Hub id, a folder of images or files, what `save_to_disk` wrote, or one parquet, arrow or tar file (WebDataset).

    With `label_column` it is that column of a stream, read without the images where the format allows it.

    Raises:
        ValueError: it cannot be loaded; what `save_to_disk` wrote is to be streamed.
    """
    path = Path(name)
    if not path.exists() and (ROOT / name).is_dir():
        path = ROOT / name
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved and streaming:
        raise ValueError(
            f"--streaming: expected none for {name!r}, which save_to_disk wrote: it stays on the disk anyway"
        )
    try:
        if saved:
            splits = load_from_disk(str(path))
            return splits if isinstance(splits, DatasetDict) else {"train": splits}
        where = (str(path), config_name)
        given = {"revision": revision}
        if path.suffix in FILES and path.is_file():
            where, given = (FILES[path.suffix],), {"data_files": str(path)}
        elif not path.exists():
            where = (name, config_name)
        if label_column is None:
            return load_dataset(*where, **given, streaming=streaming)
        if hasattr(load_dataset_builder(*where, **given).config, "columns"):
            return load_dataset(*where, **given, streaming=True, columns=[label_column])
        splits = load_dataset(*where, **given, streaming=True)
        return {split: rows.select_columns([label_column]) for split, rows in splits.items()}
    except Exception as error:  # the Hub, the file system and every builder have errors of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"--dataset_name: {name!r} cannot be loaded: {reason}") from error


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    count_classes: bool = False,
    on_main_process: Callable = lambda read: read(),
) -> ImageData:
    """Loads a data set and checks all its labels once, those of a stream if it reads them; see `stream_labels`.

    Args:
        name, config_name, revision: as for `load_splits`; `data/digits` is also found beside this file.
        image_column, label_column: their names, needed where a data set has several candidates.
        validation_fraction: the part of "train", in [0, 1), that becomes "validation" where the data set has none (nor
            "valid", "val" or "dev"): stratified by class, and always the same for a seed. A stream is not split.
        max_train_samples, max_eval_samples: at most so many rows of "train" and of each other split, drawn by seed;
            not for a stream.
        streaming: rows are read when they are needed, from files or from the Hub.
        count_classes: the labels of a stream are read even where its classes and its size are known.
        on_main_process: calls what reads them; it may do so in one process for all.

    Raises:
        ValueError: no such data set, column or "train" split, an empty split, fewer than two classes, or a label
            that is not one of them; a `validation_fraction` too small or too large for the classes.
    """
    splits = load_splits(name, config_name, revision, streaming)
    if "train" not in splits:
        raise ValueError(f"--dataset_name: expected a 'train' split in {name!r}, got {', '.join(splits)}")
    features = splits["train"].features
    image_column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column)
    validation = next((split for split in ("validation", "valid", "val", "dev") if split in splits), None)
    names = {"train": "train", "validation": validation, "test": "test"}
    names = {split: there for split, there in names.items() if there in splits}
    used = {split: splits[there].select_columns([image_column, label_column]) for split, there in names.items()}
    shape = None
    if isinstance(features[image_column], Image):
        used = {split: rows.cast_column(image_column, Image(decode=False)) for split, rows in used.items()}
    else:
        shape = array_shape(features[image_column])

    kind, found = column_kind(features[label_column]), {}
    if streaming:
        infos = {split: (rows.info.splits or {}).get(names[split]) for split, rows in used.items()}
        sizes = {split: (info and info.num_examples) or None for split, info in infos.items()}
        columns = load_splits(name, config_name, revision, streaming, label_column)
        if count_classes or None in sizes.values() or kind not in ("class", "classes"):
            found = on_main_process(
                lambda: {split: count_labels(stream_labels(columns[names[split]], split), kind) for split in used}
            )
    else:
        values = {split: rows[label_column][:] for split, rows in used.items()}
        found = {split: count_labels(part, kind) for split, part in values.items()}
    labels = build_labels(label_column, features[label_column], found.get("train"))
    if "test" in used:
        part = found.get("test") or count_labels(
            itertools.islice(stream_labels(columns[names["test"]], "test"), FEW), kind
        )
        if labels.are_hidden(part):
            del used["test"]
            found.pop("test", None)
    for split, part in found.items():
        labels.check(split, part)
    if streaming:
        if found:
            sizes = {split: part.rows for split, part in found.items()}
            labels.count(found["train"])
        return ImageData(used, image_column, labels, sizes, shape)

    if "validation" not in used and validation_fraction:
        train, targets = used["train"], [labels.target(value) for value in values["train"]]
        try:
            parts = split_rows(targets, labels, validation_fraction, seed)
        except ValueError as error:
            reason = f"{error}; integers and words are classes, floats are numbers" if kind == "value" else error
            raise ValueError(f"--train_val_split: {validation_fraction} does not suit {name!r}: {reason}") from error
        used["train"], used["validation"] = (train.select(rows) for rows in parts)
    for split, rows in used.items():
        most = max_train_samples if split == "train" else max_eval_samples
        if most is not None and most < len(rows):
            used[split] = rows.select(np.random.default_rng(seed).permutation(len(rows))[:most])
    labels.count(count_labels(used["train"][label_column][:], kind))
    return ImageData(used, image_column, labels, {split: len(rows) for split, rows in used.items()}, shape)


def stream_labels(column: IterableDataset, split: str) -> Iterator:
    """One pass over the labels of a stream; ClassLabel needs none if the card's dataset_info has the number of rows."""
    progress = tqdm(desc=f"reading the labels of {split}", unit="row", leave=False)
    for columns in column.iter(LABEL_BATCH):
        (values,) = columns.values()
        yield from values
        progress.update(len(values))
    progress.close()


def split_rows(targets: list, labels: Labels, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of "train" and those of "validation": drawn by seed and, for single labels, of equal shares.

    Raises:
        ValueError: a class is too small to be in both, or nothing is left to train on.
    """
    draw, held_out = np.random.default_rng(seed), math.ceil(fraction * len(targets))
    if held_out == len(targets):
        raise ValueError(f"all of the {held_out} images would be held out")
    if labels.problem_type != SINGLE:
        rows = draw.permutation(len(targets))
        return rows[held_out:], rows[:held_out]
    fewest, count = min(Counter(targets).items(), key=lambda item: item[1])
    if count == 1:
        raise ValueError(f"the class {labels.class_names[fewest]!r} has one image alone, which cannot be in both parts")
    # Dataset.train_test_split does the same, but reads the labels one by one.
    return next(stratified_shuffle_split_generate_indices(targets, len(targets) - held_out, held_out, draw))
