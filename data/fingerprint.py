"""What a dataset is, in a few numbers and hashes, so that a run resumes on the dataset that it began with."""

import hashlib
import json
import os
import re

import fsspec
import numpy as np
from datasets import Dataset, load_dataset_builder

from .dataloader import column_values
from .loading import ImageData, builder_arguments, standard_splits
from .splitting import spread

SAMPLE_IMAGES = 64  # of each split, at equal distances
SAMPLE_BYTES = 2**16  # of each image
SAMPLE_SHARDS = 100  # of each split of a stream, whose sizes are compared


def fingerprint(
    data: ImageData, name: str, config_name: str | None = None, revision: str | None = None
) -> dict[str, int | str]:
    """The number of rows, the labels and a hash of some encoded images of each split.

    A stream has the names of its shards and the sizes of some of them instead of images and labels.

    Args:
        name, config_name, revision: with which `data` was loaded.
    """
    labels, shards = data.labels, {}
    found: dict[str, int | str] = {"label kind": labels.problem_type, "label names": digest(labels.class_names)}
    if not isinstance(data.splits["train"], Dataset):
        builder = load_dataset_builder(**builder_arguments(name, config_name, revision))
        shards = standard_splits(builder.config.data_files or {})
    for split, rows in data.splits.items():
        found[f"{split} rows"] = data.sizes[split]
        if isinstance(rows, Dataset):
            found[f"{split} labels"] = digest(rows[labels.column][:])
            found[f"{split} images"] = hash_images(rows, data.image_column, data.sources)
        else:
            found[f"{split} shards"] = hash_shards(list(shards.get(split, [])))
    return found


def differences(before: dict[str, int | str], now: dict[str, int | str]) -> list[str]:
    """How two fingerprints differ, in words."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        one, other = before.get(name), now.get(name)
        if one != other:
            is_hash = "rows" not in name and "kind" not in name and None not in (one, other)
            found.append(f"{name} have changed" if is_hash else f"{name}: was {one}, is now {other}")
    return found


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def hash_images(rows: Dataset, column: str, sources: tuple[str, ...], sample: bool = True) -> str:
    """A hash of images.

    Args:
        sources: see `dataset_sources`.
        sample: hash the first bytes of some images instead of all bytes of all images.
    """
    found = hashlib.sha256()
    tables = rows.select_columns([column]).with_format("arrow")
    for row in spread(len(rows), SAMPLE_IMAGES if sample else len(rows)):
        (value,) = column_values(tables[row : row + 1], column)
        found.update(hashlib.sha256(first_bytes(value, sources, SAMPLE_BYTES if sample else None)).digest())
    return found.hexdigest()


def first_bytes(value, sources: tuple[str, ...], count: int | None) -> bytes:
    """The first bytes of an array, or of an encoded image and its size; if there are none, the image's path.

    Args:
        sources: see `dataset_sources`.
        count: how many; None for all.
    """
    if isinstance(value, np.ndarray):
        return value.tobytes()[:count]
    if value is None or (value["bytes"] is None and not value["path"]):
        return b""
    if value["bytes"] is not None:
        return b"%d " % len(value["bytes"]) + value["bytes"][:count]
    path = os.path.join(*sources[:1], value["path"])
    if not os.path.isfile(path):  # a device or a pipe is not opened: reading it might never end
        return value["path"].encode()
    with open(path, "rb") as file:
        return b"%d " % os.path.getsize(path) + file.read(count)


def hash_shards(files: list[str]) -> str:
    """A hash of the names of files, on this machine or not, and of some of their sizes."""
    names = [re.sub(r".*/", "", file) for file in files]
    sizes = []
    for number in spread(len(files), SAMPLE_SHARDS):
        filesystem, path = fsspec.url_to_fs(files[number])
        sizes.append(filesystem.info(path)["size"])
    return digest([names, sizes])
