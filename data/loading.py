"""Load a dataset from the Hub or the disk, find its two columns, check every label and hold out a validation split."""

import contextlib
import itertools
import tarfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from ..files import ROOT, UserError
from .columns import find_columns, require_columns, select_columns
from .folders import folder_notes, left_out_of_dataset
from .labels import LabelColumn, LabelCounts, Labels, label_notes, stored_names
from .reading import dataset_sources
from .splitting import Selection, split_rows

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
        report: what the user should know before training, one line each.
        bit_depth: of the gray images with more than 8 bits, see `find_bit_depth`; None if none is given or found.
        origins: of each split that is not a stream, the split of the dataset and the row numbers there.
    """

    splits: dict[str, Dataset | IterableDataset]
    image_column: str
    labels: Labels
    sizes: dict[str, int]
    array_shape: tuple[int, int, int] | None = None
    sources: tuple[str, ...] = ()
    report: list[str] = field(default_factory=list)
    bit_depth: int | None = None
    origins: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

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
    problem_type: str | None = None,
    on_missing_label: str = "error",
    on_main_process: Callable = lambda function: function(),
) -> ImageData:
    """Loads a dataset and checks its labels.

    Args:
        name, config_name, revision: see `open_splits`.
        image_column, label_column: needed if several columns could be meant.
        validation_fraction: fraction of "train", in [0, 1), that is held out, stratified by class, if there is no
            validation split. The same seed holds out the same rows. A stream is never split.
        max_train_samples, max_eval_samples: use a random subset of this size, drawn by seed; not for a stream.
        count_classes: read all labels of a stream, even if its classes and its size are known.
        problem_type: what floats or integers mean; None: floats are numbers, integers classes.
        on_missing_label: "error" or "skip", for rows without a label.
        on_main_process: calls the function that reads them, so that several processes can share the result.

    Raises:
        UserError: the dataset cannot be loaded, lacks a split or column, or has labels that cannot be learned.
    """
    report: list[str] = []
    splits, path = load_splits(name, config_name, revision, streaming, report), local_path(name)
    origins: dict[str, tuple[str, np.ndarray]] = {}
    if splits["train"].info.builder_name == "imagefolder" and path.is_dir():
        report += folder_notes(path, {split: 0 if streaming else len(rows) for split, rows in splits.items()})
    features = splits["train"].features
    image_column, label_column = find_columns(features, image_column, label_column, path)
    require_columns(splits, image_column, label_column, report)
    check_class_names(name, config_name, splits, label_column)
    splits, shape = select_columns(splits, image_column, label_column)
    column = LabelColumn(label_column, features[label_column], problem_type, on_missing_label == "skip")
    if streaming:
        streams = stream_label_column(name, config_name, revision, label_column)
        labels, counts, sizes = check_stream(splits, streams, column, count_classes, on_main_process, report)
    else:
        selections = {split: Selection(rows, split, np.arange(len(rows))) for split, rows in splits.items()}
        labels, counts = check_rows(selections, column, validation_fraction, seed, report)
        for split, selection in selections.items():
            selections[split] = selection.sample(max_train_samples if split == "train" else max_eval_samples, seed)
        counts["train"] = count_sample(selections["train"], column, counts["train"])
        splits = {split: selection.rows for split, selection in selections.items()}
        origins = {split: (selection.split, selection.numbers) for split, selection in selections.items()}
        labels.fit(counts["train"])
        sizes = {split: len(rows) for split, rows in splits.items()}
    report += label_notes(labels, column.feature, counts.get("train"))
    return ImageData(splits, image_column, labels, sizes, shape, dataset_sources(name, path), report, origins=origins)


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


@contextlib.contextmanager
def explained_by_folder(path: Path):
    """Adds the files that are not read as images, if there are any, to an error about a folder."""
    try:
        yield
    except UserError as error:
        if path.is_dir() and (line := left_out_of_dataset(path)):
            raise UserError(f"{error}; {line}") from error
        raise


@contextlib.contextmanager
def without_progress_bars():
    """Hides the bars of `datasets`, which speak of downloads even if all files are on this machine."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def builder_arguments(name: str, config_name: str | None, revision: str | None) -> dict:
    """The arguments of `datasets.load_dataset` for a Hub id, a folder or a file."""
    path = local_path(name)
    if not path.exists():
        return {"path": name, "name": config_name, "revision": revision}
    if path.is_dir():  # an absolute path: a folder may have the name of a builder, such as imagefolder
        return {"path": str(path.absolute()), "name": config_name}
    return {"path": BUILDERS[path.suffix], "data_files": str(path)}


