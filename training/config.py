"""The options of a training run: their names, defaults and ranges, on the command line and in a recipe."""

import argparse
import difflib
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ..files import ROOT
from .optim import SCHEDULES

# What a number may be, in the words of the error.
COUNT = "at least 1"
AMOUNT = "a number that is not negative"
PART = "a number in [0, 1)"
CHANCE = "a number in [0, 1]"
SHARE = "a number above 0, at most 1"
DEGREES = "degrees in [0, 90)"
LEVEL = "a number in [0, 10]"
RANGES = {
    COUNT: lambda value: value >= 1,
    AMOUNT: lambda value: 0 <= value < math.inf,
    PART: lambda value: 0 <= value < 1,
    CHANCE: lambda value: 0 <= value <= 1,
    SHARE: lambda value: 0 < value <= 1,
    DEGREES: lambda value: 0 <= value < 90,
    LEVEL: lambda value: 0 <= value <= 10,
}


def option(group: str, default, expected: str | tuple | None, help: str):
    """A field of TrainConfig; `expected` is one of RANGES, or the words to choose from."""
    return field(default=default, metadata={"group": group, "expected": expected, "help": help})


@dataclass
class TrainConfig:
    """The options of a run. Raises ValueError for a value that cannot work."""

    dataset_name: str = option("data", "data/digits", None, "Hub id, folder or file; without it the digits recipe runs")
    streaming: bool = option("data", False, None, "read the data set when it is needed; it is never kept")
    shuffle_buffer_size: int = option("data", 1000, COUNT, "rows among which each reader of a stream shuffles")
    dataset_config_name: str | None = option("data", None, None, "configuration of the data set")
    dataset_revision: str | None = option("data", None, None, "branch, tag or commit of the data set on the Hub")
    image_column_name: str | None = option("data", None, None, "column of images or arrays; default: the only one")
    label_column_name: str | None = option("data", None, None, "column of classes or numbers; default: the only one")
    train_val_split: float = option("data", 0.1, PART, "part of train held out where there is no validation split")
    max_train_samples: int | None = option("data", None, COUNT, "at most so many training images, drawn by seed")
    max_eval_samples: int | None = option("data", None, COUNT, "at most so many images of each other split")
    on_bad_image: str = option("data", "error", ("error", "skip"), "what to do with an image that cannot be decoded")
    cache_images: str = option(
        "data", "auto", ("auto", "off"), "auto: keep splits of up to 4 GiB decoded, if never cropped"
    )
    dataloader_num_workers: int | None = option(
        "data", None, AMOUNT, "decoding processes; default: all cores; while a CPU trains none, one for a stream"
    )
    random_resized_crop: float | None = option(
        "data", None, CHANCE, "least part kept; 0: none; default: 0.08; none if kept and of equal size"
    )
    crop_pct: float | None = option(
        "data", None, SHARE, "evaluation's centre crop; default: 0.875 after random crops, else the whole image"
    )

    label_smoothing_factor: float = option("augmentation", 0.0, PART, "part of the target spread over all classes")
    crop_padding: int = option("augmentation", 0, AMOUNT, "pixels of padding, from which an image is then cropped")
    horizontal_flip: float = option("augmentation", 0.5, CHANCE, "probability")
    affine_degrees: float = option("augmentation", 0.0, DEGREES, "largest rotation")
    affine_translate: float = option("augmentation", 0.0, PART, "largest shift as a part of the image")
    affine_scale: float = option("augmentation", 0.0, PART, "largest change of size as a part of it")
    affine_shear: float = option("augmentation", 0.0, DEGREES, "largest shear")
    randaugment_num_ops: int = option("augmentation", 0, AMOUNT, "RandAugment's operations for each image")
    randaugment_magnitude: float = option("augmentation", 9.0, LEVEL, "their strength, 0 to 10")
    random_erasing: float = option("augmentation", 0.0, CHANCE, "probability that a rectangle becomes noise")
    mixup_alpha: float = option("augmentation", 0.0, AMOUNT, "mixup with shares from Beta(a, a); 0: none")
    cutmix_alpha: float = option("augmentation", 0.0, AMOUNT, "CutMix with shares from Beta(a, a); 0: none")

    model_name_or_path: str | None = option("network", None, None, "checkpoint to go on from; default: from scratch")
    variant: str | None = option("network", None, None, "size and patch size, as S/16; default: the recipe's or S/16")
    image_size: int | None = option("network", None, COUNT, "pixels on a side; default: the recipe's or 224")
    model: dict | None = option("network", None, None, "fields of ViTSimpleConfig as YAML; not beside the three above")
    drop_path_rate: float | None = option("network", None, PART, "of the last block; default: the network's")
    initialization: str = option(
        "network", "random", ("random", "mimetic"), "mimetic: attention starts as trained attention looks; from scratch"
    )
    freeze_backbone: bool = option("network", False, None, "train the head alone")
    gradient_checkpointing: bool = option("network", False, None, "less memory for more time")

    num_train_epochs: int = option("optimisation", 100, COUNT, "passes over the training images")
    max_steps: int | None = option("optimisation", None, COUNT, "steps in all, in place of epochs")
    per_device_train_batch_size: int = option("optimisation", 128, COUNT, "images in a batch of each process")
    gradient_accumulation_steps: int = option("optimisation", 1, COUNT, "batches in a step")
    per_device_eval_batch_size: int = option("optimisation", 256, COUNT, "images in an evaluation batch")
    optim: str = option("optimisation", "adamw", ("adamw", "muon"), "muon: Muon on the block matrices, AdamW elsewhere")
    learning_rate: float = option("optimisation", 1e-3, AMOUNT, "highest learning rate of AdamW")
    muon_learning_rate: float = option("optimisation", 0.02, AMOUNT, "highest learning rate of Muon")
    layer_decay: float = option("optimisation", 1.0, SHARE, "each layer's rate as a part of the next one's")
    class_weights: str | None = option("optimisation", None, ("balanced",), "balanced: all classes weigh the same")
    weight_decay: float = option("optimisation", 0.05, AMOUNT, "weight decay of kernels; nothing else decays")
    lr_scheduler_type: str = option("optimisation", "cosine", SCHEDULES, "how the rate goes on after the warm-up")
    warmup_steps: float = option("optimisation", 0.1, AMOUNT, "steps of rising rate; below 1: a part of all steps")
    decay_steps: float = option("optimisation", 0.2, AMOUNT, "steps of falling rate in warmup_stable_decay; as above")
    max_grad_norm: float = option("optimisation", 1.0, AMOUNT, "gradients are clipped to this norm; 0: not clipped")
    ema_decay: float | None = option("optimisation", None, PART, "average the weights, too; 0.999 suits 10,000 steps")

    output_dir: str | None = option("run", None, None, "new or empty folder; default: the next free outputs/NAME[-N]")
    resume_from_checkpoint: str | None = option("run", None, None, "latest, or the path of a checkpoint")
    save_steps: int = option("run", 500, COUNT, "steps between two checkpoints")
    save_total_limit: int = option("run", 2, COUNT, "checkpoints that are kept")
    eval_steps: int | None = option("run", None, COUNT, "steps between two evaluations; default: an epoch")
    logging_steps: int = option("run", 10, COUNT, "steps between two lines of metrics.jsonl")
    report_to: str | None = option("run", None, ("tensorboard", "wandb", "trackio"), "send the metrics there, too")
    eval_only: bool = option("run", False, None, "evaluate --model_name_or_path and leave no folder")
    mixed_precision: str | None = option(
        "run", None, ("no", "bf16"), "autocast in training; default: as accelerate launch says, else no"
    )
    torch_compile: bool = option("run", False, None, "compile the network")
    seed: int = option("run", 0, AMOUNT, "decides every random choice")

    push_to_hub: bool = option("hub", False, None, "push the folder, and load it from there, at the end")
    hub_model_id: str | None = option("hub", None, None, "USER/NAME, made where it is new")
    hub_strategy: str = option("hub", "end", ("end", "every_save"), "every_save: push at each checkpoint, too")
    hub_private_repo: bool = option("hub", False, None, "make the repository for you alone, or expect that it is")
    license: str | None = option("hub", None, None, "for the card; default: the base model's")

    def __post_init__(self):
        for name, item in OPTIONS.items():
            value, expected = getattr(self, name), item.metadata["expected"]
            if value is None or expected is None:
                continue
            if isinstance(expected, tuple) and value not in expected:
                raise ValueError(f"--{name}: expected {' or '.join(expected)}, got {value!r}")
            if isinstance(expected, str) and not RANGES[expected](value):
                raise ValueError(f"--{name}: expected {expected}, got {value!r}")
        if self.model is not None and (self.variant is not None or self.image_size is not None):
            raise ValueError("--variant and --image_size: expected neither beside a model mapping, which sets both")
        if self.streaming and (self.max_train_samples is not None or self.max_eval_samples is not None):
            raise ValueError("--max_train_samples and --max_eval_samples: expected neither beside --streaming")
        scratch = [name for name in ("variant", "image_size", "model") if getattr(self, name) is not None]
        if self.model_name_or_path is not None and scratch:
            raise ValueError(f"--model_name_or_path: expected no --{scratch[0]} beside it, the checkpoint has its own")
        if self.model_name_or_path is not None and self.initialization != "random":
            raise ValueError("--initialization cannot be combined with --model_name_or_path, which has its weights")
        if self.model_name_or_path is not None and self.crop_pct is not None:
            raise ValueError("--crop_pct: expected none beside --model_name_or_path, which has its own image processor")
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("--hub_model_id and --push_to_hub: expected both, or neither")
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            raise ValueError(f"--hub_model_id: expected USER/NAME, got {self.hub_model_id}")
        if self.eval_only and self.model_name_or_path is None:
            raise ValueError("--eval_only: expected --model_name_or_path, the checkpoint to evaluate")

    def group(self, title: str) -> dict:
        return {name: getattr(self, name) for name, item in OPTIONS.items() if item.metadata["group"] == title}


