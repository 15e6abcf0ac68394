"""What train.py prints, in the main process."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from ..conversion.convert import Checkpoint
from ..data.decoding import same_pixels_code
from ..data.labels import REGRESSION
from ..data.streaming import StreamingSplit
from ..files import RECORD, RunError, read_json, terminal_text
from ..inference.opening import open_record
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .calibration import MIN_IMAGES, Fitted
from .checkpoint import Splits, count_changed_images, gather_bad_images
from .lora import ADAPTER_CONFIG
from .metrics import MANY_CLASSES, Evaluation, class_table, confidence_table, table


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
    count, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    part = f", {trained:,} of them trained" if trained < count else ""
    accelerator.print(f"ViTSimple: {count:,} parameters{part}, {devices}")


def print_results(accelerator: Accelerator, title: str, results: dict[str, Evaluation], class_names: list[str]):
    """A table of all results, then a table of the classes for each result."""
    accelerator.print(table(title, results))
    for name, result in results.items():
        if result.per_class:
            accelerator.print(class_table(name, result, class_names))


def print_confidence(accelerator: Accelerator, results: dict[str, Evaluation], checkpoint: str | None = None):
    """How far the probabilities can be trusted, and what was fitted; nothing for a regression.

    Args:
        results: by names such as "validation raw"; that of the validation split, if there is one, comes first.
        checkpoint: a folder, a file or a Hub id, if it is evaluated as it is.
    """
    results = {name: result for name, result in results.items() if result.reliability}
    if not results:
        return
    accelerator.print(confidence_table(results))
    for name, result in results.items():
        if "micro_f1_at_thresholds" in result.values:
            micro, macro = (result.values[f"{kind}_f1_at_thresholds"] for kind in ("micro", "macro"))
            accelerator.print(f"{name}, at the thresholds: F1 micro {micro:.2%}, F1 macro {macro:.2%}")
    name, result = next(iter(results.items()))
    if name.startswith("validation"):
        for line in fitted_lines(result.fitted, checkpoint is not None and is_calibrated(checkpoint)):
            accelerator.print(terminal_text(line))


def is_calibrated(checkpoint: str) -> bool:
    """Whether the head of a checkpoint, a folder, a file or a Hub id, is divided by a temperature, as far as known."""
    if Path(checkpoint).is_file():
        return False
    with contextlib.suppress(RunError):  # the Hub does not answer
        return bool(open_record(checkpoint, {"calibrated": bool | None}).get("calibrated"))
    return False


def fitted_lines(fitted: Fitted, is_calibrated: bool = False) -> Iterator[str]:
    """What was fitted on the validation split.

    Args:
        is_calibrated: the head was divided by a temperature before.
    """
    if fitted.temperature is None:
        yield f"no temperature: it needs at least {MIN_IMAGES} validation images and a model better than chance"
    elif fitted.calibrated:
        yield f"the exported head is divided by the temperature {fitted.temperature:.3f} of the validation split"
    else:
        advice = "the head is calibrated already" if is_calibrated else "train.py --calibrate true applies it"
        yield f"temperature of the validation split: {fitted.temperature:.3f}; {advice}"
    if fitted.keep_score is not None:
        yield f"95% of the validation images have a highest probability of at least {fitted.keep_score:.3f}"
    if fitted.thresholds is not None and len(fitted.thresholds) <= MANY_CLASSES:
        thresholds = ", ".join(f"{name} {threshold:.3f}" for name, threshold in fitted.thresholds.items())
        yield f"thresholds of the classes with the highest F1: {thresholds}"


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
    if (folder / ADAPTER_CONFIG).exists():
        accelerator.print(terminal_text(f"the adapter is saved in {folder}, and README.md has the code that loads it"))
        return
    accelerator.print(terminal_text(f"saved in {folder}; load it anywhere on this machine with"))
    path = json.dumps(str(folder.resolve()), ensure_ascii=False)
    code = f'transformers.pipeline("image-classification", {path}, trust_remote_code=True)'
    accelerator.print(f"  {terminal_text(code)}")


def print_probe(correct: int, count: int, size: int) -> float:
    """Says what a logistic regression on the features of the initial weights gets right; returns it as a fraction.

    Args:
        count: of the validation images that it was tried on.
        size: of the validation split.
    """
    share = f"{correct} of {count} validation images ({correct / count:.1%})"
    sample = f"; these {count} are a random sample of the {size}" if count < size else ""
    print(f"before training, a logistic regression on the features of the frozen backbone gets {share} right{sample}")
    return correct / count


def warn_below_probe(folder: Path, validation: Evaluation):
    """Warns if a run ends with a lower accuracy than the logistic regression had before it, which the record has."""
    before, after = read_json(folder / RECORD).get("probe"), validation.values.get("top1")
    if before is not None and after is not None and after < before:
        print(
            f"warning: the validation accuracy ends at {after:.1%}, below the {before:.1%} of the logistic regression "
            "before training: try another --learning_rate or --num_train_epochs, or the head that probe.py saves"
        )


def print_end(
    accelerator: Accelerator,
    folder: Path,
    splits: Splits,
    split: str | None,
    weights: str,
    result: Evaluation | None,
    validation: Evaluation | None,
):
    """The result of these weights on a split, a warning if training was in vain, and where the result is."""
    with optional("the table of results"):
        if accelerator.is_main_process and validation is not None:
            warn_below_probe(folder, validation)
        if split != "test":
            accelerator.print("there is no test split with labels")
        if result is not None:
            print_results(accelerator, "end", {f"{split} {weights}": result}, splits[split].data.labels.class_names)
            before = {f"validation {weights}": validation} if validation is not None else {}
            print_confidence(accelerator, {**before, f"{split} {weights}": result})
    print_image_notes(accelerator, splits)
    print_saved(accelerator, folder)