def local_path(name: str) -> Path:
    """The file or folder of that name; `data/digits` is also found in the repository's root."""
    path = Path(name)
    return ROOT / name if path == Path("data/digits") and not path.exists() else path


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_splits(
    name: str, config_name: str | None, revision: str | None, streaming: bool, report: list[str]
) -> dict[str, Dataset | IterableDataset]:
    """The splits "train" and, if they exist, "validation" and "test" of a dataset, see `open_splits`.

    Args:
        report: gets a line if there are other splits.

    Raises:
        UserError: it cannot be loaded, or has no "train" split.
    """
    splits = open_splits(name, config_name, revision, streaming)
    if "train" not in splits:
        hint = "; a class cannot have the name of a split" if local_path(name).is_dir() else ""
        raise UserError(f"--dataset_name: expected a 'train' split in {name!r}, got {', '.join(splits)}{hint}")
    if unused := [split for split in splits if split not in standard_names(splits).values()]:
        names = ", ".join(map(repr, unused))
        report.append(f"not used: the splits {names}; only train, test and validation (or valid, val, dev) are read")
    return standard_splits(splits)


def open_splits(
    name: str, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset]:
    """All splits of a dataset, under their own names.

    Args:
        name: a Hub id, a folder of images or data files, a folder written by `save_to_disk`, or one parquet, arrow or
            tar file (WebDataset).
        config_name: of a dataset with several configurations.
        revision: branch, tag or commit on the Hub.
        streaming: read rows when they are needed. A folder written by `save_to_disk` cannot be streamed.

    Raises:
        UserError: it cannot be loaded.
    """
    path = local_path(name)
    if path.exists() and revision is not None:
        raise UserError(f"--dataset_revision is for datasets on the Hub, but {name!r} is on this machine")
    if (path.is_file() or is_saved(path)) and config_name is not None:
        raise UserError(f"--dataset_config_name: {name!r} has no configurations")
    if path.is_file() and path.suffix not in BUILDERS:
        raise UserError(
            f"--dataset_name: expected a folder or a {', '.join(BUILDERS)} file, got {name!r}; unpack an archive, and "
            "put a table of labels beside the images as metadata.csv, with the columns file_name and label"
        )
    if is_saved(path) and streaming:
        raise UserError(
            f"--streaming cannot be used with {name!r}, which was written by save_to_disk: it is read from the disk, "
            "without loading it into memory, anyway"
        )
    quiet = without_progress_bars() if path.exists() else contextlib.nullcontext()
    failure = f"--dataset_name: {name!r} cannot be loaded"
    with explained_by_folder(path), raise_user_error(failure, RuntimeError), quiet:  # RuntimeError: it needs a script
        if is_saved(path):
            splits = load_from_disk(str(path))
            return splits if isinstance(splits, DatasetDict) else {"train": splits}
        return load_dataset(**builder_arguments(name, config_name, revision), streaming=streaming)


def standard_names(splits: Container[str]) -> dict[str, str]:
    """The standard name of each split that is used, and its own."""
    validation = next((split for split in VALIDATION_NAMES if split in splits), "validation")
    names = {"train": "train", "validation": validation, "test": "test"}
    return {split: name for split, name in names.items() if name in splits}


def standard_splits(splits: dict) -> dict:
    """The splits that are used, under their standard names."""
    return {split: splits[name] for split, name in standard_names(splits).items()}


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


# Labels


def check_class_names(dataset: str, config_name: str | None, splits: dict, column: str):
    """Raises UserError if splits, or parquet files on this machine, have different classes for the same number.

    `datasets` reads all parquet files with the names of the first one, or of the dataset card.
    """
    stored = {}
    path = local_path(dataset)
    if splits["train"].info.builder_name == "parquet" and path.exists() and not is_saved(path):
        found = load_dataset_builder(**builder_arguments(dataset, config_name, None)).config.data_files.values()
        for file in itertools.chain(*found):
            with raise_user_error(f"--dataset_name: {file} cannot be read"):
                stored[file] = Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    for places in ({f"the split {split!r}": rows.features for split, rows in splits.items()}, stored):
        first: dict[int, tuple[str, str]] = {}  # of each number, where it is found and its class
        for place, features in places.items():
            for number, name in enumerate(stored_names(features.get(column)) or []):
                first_place, first_name = first.setdefault(number, (place, name))
                if name != first_name:
                    raise UserError(
                        f"--dataset_name: expected the same classes everywhere, but class {number} is {first_name!r} "
                        f"in {first_place} and {name!r} in {place}; write all splits with the same ClassLabel"
                    )


def iterate_labels(column: IterableDataset, split: str) -> Iterator:
    """One pass over the labels of a stream."""
    progress = tqdm(desc=f"reading the labels of {split}", unit="row", leave=False)
    with raise_user_error(f"--dataset_name: the labels of the split {split!r} cannot be read"), progress:
        for columns in column.iter(LABEL_BATCH_SIZE):
            (labels,) = columns.values()
            yield from labels
            progress.update(len(labels))