OPTIONS = {option.name: option for option in fields(TrainConfig)}


def convert(name: str, value):
    """A value from the command line or a recipe in the type of its option; YAML reads 1e-3 as a string.

    Raises:
        ValueError: names the option, its type and what was got.
    """
    kind = OPTIONS[name].type
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if name == "mixed_precision" and value is False:
        return "no"  # which YAML reads as a boolean
    if name == "cache_images" and value is False:
        return "off"  # that, too
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is dict:
            return dict(yaml.safe_load(value) if isinstance(value, str) else value)
        return kind(str(value))
    except (KeyError, ValueError, TypeError, yaml.YAMLError):
        expected = "true or false" if kind is bool else kind.__name__
        raise ValueError(f"--{name}: expected {expected}, got {value!r}") from None


def unknown(name: str, source: str, known) -> ValueError:
    near = difflib.get_close_matches(str(name).lstrip("-"), known, 1)
    return ValueError(f"{source}: {name!r} is not known" + (f", did you mean {near[0]!r}?" if near else ""))


def build_parser(description: str) -> argparse.ArgumentParser:
    usage = "train.py [recipe.yaml] [--option value ...]"
    parser = argparse.ArgumentParser("train.py", usage, description, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("recipe", nargs="?", help="a YAML file of options, which the command line overrides")
    groups = {}
    for name, item in OPTIONS.items():
        title, expected = item.metadata["group"], item.metadata["expected"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        text = item.metadata["help"] + ("" if item.default is None else f" ({item.default})")
        choices = {"metavar": "|".join(expected) if isinstance(expected, tuple) else name.rsplit("_", 1)[-1].upper()}
        if item.type is bool:
            choices = {"nargs": "?", "const": "true", "metavar": "true|false"}
        groups[title].add_argument(f"--{name}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **choices)
    return parser


def parse_config(arguments: list[str], description: str = "") -> TrainConfig:
    """The command line over the recipe over the defaults.

    Raises:
        ValueError: an option or a key of the recipe that does not exist, a value that does not fit, no such recipe.
    """
    try:
        given, extra = build_parser(description).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    if extra:
        raise unknown(extra[0].split("=")[0], "command line", OPTIONS)
    given = vars(given)
    path = given.pop("recipe")
    if path is None and "dataset_name" not in given:
        path = ROOT / "recipes/digits.yaml"
    recipe = {}
    if path is not None:
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"recipe: {path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"recipe: expected a mapping of options in {path}, got {type(recipe).__name__}")
    network = {"variant", "image_size", "model", "model_name_or_path"}
    if network & set(given):  # the command line's network replaces the recipe's
        recipe = {name: value for name, value in recipe.items() if name not in network}
    for name in recipe:
        if name not in OPTIONS:
            raise unknown(name, str(path), OPTIONS)
    return TrainConfig(**{name: convert(name, value) for name, value in {**recipe, **given}.items()})
