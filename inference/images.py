"""Which images a command reads: files, the images in folders, or the rows of a split of a dataset."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Image

from ..data.columns import find_image_column
from ..data.dataloader import column_values
from ..data.fingerprint import digest, hash_images
from ..data.folders import IMAGES, files_in, left_out
from ..data.loading import local_path, open_splits
from ..data.reading import dataset_sources
from ..files import UserError


@dataclass
class Images:
    """Image files; the base of DatasetImages.

    Args:
        paths: of the files.
        sources: folders in which the files may be, see `read_bytes`.
        report: what the user should know, one line each.
    """

    paths: Sequence[str]
    sources: tuple[str, ...]
    report: list[str] = field(default_factory=list)
    columns = {"path": pa.string()}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: range) -> Iterator[tuple[dict, dict | None]]:
        """The columns that say which image it is, and the undecoded image {"path", "bytes"}, of each of these."""
        for row in rows:
            path = self.paths[row]
            yield {"path": as_text(path)}, {"path": os.path.join(os.getcwd(), path), "bytes": None}

    def fingerprint(self) -> str:
        return digest(self.paths)


class DatasetImages(Images):
    """The images of a dataset's split.

    Args:
        rows: the split, whose images are not decoded.
        column: of the images.
    """

    columns = {"row": pa.int64(), "path": pa.string()}

    def __init__(self, rows: Dataset, column: str, sources: tuple[str, ...]):
        super().__init__([], sources)
        self.rows, self.column = rows.select_columns([column]), column
        self.arrow = self.rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: range) -> Iterator[tuple[dict, dict | None]]:
        for row, value in zip(rows, column_values(self.arrow[rows.start : rows.stop], self.column)):
            yield {"row": row, "path": as_text((value or {}).get("path") or "")}, value

    def fingerprint(self) -> str:
        return digest([len(self), hash_images(self.rows, self.column, self.sources)])


def as_text(path: str) -> str:
    """The path as Unicode text; bytes of a file's name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(names: list[str]) -> Images:
    """The images that files and folders name, each once, in the order of the names; those of a folder are sorted.

    Raises:
        UserError: there is no such file or folder, or no image in a folder.
    """
    paths: dict[str, str] = {}  # normalized path -> path as it was named
    sources: dict[str, None] = {}  # a set in order
    report = []
    for name in names:
        if os.path.isdir(name):
            files = files_in(Path(name))
            found = [os.path.join(name, file) for file in files if file.suffix.lower() in IMAGES]
            line = left_out(files)
            if not found:
                raise UserError(f"expected images in {name}, got none{f'; {line}' if line else ''}")
            sources |= dict.fromkeys((os.path.realpath(name), os.path.abspath(name)))
            report += [line] if line else []
        elif os.path.exists(name):
            found = [name]
            sources[Path(os.path.abspath(name)).anchor] = None
        else:
            raise UserError(f"there is no file or folder {name}; a dataset on the Hub needs --split")
        for path in found:
            paths.setdefault(os.path.normpath(path), path)
    return Images(list(paths.values()), tuple(sources), report)


def find_rows(names: list[str], split: str, config_name: str | None, column: str | None) -> DatasetImages:
    """The images of a dataset: a Hub id, a folder or a file, as `load_splits` takes it.

    Raises:
        UserError: it cannot be loaded, or has no such split or column.
    """
    if len(names) != 1:
        raise UserError(f"--split: expected one dataset, got {len(names)} names")
    try:
        splits = open_splits(names[0], config_name)
    except UserError as error:
        raise UserError(str(error).removeprefix("--dataset_name: ")) from error
    if split not in splits:
        raise UserError(f"--split: expected one of {', '.join(splits)}, got {split}")
    rows = splits[split]
    if not len(rows):
        raise UserError(f"--split: expected images in {split}, got none")
    column = find_image_column(rows.features, column)
    if not isinstance(rows.features[column], Image):
        raise UserError(f"--image_column_name: expected encoded images in {column}, got arrays")
    sources = dataset_sources(names[0], local_path(names[0]))
    return DatasetImages(rows.cast_column(column, Image(decode=False)), column, sources)