def check_splits(
    splits: dict, column: LabelColumn, counts: dict[str, LabelCounts], test: LabelCounts | None, report: list[str]
) -> Labels:
    """The meaning of the labels; checks those that were counted.

    Removes a split without rows, and a test split whose labels are hidden.

    Args:
        counts: the labels of each split, if they were read.
        test: labels of the test split, or some of them.

    Raises:
        UserError: there are no training rows; a split has a label that "train" does not define; see `build_labels`.
    """
    for split in [split for split, split_counts in counts.items() if not split_counts.num_rows]:
        if split == "train":
            raise UserError("--dataset_name: expected rows in the split 'train', got none")
        report.append(f"the split {split!r} is not used, because it has no rows")
        del splits[split], counts[split]
    labels = column.build(counts.get("train"))
    if "test" in splits and test is not None and labels.are_hidden(test):
        report.append("the split 'test' is not used, because none of its rows has a label")
        del splits["test"]
        counts.pop("test", None)
    for split, split_counts in counts.items():
        labels.check(split, split_counts)
    return labels


def check_rows(
    splits: dict[str, Selection], column: LabelColumn, validation_fraction: float, seed: int, report: list[str]
) -> tuple[Labels, dict[str, LabelCounts]]:
    """The labels of a dataset on the disk, whose rows without a label are left out if the user wants that.

    Holds out a validation split if there is none.
    """
    values = {split: selection.rows[column.name][:] for split, selection in splits.items()}
    counts = {split: column.count(labels) for split, labels in values.items()}
    if column.skip_missing:
        for split, selection in splits.items():
            note_left_out(split, counts[split].drop_missing(column.kind), len(values[split]), report)
            kept = [row for row, value in enumerate(values[split]) if column.has_label(value)]
            splits[split], values[split] = selection.select(kept), [values[split][row] for row in kept]
    if column.kind == "class" and set(values["train"]) == {None}:  # of images in one folder, `datasets` drops the label
        raise UserError(
            "--dataset_name: expected several classes in the split 'train', got images without labels or of only one "
            "class, which cannot be learned; add images of another class"
        )
    labels = check_splits(splits, column, counts, counts.get("test"), report)
    if "validation" not in splits and validation_fraction:
        targets = [labels.target(value) for value in values["train"]]
        kept, held_out = split_rows(targets, labels, validation_fraction, seed, report)
        splits["train"], splits["validation"] = splits["train"].select(kept), splits["train"].select(held_out)
    return labels, counts


def count_sample(selection: Selection, column: LabelColumn, before: LabelCounts) -> LabelCounts:
    """The labels of the training images that are left after a sample was drawn.

    Raises:
        UserError: they are all the same, although those before were not.
    """
    counts = column.count(selection.rows[column.name][:])
    if len(counts.occurrences) == 1 < len(before.occurrences):
        raise UserError(f"--max_train_samples: {counts.num_rows} random images are all of one class; use more")
    return counts


def note_left_out(split: str, dropped: int, size: int, report: list[str]):
    """Reports the rows without a label that were left out.

    Raises:
        UserError: no training row has a label.
    """
    if dropped == size and split == "train":
        raise UserError(f"--on_missing_label: expected labels in the split 'train', got none in its {size} rows")
    if dropped:
        report.append(f"left out {dropped} of {size} rows of the split {split!r}, which have no label")


def check_stream(
    splits: dict[str, IterableDataset],
    label_streams: dict[str, IterableDataset],
    column: LabelColumn,
    count_classes: bool,
    on_main_process: Callable,
    report: list[str],
) -> tuple[Labels, dict[str, LabelCounts], dict[str, int]]:
    """The labels of a stream, their counts if they were read, and the sizes of its splits.

    They are read if their classes or the sizes are not known, or if rows are to be left out or classes counted.
    """

    def count_splits() -> dict[str, LabelCounts]:
        return {split: column.count(iterate_labels(label_streams[split], split)) for split in splits}

    infos = {split: (rows.info.splits or {}).get(rows.split) for split, rows in splits.items()}
    sizes = {split: info.num_examples if info else 0 for split, info in infos.items()}
    is_known = column.kind in ("class", "classes") and all(sizes.values())
    if count_classes or column.skip_missing or not is_known:
        counts = on_main_process(count_splits)
        if column.skip_missing:
            for split, split_counts in counts.items():
                size = split_counts.num_rows
                note_left_out(split, split_counts.drop_missing(column.kind), size, report)
                splits[split] = splits[split].filter(column.has_label, input_columns=[column.name])
        labels = check_splits(splits, column, counts, counts.get("test"), report)
        labels.fit(counts["train"])
        return labels, counts, {split: split_counts.num_rows for split, split_counts in counts.items()}
    sample = None
    if "test" in splits:
        first_labels = itertools.islice(iterate_labels(label_streams["test"], "test"), HIDDEN_LABELS_SAMPLE)
        sample = column.count(first_labels)
    labels = check_splits(splits, column, {}, sample, report)
    return labels, {}, {split: sizes[split] for split in splits}
