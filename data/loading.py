"""Load a dataset from the Hub or the disk, find its two columns, check every label and hold out a validation split."""

import contextlib
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
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
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from ..files import ROOT, UserError
from .labels import (
    LabelCounts,
    Labels,
    build_labels,
    column_kind,
    column_names,
    count_labels,
    find_label_column,
)
from .reading import dataset_sources
from .splitting import split_rows, subsample

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # file name extension -> builder
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
LABEL_BATCH_SIZE = 1_000  # labels read at a time from a stream
HIDDEN_LABELS_SAMPLE = 1_000  # labels that are read to see whether the test split of a stream has any
# What a wrong name, a wrong option or a damaged file raises in `datasets`: among the ValueErrors are ArrowInvalid and
# an unknown config, among the RepositoryNotFoundErrors a gated dataset.
USER_MISTAKES = (
    DatasetsError,
    FileNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    ValueError,
    tarfile.TarError,
    yaml.YAMLError,
)


@dataclass
class ImageData:
    """A dataset whose labels are checked and whose images are not decoded yet.

    Args:
        splits: "train" and, if they exist, "validation" and "test"; each has the two columns only.
        image_column: images as {"path", "bytes"}, or uint8 arrays.
        labels: the meaning of the other column.
        sizes: the number of rows of each split.
        array_shape: (C, H, W) of the arrays; None for images.
        sources: where rows may name image files, see `dataset_sources`.
    """

    splits: dict[str, Dataset | IterableDataset]
    image_column: str
    labels: Labels
    sizes: dict[str, int]
    array_shape: tuple[int, int, int] | None = None
    sources: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return 3 if self.array_shape is None else self.array_shape[0]


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
    on_main_process: Callable = lambda function: function(),
) -> ImageData:
    """Loads a dataset and checks its labels.

    Args:
        name, config_name, revision: see `load_splits`.
        image_column, label_column: needed if several columns could be meant.
        validation_fraction: fraction of "train", in [0, 1), that is held out, stratified by class, if there is no
            validation split. The same seed holds out the same rows. A stream is never split.
        max_train_samples, max_eval_samples: use a random subset of this size, drawn by seed; not for a stream.
        count_classes: read all labels of a stream, even if its classes and its size are known.
        on_main_process: calls the function that reads them, so that several processes can share the result.

    Raises:
        UserError: the dataset cannot be loaded, lacks a split or column, or has labels that cannot be learned.
    """
    splits = load_splits(name, config_name, revision, streaming)
    features = splits["train"].features
    image_column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column)
    splits, shape = select_columns(splits, image_column, label_column)
    kind = column_kind(features[label_column])
    sources = dataset_sources(name, local_path(name))
    if streaming:
        label_streams = stream_label_column(name, config_name, revision, label_column)
        count_all = count_classes or kind not in ("class", "classes")
        labels, sizes = check_stream(splits, label_streams, label_column, count_all, on_main_process)
        return ImageData(splits, image_column, labels, sizes, shape, sources)

    values = {split: rows[label_column][:] for split, rows in splits.items()}
    counts = {split: count_labels(labels, kind) for split, labels in values.items()}
    labels = check_splits(splits, label_column, counts, counts.get("test"))
    if "validation" not in splits and validation_fraction:
        targets = [labels.target(value) for value in values["train"]]
        kept, held_out = split_rows(targets, labels, validation_fraction, seed)
        splits["train"], splits["validation"] = splits["train"].select(kept), splits["train"].select(held_out)
    for split, rows in splits.items():
        splits[split] = subsample(rows, max_train_samples if split == "train" else max_eval_samples, seed)
    labels.fit(count_labels(splits["train"][label_column][:], kind))
    sizes = {split: len(rows) for split, rows in splits.items()}
    return ImageData(splits, image_column, labels, sizes, shape, sources)


# Loading


