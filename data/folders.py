"""What `datasets` leaves out of a folder of images, and why it finds no classes in one."""

import os
from collections import Counter
from pathlib import Path, PurePosixPath

from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

IMAGES = frozenset(ImageFolder.EXTENSIONS)
# Files that lie beside images: texts, tables, archives (which are read) and what an operating system leaves.
OTHERS = frozenset(
    f".{name}"
    for name in (
        *("txt", "md", "rst", "pdf", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "html", "log", "py", "ipynb"),
        *("parquet", "arrow", "tar", "zip", "gz", "tgz", "bz2", "xz", "7z", "rar", "db", "ini", "lnk", "url", "pkl"),
    )
)


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def files_in(folder: Path, hidden: bool = False) -> list[PurePosixPath]:
    """The files in a folder, relative to it, but for hidden ones; or only those in hidden folders."""
    found = []
    for path, folders, names in os.walk(folder, followlinks=True):
        relative = PurePosixPath(Path(path).relative_to(folder).as_posix())
        folders[:] = sorted(name for name in folders if hidden or not is_hidden(name))
        if hidden == any(map(is_hidden, relative.parts)):
            found += [relative / name for name in sorted(names) if not is_hidden(name)]
    return found


def left_out_of_dataset(folder: Path) -> str | None:
    """What is probably an image, but is not read because of its format or because of the name of its folder."""
    files = files_in(folder)
    unread = [file for file in files if "\n" in str(file.parent)] + files_in(folder, hidden=True)
    unread = [file for file in unread if file.suffix.lower() in IMAGES]
    names = sorted({part for file in unread for part in file.parts if is_hidden(part) or "\n" in part})
    line = (
        f"left out {len(unread)} images in folders whose names begin with . or __ or have a line break, which are not "
        f"read: {', '.join(map(repr, names[:5]))}; rename them if they are classes"
    )
    return "; ".join(filter(None, [left_out(files), line if unread else None])) or None


def left_out(files: list[PurePosixPath]) -> str | None:
    """A line about the `files_in` a folder that are probably images, but whose format `datasets` does not read."""
    unread = [file for file in files if file.suffix.lower() not in IMAGES | OTHERS]
    unread = [file for file in unread if file.suffix]
    if not unread:
        return None
    counts = Counter(file.suffix.lower() for file in unread)
    first = {file.suffix.lower(): file for file in reversed(unread)}
    kinds = ", ".join(f"{count} {suffix} ({first[suffix]})" for suffix, count in counts.most_common(5))
    rename = "; a .mpo file only needs the name .jpg" if ".mpo" in counts else ""
    return f"left out {len(unread)} files that are not read as images: {kinds}; convert them to JPEG or PNG{rename}"


def why_no_classes(folder: Path) -> str | None:
    """Why the images in a folder get no labels from the names of their folders; None if it is not known.

    `datasets` takes the name of the folder that an image is in, if all images are equally deep and there are several
    such names.
    """
    files = files_in(folder)
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if not images or any(file.name in FolderBasedBuilder.METADATA_FILENAMES for file in files):
        return None
    depths = Counter(len(file.parts) for file in images)
    usual = max(depths, key=lambda depth: (depths[depth], -depth))
    example = next(file for file in images if len(file.parts) == usual)
    others = [file for file in images if len(file.parts) != usual]
    classes = {file.parent.name for file in images}
    if others:
        return (
            f"expected all images in folders of the same depth, such as {example}, got {len(others)} elsewhere, such "
            f"as {others[0]}: move them into the folders of their classes, or out of the dataset's folder"
        )
    split = example.parts[0].lower()
    if usual == 1 or (usual == 2 and split in ("train", "training", "images", "data")):
        return f"expected images in one folder for each class, such as train/CLASS/1.jpg, got {example}"
    if len(classes) == 1:
        (name,) = classes
        return (
            f"expected several classes, got only {name!r}, the folder of all {len(images)} images: one class cannot be "
            f"learned; add a folder with images of another class, such as {example.parent.parent / f'not_{name}'}"
        )
    suffix, count = Counter(file.suffix.lower() for file in files).most_common(1)[0]
    if suffix not in IMAGES:
        return (
            f"expected a folder with mostly images, got {count} {suffix} files and {len(images)} images: move the "
            "other files to another folder"
        )
    return None
