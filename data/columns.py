"""Which columns of a dataset hold the images and the labels."""

from pathlib import Path

from datasets import Array2D, Array3D, Features, Image

from ..files import UserError
from .folders import why_no_classes
from .labels import column_names, find_label_column


def find_columns(features: Features, image_column: str | None, label_column: str | None, path: Path) -> tuple[str, str]:
    """The names of the two columns; the error for a folder of images says why there are no labels."""
    try:
        return find_image_column(features, image_column), find_label_column(features, label_column)
    except UserError as error:
        reason = why_no_classes(path) if path.is_dir() and image_column is None and label_column is None else None
        if reason is None:
            raise
        raise UserError(f"--dataset_name: {reason}") from error


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


def require_columns(splits: dict, image_column: str, label_column: str, report: list[str]):
    """Raises UserError if a split lacks a column. A test split without labels is left out; the report gets a line."""
    for split, rows in list(splits.items()):
        features = rows.features or splits["train"].features
        missing = [name for name in (image_column, label_column) if name not in features]
        if split == "test" and missing == [label_column]:
            report.append(f"the split 'test' is not used, because it has no column {label_column!r}")
            del splits[split]
        elif missing:
            raise UserError(
                f"--dataset_name: expected the column {missing[0]!r} in the split {split!r}, too, got the columns "
                f"{column_names(features)}"
            )


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
