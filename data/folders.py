"""What `datasets` makes of a folder of images: what it leaves out, its splits and classes, and why it finds none."""

import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..files import UserError

IMAGES = frozenset(ImageFolder.EXTENSIONS)
# Files that lie beside images: texts, tables, archives (which are read) and what an operating system leaves.
OTHERS = frozenset(
    f".{name}"
    for name in (
        *("txt", "md", "rst", "pdf", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "html", "log", "py", "ipynb"),
        *("parquet", "arrow", "tar", "zip", "gz", "tgz", "bz2", "xz", "7z", "rar", "db", "ini", "lnk", "url", "pkl"),
    )
)
SPLITS = [keyword for keywords in SPLIT_KEYWORDS.values() for keyword in keywords]
SPLIT_NAME = re.compile(f"(.*[{NON_WORDS_CHARS}])?({'|'.join(SPLITS)})([{NON_WORDS_CHARS}].*)?")


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


def folder_notes(folder: Path, sizes: dict[str, int]) -> list[str]:
    """What the user should know of how a folder of images was read, a line for each matter.

    Args:
        sizes: the number of rows of each split; 0 if it is not known.

    Raises:
        UserError: there is no other split than train, but a folder with the name of a split in capitals.
    """
    files = files_in(folder)
    images = [file for file in files if file.suffix.lower() in IMAGES and "\n" not in str(file.parent)]
    capitals = sorted({file.parts[0] for file in images if len(file.parts) > 2 and file.parts[0].lower() in SPLITS})
    capitals = [name for name in capitals if name not in SPLITS]
    if capitals and sizes.keys() == {"train"}:
        names = ", ".join(f"{name!r} to {name.lower()!r}" for name in capitals)
        raise UserError(f"--dataset_name: splits need lower-case names; rename the folder {names}")
    notes = [left_out_of_dataset(folder), folders_without_images(folder, images), nested_classes(images)]
    notes.append(read_by_second_extension(files))
    has_table = any(file.name in FolderBasedBuilder.METADATA_FILENAMES for file in files)
    classes = sorted({file.parent.name for file in images if not SPLIT_NAME.fullmatch(file.parent.name)})
    if has_table and len(classes) > 1:
        notes.append(f"the metadata file has the labels: the names of folders, such as {classes[0]!r}, are not used")
    if 0 < (rows := sum(sizes.values())) < len(images):
        why = "the metadata file does not name" if has_table else "are in no folder of a split, or broken links"
        notes.append(f"left out {len(images) - rows} of {len(images)} images, which {why}")
    by_name = [file for file in images if SPLIT_NAME.fullmatch(file.stem)]
    folders = {part for file in images for part in file.parts[:-1]}
    if len(sizes) > 1 and by_name and not any(map(SPLIT_NAME.fullmatch, folders)):
        notes.append(f"the names of the files decide their splits, such as {by_name[0]}")
    return [note for note in notes if note]


def folders_without_images(folder: Path, images: list[PurePosixPath]) -> str | None:
    """A line about the folders beside those of the classes that contain no image."""
    filled = {parent for file in images for parent in file.parents}
    beside = {path.parent for path in {file.parent for file in images} if path.parts}
    found = [
        path / entry.name
        for path in sorted(beside)
        for entry in sorted(os.scandir(folder / path), key=lambda entry: entry.name)
        if entry.is_dir() and not is_hidden(entry.name) and "\n" not in entry.name and path / entry.name not in filled
    ]
    return f"without images, and so no classes: {', '.join(map(str, found[:5]))}" if found else None


def nested_classes(images: list[PurePosixPath]) -> str | None:
    """A line about folders between those of the splits and those of the classes, if there are several."""
    above = {}
    for file in images:
        above.setdefault(tuple(part for part in file.parent.parent.parts if not SPLIT_NAME.fullmatch(part)), file)
    if len(above) < 2:
        return None
    *_, file = above.values()
    return (
        f"the innermost folder is the class, such as {file.parent.name!r} of {file}: the names of the folders above it "
        "are not used"
    )


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


def has_second_extension(file: PurePosixPath) -> bool:
    """Whether `datasets` takes a file for an image because of its second extension, such as photo.jpg.json."""
    return file.suffix.lower() not in IMAGES and PurePosixPath(file.stem).suffix.lower() in IMAGES


def read_by_second_extension(files: list[PurePosixPath]) -> str | None:
    """A line about the `files_in` a folder that may be no images, but are read as such."""
    found = [file for file in files if has_second_extension(file)]
    if not found:
        return None
    inner = PurePosixPath(found[0].stem).suffix
    return (
        f"read {len(found)} files such as {found[0]} as images, because of the {inner} in their names: remove them if "
        "they are none"
    )


def left_out(files: list[PurePosixPath]) -> str | None:
    """A line about the `files_in` a folder that are probably images, but whose format `datasets` does not read."""
    unread = [file for file in files if file.suffix.lower() not in IMAGES | OTHERS]
    unread = [file for file in unread if file.suffix and not has_second_extension(file)]
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
    if usual == 1 or (usual == 2 and len(classes) == 1 and split in ("train", "training", "images", "data")):
        return f"expected images in one folder for each class, such as train/CLASS/1.jpg, got {example}"
    if usual == 2 and (taken := sorted(classes & set(SPLITS))):
        return f"expected classes without the name of a split, got {taken[0]!r}: rename this folder"
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
