"""From a row of a dataset to the bytes of its image, which may be in a file that the row names.

A file is read only if it lies in the dataset's own folder: rows of a downloaded dataset must not name other files of
this machine. An error of the machine, such as a lost disk, does not make an image bad: reading is tried again, and then
the run ends.
"""

import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets.config
import fsspec
from huggingface_hub.constants import HF_HUB_CACHE

from ..files import NETWORK_ERRORS, UserError

MAX_FILE_BYTES = 2**30
WAITS = (0.5, 2.0, 5.0)  # seconds before each further attempt
MACHINE_ERRORS = (*NETWORK_ERRORS, MemoryError)  # among them too many open files, a lost disk, a busy server
MISSING = (FileNotFoundError, NotADirectoryError)
ARCHIVES = re.compile(r"(zip|tar|gzip|bz2|xz|lz4|zstd)://")

absent_folders: set[str] = set()  # that were not there after several attempts: the next file in them is not waited for

Result = TypeVar("Result")


class BadImage(UserError):
    """A row whose image is missing, cannot be decoded, or is too large."""


def dataset_sources(name: str, path: Path) -> tuple[str, ...]:
    """The folders and the URLs, up to a file's name, in which the rows of a dataset may name files.

    Args:
        name: a Hub id.
        path: the local folder or file that the name means, if it exists. A single file has no folder of its own.
    """
    archives = os.path.realpath(datasets.config.EXTRACTED_DATASETS_PATH)
    if path.exists():
        return (os.path.realpath(path), archives) if path.is_dir() else (archives,)
    cache = os.path.realpath(os.path.join(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"))
    return cache, archives, f"hf://datasets/{name}@", f"hf://datasets/{name}/"


def read_bytes(value: dict | None, sources: tuple[str, ...]) -> bytes:
    """The encoded image of a row {"path", "bytes"}.

    Args:
        sources: see `dataset_sources`. Relative paths start at the first one.

    Raises:
        BadImage: the row has no image, or names a file that is missing, too large, not regular or not in `sources`.
        OSError, MemoryError, an error of the HTTP library: reading failed several times.
    """
    if value is None:
        raise BadImage("the image is missing")
    data = value["bytes"]
    if data is None and value["path"]:
        url, file, folder = locate(value["path"], sources)
        try:
            data = retry_machine_errors(lambda: read_file(url, file))
        except MISSING as error:
            if folder and not has_entries(folder):
                raise OSError(f"the dataset's folder {folder} is gone") from error
            absent_folders.add(os.path.dirname(file or ""))
            raise BadImage(f"there is no file {value['path']}") from error
    if not data:
        raise BadImage("the image is missing" if data is None else "empty")
    return data


def locate(path: str, sources: tuple[str, ...]) -> tuple[str | None, str | None, str | None]:
    """What a row's path means: a URL for fsspec, the local file that is read, and the source folder of that file.

    Raises:
        BadImage: it is not in `sources`.
    """
    folders = [source for source in sources if "://" not in source]
    *members, outer = path.split("::") if ARCHIVES.match(path) else [path]  # zip://0.png::photos.zip
    if "\0" in path or not all(map(ARCHIVES.match, members)):
        raise BadImage(f"expected the path of a file, got {path!r}")
    if "://" in outer:
        if ".." in outer.split("/") or not any(outer.startswith(source) for source in sources if "://" in source):
            raise BadImage(f"{outer} is not in the dataset's repository: rows may only name files in it")
        return path, None, None
    path_in_folder = os.path.join(*folders[:1], outer)
    file = os.path.realpath(path_in_folder)
    for folder in folders:
        # A link inside the folder is fine: whoever made the folder put it there.
        if any(name.startswith(os.path.join(folder, "")) for name in (file, os.path.abspath(path_in_folder))):
            return "::".join([*members, file]) if members else None, file, folder
    raise BadImage(f"{file} is not in the dataset's folder: rows may only name files in the folder of --dataset_name")


def read_file(url: str | None, file: str | None) -> bytes:
    """The bytes of a local file, or those at a URL, which may be a member of the local file."""
    if file is not None:
        try:
            status = os.stat(file)
        except MISSING as error:
            folder = os.path.dirname(file)
            is_known = folder in absent_folders or has_entries(folder)
            if is_known and not os.path.lexists(file):  # looked for again, since the folder may be back only now
                raise BadImage(f"there is no file {file}") from error
            raise
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"expected a regular file, got {file}")
    with fsspec.open(url, "rb") if url is not None else open(file, "rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"expected at most {MAX_FILE_BYTES} bytes, got a larger file")
    return data


def has_entries(folder: str) -> bool:
    """Whether a folder exists and is not empty, as the folder of a disk that is not mounted is."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except MISSING:
        return False


def retry_machine_errors(function: Callable[[], Result]) -> Result:
    """The result of a function, which is called again after an error of the machine.

    Raises:
        OSError, MemoryError, an error of the HTTP library: the last attempt failed, too.
    """
    for wait in WAITS:
        try:
            return function()
        except MACHINE_ERRORS:
            time.sleep(wait)
    return function()