@contextlib.contextmanager
def raise_user_error(message: str, *more: type[Exception]):
    """Turns what a wrong name, a wrong option or a damaged file raises in `datasets`, and `more`, into a UserError.

    Errors of the network or the disk, and bugs, pass through.
    """
    mistakes = (*USER_MISTAKES, *more)
    try:
        yield
    except mistakes as error:
        # DatasetGenerationError covers up any error that is raised while files are converted.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if not isinstance(cause, mistakes):
            raise cause from None
        lines = str(cause).strip().splitlines() or [""]
        reason = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1].strip()}"
        if reason.startswith("invalid literal for int()"):
            reason += "; the .cls files of a tar must hold numbers"
        kind = "" if isinstance(cause, (ValueError, OSError)) and reason else f"{type(cause).__name__}: "
        raise UserError(f"{message}: {kind}{reason}") from cause


def builder_arguments(name: str, config_name: str | None, revision: str | None) -> dict:
    """The arguments of `datasets.load_dataset` for a Hub id, a folder or a file."""
    path = local_path(name)
    if path.suffix in BUILDERS and path.is_file():
        return {"path": BUILDERS[path.suffix], "data_files": str(path)}
    return {"path": str(path) if path.exists() else name, "name": config_name, "revision": revision}


def local_path(name: str) -> Path:
    """The file or folder of that name; `data/digits` is also found in the repository's root."""
    path = Path(name)
    return ROOT / name if not path.exists() and (ROOT / name).is_dir() else path


