"""What a checkpoint looks at in images, as a folder of figures and numbers.

explain(["cat.jpg"], "outputs/pets", "outputs/explain")
"""

import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, PreTrainedModel

from ..configuration_vit_simple import pair
from ..data.decoding import Decoder
from ..data.reading import BadImage
from ..files import UserError, file_name, write_atomically
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .attention import position_similarity
from .explanation import Explanation, explain_pixels, rounded
from .figures import box_of, draw_positions, some_positions
from .fonts import plain_text, readable_names
from .opening import open_model, trained_bit_depth

POSITIONS = ("positions.png", "positions.json")  # the files that belong to the model instead of an image


def explain_image(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    image: np.ndarray,
    patch: tuple[int, int] | None = None,
    label: int | None = None,
) -> Explanation:
    """Explains an image, uint8 (H, W, 3), of any size; see `explain_pixels`."""
    pixel_values = processor(image, input_data_format="channels_last", return_tensors="pt").pixel_values
    return explain_pixels(model, pixel_values, image, box_of(processor, image.shape[1], image.shape[0]), patch, label)


def read_file(path: str) -> bytes:
    """The content of a file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def decode(path: str, content: bytes, decoder: Decoder) -> np.ndarray:
    """The pixels of an image file, uint8 (H, W, 3). Raises UserError if it cannot be used."""
    try:
        return np.array(decoder({"path": path, "bytes": content}, 0, 0))
    except BadImage as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def find_folders(images: list[str], output_dir: Path) -> dict[str, Path]:
    """The folder of each image file; a file that is given twice is in it once.

    Raises:
        UserError: two images would get the same folder, or a folder cannot be made because a file has its name.
    """
    folders = {}
    for image in {os.path.abspath(image): image for image in images}.values():
        name = file_name(Path(image).stem)
        if name in POSITIONS:
            raise UserError(
                f"{image} needs a folder {name} in --output_dir, where a file has this name: rename the image"
            )
        other = next((other for other, folder in folders.items() if folder.name == name), None)
        if other is not None:
            raise UserError(
                f"{other} and {image} need the same folder, {name} in --output_dir: rename one of them, or explain "
                "each in a command with its own --output_dir"
            )
        folders[image] = output_dir / name
    for folder in (output_dir, *folders.values()):
        found = next(path for path in (folder, *folder.parents) if path.exists())
        if not found.is_dir():
            raise UserError(f"--output_dir: expected a folder, got the file {found}; name another folder")
    return folders


def find_label(name: str, model: PreTrainedModel) -> int:
    """The number of a label, given by name or number. Raises UserError if the model has no such label."""
    if not isinstance(model, ViTSimpleForImageClassification):
        raise UserError("--label: the checkpoint has no head, so it predicts no labels")
    names = list(model.config.id2label.values())
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise UserError(f"--label: expected a label of the model, or its number below {len(names)}, got {name!r}")


def explain(
    images: list[str],
    model: str,
    output_dir: str | Path,
    patch: tuple[int, int] | None = None,
    label: str | None = None,
    save_json: bool = False,
) -> list[Path]:
    """Writes a folder of figures for each image file, and the similarity of positions; returns the files.

    Args:
        model: a checkpoint: a folder or a Hub id.
        patch, label: see `explain_image`; the label by its name or number.
        save_json: also write the numbers.

    Raises:
        UserError: an image or the checkpoint cannot be read; there is no such patch or label; see `find_folders`.
    """
    output_dir, written = Path(output_dir), []
    folders = find_folders(images, output_dir)
    contents = {path: read_file(path) for path in folders}
    opened, processor = open_model(str(model))
    size, bit_depth = pair(opened.config.image_size), trained_bit_depth(str(model)) or 16
    decoder = Decoder(processor, (3, *size), bit_depth=bit_depth)
    for path, content in contents.items():
        decode(path, content, decoder)  # all, so that a damaged one does not stop the command half way
    number = None if label is None else find_label(label, opened)
    names = list(opened.config.id2label.values())
    shown_names, families, _ = readable_names(names)
    for path, folder in folders.items():
        image = decode(path, contents[path], decoder)
        explanation = explain_image(opened, processor, image, patch, number)
        folder.mkdir(parents=True, exist_ok=True)
        with plain_text(families):
            written += save(explanation.figures(shown_names), folder)
        if save_json:
            written.append(folder / "numbers.json")
            write_atomically(written[-1], json.dumps({"file": path, **explanation.numbers(names)}) + "\n")
    height, width = explanation.rollout.shape  # in patches
    similarity = position_similarity(opened, (height, width)).cpu()
    written += save({Path(POSITIONS[0]).stem: draw_positions(similarity)}, output_dir)
    if save_json:
        rows, columns = some_positions(similarity)
        content = {"rows": rows, "columns": columns, "similarity": rounded(similarity[rows][:, columns])}
        written.append(output_dir / POSITIONS[1])
        write_atomically(written[-1], json.dumps(content) + "\n")
    return written


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    files = [folder / f"{name}.png" for name in figures]
    for file, figure in zip(files, figures.values()):
        figure.savefig(file, bbox_inches="tight", pad_inches=0.1)
    return files
