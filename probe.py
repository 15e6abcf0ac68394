"""Measures a checkpoint on your images without training it: computes features once, then k-NN and logistic regression.

python probe.py google/vit-base-patch16-224 --dataset_name path/to/images
python probe.py outputs/vit-b16 --dataset_name path/to/images --output_dir outputs/probe

With --output_dir, the logistic regression becomes the head of a complete checkpoint, which loads in one line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from vit_simple import ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import pair
from vit_simple.conversion.convert import Checkpoint
from vit_simple.data.loading import ImageData
from vit_simple.files import PREPROCESSOR, UserError, command_errors, terminal_text, write_atomically
from vit_simple.inference.features import (
    USUAL_STRENGTH,
    cached_features,
    choose_strength,
    fit_logistic,
    images_with_class,
    knn_votes,
    require_classes,
)
from vit_simple.sharing.card import build_card
from vit_simple.sharing.card_text import confidence_interval
from vit_simple.sharing.record import record
from vit_simple.sharing.run import record_run
from vit_simple.training.base import open_base
from vit_simple.training.calibration import Fitted
from vit_simple.training.checkpoint import count_changed_images, log_metrics, save_result
from vit_simple.training.config import OPTIONS, TrainConfig, convert, unknown
from vit_simple.training.devices import build_accelerator
from vit_simple.training.folder import check_output_dir
from vit_simple.training.metrics import METRICS_OF, Evaluation
from vit_simple.training.report import print_image_notes, print_saved, print_setup
from vit_simple.training.setup import build_model, build_splits, load_data

OF_TRAINING = (  # options that mean the same as in train.py
    *("dataset_name", "dataset_config_name", "dataset_revision", "image_column_name", "label_column_name"),
    *("problem_type", "on_missing_label", "train_val_split", "max_train_samples", "max_eval_samples", "image_size"),
    *("conversion", "dataloader_num_workers", "on_bad_image", "bit_depth", "seed", "license"),
)
HELP = {"train_val_split": "fraction of train held out if there is no other split (default: 0.2)"}  # not as in train.py


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("probe.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, file or Hub id, as in train.py")
    for name in OF_TRAINING:
        allowed, text = OPTIONS[name].metadata["allowed"], HELP.get(name, OPTIONS[name].metadata["help"])
        text = text.partition("; without it")[0].replace("%", "%%")
        metavar = "|".join(allowed) if isinstance(allowed, tuple) else name.split("_")[-1].upper()
        parser.add_argument(f"--{name}", metavar=metavar, required=name == "dataset_name", help=text)
    parser.add_argument("--output_dir", metavar="FOLDER", help="new folder for the checkpoint with the new head")
    return parser


def parse(arguments: list[str]) -> TrainConfig:
    """The options as those of a training run without random crops.

    Raises:
        UserError: an option does not exist here or has a wrong value, or --output_dir is in use.
    """
    options, others = build_parser().parse_known_args(arguments)
    if others:
        name = others[0].lstrip("-").split("=")[0]
        if name in OPTIONS:
            raise UserError(f"--{name} is an option of train.py: probe.py reads each image once and trains no weights")
        raise unknown(others[0], "command line", (*OF_TRAINING, "output_dir"))
    given = {"train_val_split": 0.2} | {
        name: convert(name, value) for name, value in vars(options).items() if name in OPTIONS and value is not None
    }
    fixed = {"random_resized_crop": 0.0, "cache_images": "off", "per_device_train_batch_size": 1}
    config = TrainConfig(model_name_or_path=options.checkpoint, **fixed, **given)
    if not config.train_val_split:
        raise UserError("--train_val_split: expected a fraction above 0, since probe.py needs images to evaluate on")
    if config.output_dir is not None:
        check_output_dir(config)
        if Path(config.output_dir).exists() and any(Path(config.output_dir).iterdir()):
            raise UserError(f"--output_dir: expected a new or empty folder, got {config.output_dir} with files in it")
    return config


def load(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """The dataset; a part of the training images is held out if there is no other split."""
    fraction, config.train_val_split = config.train_val_split, 0.0
    data = load_data(config, accelerator)
    if len(data.splits) == 1:
        config.train_val_split = fraction
        data = load_data(config, accelerator)
    require_classes(data.labels, "probe.py")
    return data


def save(
    config: TrainConfig,
    accelerator: Accelerator,
    data: ImageData,
    base: Checkpoint,
    model: ViTSimpleForImageClassification,
    processor: dict,
    facts: dict,
    results: dict[str, Evaluation],
):
    """Writes the complete checkpoint, with its model card, into --output_dir."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_result(model, model.state_dict(), folder)
    write_atomically(folder / PREPROCESSOR, json.dumps(processor, indent=2) + "\n")
    record_run(config, data, base, folder)
    record(folder, **facts)
    for split, result in results.items():
        log_metrics(accelerator, folder, 1, 0, split, weights="raw", **result.values)
    write_atomically(folder / "README.md", build_card(folder, license=config.license))
    print_saved(accelerator, folder)


def sentence(name: str, correct: int, count: int, split: str) -> str:
    low, high = confidence_interval(correct / count, count)
    share = f"{correct / count:.1%} (95% confidence interval: {low:.1%} to {high:.1%})"
    return f"{name:<20} {correct} of {count} {split} images correct: {share}"


@command_errors("probe.py")
def main(arguments: list[str] | None = None):
    config = parse(sys.argv[1:] if arguments is None else arguments)
    accelerator, start = build_accelerator(config), time.perf_counter()
    if accelerator.num_processes > 1:
        raise UserError(f"probe.py runs in one process, got {accelerator.num_processes}: start it with python")
    base, data = open_base(config), load(config, accelerator)
    for line in data.report:
        print(terminal_text(line))
    model = build_model(config, data.labels, data.channels, base)
    splits, processor = build_splits(config, data, pair(model.config.image_size), accelerator, base)
    print_setup(accelerator, splits, model, config.dataset_name, base)
    held_out = next(name for name in ("test", "validation") if name in splits)
    train, (features, classes) = (
        images_with_class(*cached_features(model, splits[name])) for name in ("train", held_out)
    )
    num_classes, (count, width) = len(data.labels.class_names), train[0].shape
    print(f"{count} train and {len(features)} {held_out} images: {width} features each")
    for k in sorted({min(k, count) for k in (10, 20)}):
        correct = (knn_votes(train, features, num_classes, k).argmax(-1) == classes).sum().item()
        print(sentence(f"k-NN, k = {k}", correct, len(classes), held_out))
    chosen = choose_strength(*train)
    strength = chosen or USUAL_STRENGTH
    head = fit_logistic(*train, num_classes, strength)
    metrics = METRICS_OF[data.labels.problem_type](data.labels, torch.device("cpu"), Fitted())
    metrics.update(head(features), classes)
    result = metrics.compute(accelerator)
    print(sentence("logistic regression", result.values["correct"], len(classes), held_out))
    reason = "chosen by cross-validation" if chosen else "since fewer than two classes have several training images"
    print(f"C = {strength:g}, {reason}; {time.perf_counter() - start:.0f} s")
    print_image_notes(accelerator, splits)
    if config.output_dir is not None:
        model.head.load_state_dict(head.state_dict())
        method = f"logistic regression (C = {strength:g}) on the features of the frozen backbone"
        facts = {"method": method, "changed_images": count_changed_images(splits)}
        save(config, accelerator, data, base, model, processor, facts, {held_out: result})


if __name__ == "__main__":
    main()