def load_splits(
    name: str, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """The splits "train" and, if they exist, "validation" and "test" of a dataset.

    Args:
        name: a Hub id, a folder of images or data files, a folder written by `save_to_disk`, or one parquet, arrow or
            tar file (WebDataset).
        config_name: of a dataset with several configurations.
        revision: branch, tag or commit on the Hub.
        streaming: read rows when they are needed. A folder written by `save_to_disk` cannot be streamed.

    Raises:
        UserError: it cannot be loaded, or has no "train" split.
    """
    path = local_path(name)
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if is_saved and streaming:
        raise UserError(
            f"--streaming cannot be used with {name!r}, which was written by save_to_disk: it is read from the disk, "
            "without loading it into memory, anyway"
        )
    with raise_user_error(f"--dataset_name: {name!r} cannot be loaded", RuntimeError):  # if it needs a script
        if is_saved:
            splits = load_from_disk(str(path))
            splits = splits if isinstance(splits, DatasetDict) else {"train": splits}
        else:
            splits = load_dataset(**builder_arguments(name, config_name, revision), streaming=streaming)
    if "train" not in splits:
        raise UserError(f"--dataset_name: expected a 'train' split in {name!r}, got {', '.join(splits)}")
    return standard_splits(splits)


def standard_splits(splits: dict) -> dict:
    """The splits that are used, under their standard names."""
    validation = next((split for split in VALIDATION_NAMES if split in splits), None)
    names = {"train": "train", "validation": validation, "test": "test"}
    return {split: splits[name] for split, name in names.items() if name in splits}


def stream_label_column(
    name: str, config_name: str | None, revision: str | None, label_column: str
) -> dict[str, IterableDataset]:
    """The splits as streams of their labels; images are not read if the file format allows it."""
    arguments = builder_arguments(name, config_name, revision)
    with raise_user_error(f"--dataset_name: {name!r} cannot be loaded"):
        if hasattr(load_dataset_builder(**arguments).config, "columns"):
            return standard_splits(load_dataset(**arguments, streaming=True, columns=[label_column]))
        splits = standard_splits(load_dataset(**arguments, streaming=True))
    return {split: rows.select_columns([label_column]) for split, rows in splits.items()}


# Columns


def find_image_column(features: Features, name: str | None) -> str:
    """The column called `name`; without a name, the only column of images or, if there is none, of arrays.

    Raises:
        UserError: the named column is missing or of another type; without a name, no column or several could be meant.
    """
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    arrays = [column for column, feature in features.items() if isinstance(feature, (Array2D, Array3D))]
    candidates = images or arrays
    if name is None and len(candidates) == 1:
        return candidates[0]
    if name in images + arrays:
        return name
    expected = "one Image column" if name is None else f"images in the column {name!r}"
    hint = "" if candidates else "; a folder of images needs train/CLASS/ or a metadata.csv (file_name, label)"
    raise UserError(f"--image_column_name: expected {expected}, got the columns {column_names(features)}{hint}")


def array_shape(feature: Array2D | Array3D) -> tuple[int, int, int]:
    """(C, H, W) of a column of arrays; arrays (H, W) have one channel.

    Raises:
        UserError: they are not uint8, or have no fixed shape.
    """
    if feature.dtype != "uint8" or None in feature.shape:
        raise UserError(
            "--image_column_name: expected uint8 arrays of a fixed shape (channels, height, width) or (height, width), "
            f"got {feature.dtype} of shape {tuple(feature.shape)}"
        )
    return (1, *feature.shape) if isinstance(feature, Array2D) else tuple(feature.shape)


def select_columns(splits: dict, image_column: str, label_column: str) -> tuple[dict, tuple[int, int, int] | None]:
    """The splits with the two columns only and images left undecoded, and the shape (C, H, W) of arrays."""
    feature = splits["train"].features[image_column]
    splits = {split: rows.select_columns([image_column, label_column]) for split, rows in splits.items()}
    if not isinstance(feature, Image):
        return splits, array_shape(feature)
    return {split: rows.cast_column(image_column, Image(decode=False)) for split, rows in splits.items()}, None


# Labels


def iterate_labels(column: IterableDataset, split: str) -> Iterator:
    """One pass over the labels of a stream."""
    progress = tqdm(desc=f"reading the labels of {split}", unit="row", leave=False)
    with raise_user_error(f"--dataset_name: the labels of the split {split!r} cannot be read"), progress:
        for columns in column.iter(LABEL_BATCH_SIZE):
            (labels,) = columns.values()
            yield from labels
            progress.update(len(labels))


def check_splits(splits: dict, column: str, counts: dict[str, LabelCounts], test: LabelCounts | None) -> Labels:
    """The meaning of the labels; checks those that were counted and removes a test split whose labels are hidden.

    Args:
        counts: the labels of each split, if they were read.
        test: labels of the test split, or some of them.

    Raises:
        UserError: a split has a label that "train" does not define; see `build_labels`.
    """
    labels = build_labels(column, splits["train"].features[column], counts.get("train"))
    if test is not None and labels.are_hidden(test):
        del splits["test"]
        counts.pop("test", None)
    for split, split_counts in counts.items():
        labels.check(split, split_counts)
    return labels


def check_stream(
    splits: dict[str, IterableDataset],
    label_streams: dict[str, IterableDataset],
    column: str,
    count_all: bool,
    on_main_process: Callable,
) -> tuple[Labels, dict[str, int]]:
    """The labels and sizes of a stream; its labels are read if `count_all` or if the card does not give the sizes."""
    kind = column_kind(splits["train"].features[column])

    def count_splits() -> dict[str, LabelCounts]:
        return {split: count_labels(iterate_labels(label_streams[split], split), kind) for split in splits}

    infos = {split: (rows.info.splits or {}).get(rows.split) for split, rows in splits.items()}
    sizes = {split: info.num_examples if info else 0 for split, info in infos.items()}
    if count_all or not all(sizes.values()):
        counts = on_main_process(count_splits)
        labels = check_splits(splits, column, counts, counts.get("test"))
        labels.fit(counts["train"])
        return labels, {split: split_counts.num_rows for split, split_counts in counts.items()}
    sample = None
    if "test" in splits:
        first_labels = itertools.islice(iterate_labels(label_streams["test"], "test"), HIDDEN_LABELS_SAMPLE)
        sample = count_labels(first_labels, kind)
    labels = check_splits(splits, column, {}, sample)
    return labels, {split: sizes[split] for split in splits}
