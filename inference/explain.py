"""What a checkpoint looks at in images, as a folder of figures and numbers.

explain(["cat.jpg"], "outputs/pets", "outputs/explain")
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.decoding import load_rgb, open_image, raise_bad_image
from ..files import UserError, file_name, write_atomically
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .attention import position_similarity
from .explanation import Explanation, explain_pixels, rounded
from .figures import box_of, draw_positions, some_positions
from .fonts import plain_text, readable_names
from .opening import open_model


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


def read_image(path: str) -> np.ndarray:
    """The pixels of an image file, uint8 (H, W, 3). Raises UserError if it cannot be decoded."""
    try:
        with raise_bad_image():
            return np.array(load_rgb(open_image(Path(path).read_bytes())))
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


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
        UserError: an image or the checkpoint cannot be read; there is no such patch or label.
    """
    output_dir, written = Path(output_dir), []
    folders = [output_dir / file_name(Path(image).stem) for image in images]
    if len(set(folders)) < len(folders):
        raise UserError("expected images with different names, since each gets a folder of its name")
    opened, processor = open_model(str(model))
    number = None if label is None else find_label(label, opened)
    names = list(opened.config.id2label.values())
    shown_names, families, _ = readable_names(names)
    for path, folder in zip(images, folders):
        explanation = explain_image(opened, processor, read_image(path), patch, number)
        folder.mkdir(parents=True, exist_ok=True)
        with plain_text(families):
            written += save(explanation.figures(shown_names), folder)
        if save_json:
            written.append(folder / "numbers.json")
            write_atomically(written[-1], json.dumps({"file": path, **explanation.numbers(names)}) + "\n")
    height, width = explanation.rollout.shape  # in patches
    similarity = position_similarity(opened, (height, width)).cpu()
    written += save({"positions": draw_positions(similarity)}, output_dir)
    if save_json:
        rows, columns = some_positions(similarity)
        content = {"rows": rows, "columns": columns, "similarity": rounded(similarity[rows][:, columns])}
        written.append(output_dir / "positions.json")
        write_atomically(written[-1], json.dumps(content) + "\n")
    return written


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    files = [folder / f"{name}.png" for name in figures]
    for file, figure in zip(files, figures.values()):
        figure.savefig(file, bbox_inches="tight", pad_inches=0.1)
    return files
