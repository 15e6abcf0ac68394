"""What train.py prints, in the main process."""

import contextlib
import sys
from pathlib import Path

from accelerate import Accelerator

from ..conversion.convert import Checkpoint
from ..data.decoding import same_pixels_code
from ..data.labels import REGRESSION
from ..data.streaming import StreamingSplit
from ..files import terminal_text
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .checkpoint import Splits, count_changed_images, gather_bad_images
from .metrics import Evaluation, class_table, table


@contextlib.contextmanager
def optional(name: str):
    """A context for what nobody needs to use the weights: any failure is one line, and the command goes on."""
    try:
        yield
    except Exception as error:
        print(terminal_text(f"{name} was left out: {type(error).__name__}: {error}"), file=sys.stderr)


def print_setup(
    accelerator: Accelerator,
    splits: Splits,
    model: ViTSimpleForImageClassification,
    dataset_name: str,
    base: Checkpoint | None,
):
    labels = next(iter(splits.values())).data.labels
    sizes = ", ".join(f"{split.size} {name}" for name, split in splits.items())
    outputs = f"{len(labels.class_names)} {'outputs' if labels.problem_type == REGRESSION else 'classes'}"
    accelerator.print(terminal_text(f"{dataset_name}: {sizes} images, {outputs}"))
    if "validation" not in splits and isinstance(splits.get("train"), StreamingSplit):
        accelerator.print("no validation: the dataset has no validation split, and a stream cannot be split")
    for line in [] if base is None else base.report:
        accelerator.print(terminal_text(line))
    devices = f"{accelerator.num_processes} x {accelerator.device}"
    accelerator.print(f"ViTSimple: {model.num_parameters():,} parameters, {devices}")


def print_results(accelerator: Accelerator, title: str, results: dict[str, Evaluation], class_names: list[str]):
    """A table of all results, then a table of the classes for each result."""
    accelerator.print(table(title, results))
    for name, result in results.items():
        if result.per_class:
            accelerator.print(class_table(name, result, class_names))


def print_image_notes(accelerator: Accelerator, splits: Splits):
    """The images that were skipped, and how many a pipeline sees with other pixels. Called by every process."""
    bad_images = [
        terminal_text(f"{row}: {why}") for rows in gather_bad_images(splits).values() for row, why in rows.items()
    ]
    if bad_images:
        accelerator.print("\n  ".join([f"skipped {len(bad_images)} unreadable images:", *bad_images]))
    if changed := count_changed_images(splits):
        bit_depth = next(iter(splits.values())).decode.bit_depth
        counts = ", ".join(f"{count} images ({reason})" for reason, count in changed.items())
        code = "; ".join(same_pixels_code(" ".join(changed), bit_depth))
        accelerator.print(f"a pipeline sees other pixels of {counts}; to give it those of training: {code}")


def print_saved(accelerator: Accelerator, folder: Path):
    accelerator.print(terminal_text(f"saved in {folder}; load it anywhere on this machine with"))
    code = f'transformers.pipeline("image-classification", "{folder.resolve()}", trust_remote_code=True)'
    accelerator.print(f"  {terminal_text(code)}")
