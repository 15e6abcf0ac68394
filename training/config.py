"""The options of a training run: names, defaults and ranges, on the command line and in a recipe."""

import argparse
import difflib
import re
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ..data.labels import MULTI, REGRESSION, SINGLE
from ..files import ROOT, UserError
from .optim import SCHEDULES

UNDECIDED = (  # options that follow from the images and the model: see `fine_tuning_options`
    *("num_train_epochs", "per_device_train_batch_size", "learning_rate", "layer_decay"),
    *("random_resized_crop", "horizontal_flip"),
)
COUNT = "[1, inf)"
AMOUNT = "[0, inf)"
MAX_YAML_DEPTH = 10
MISREAD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")  # numbers in base 8 or 60


def option(group: str, default, allowed: str | tuple | None, help: str):
    """A field of TrainConfig; `allowed` is an interval, such as "[0, 1)", or a tuple of choices."""
    return field(default=default, metadata={"group": group, "allowed": allowed, "help": help})


@dataclass
class TrainConfig:
    """The options of a run.

    Raises:
        UserError: a value is out of range, or options conflict.

    Attributes:
        undecided: names of options whose values follow from the images and the model.
    """

    undecided = tuple[str, ...]()

    dataset_name: str = option(
        "data",
        "data/digits",
        None,
        "Hub id, folder, or parquet, arrow or tar file; without it and without a recipe, recipes/digits.yaml runs",
    )
    dataset_config_name: str | None = option("data", None, None, "configuration of the dataset")
    dataset_revision: str | None = option("data", None, None, "branch, tag or commit of the dataset on the Hub")
    image_column_name: str | None = option(
        "data", None, None, "column with images or uint8 arrays (default: the only such column)"
    )
    label_column_name: str | None = option(
        "data", None, None, "column with classes, lists of classes, or numbers (default: the only such column)"
    )
    problem_type: str | None = option(
        "data",
        None,
        (SINGLE, MULTI, REGRESSION),
        "what the labels are (default: integers and words are classes, floats are numbers)",
    )
    on_missing_label: str = option(
        "data", "error", ("error", "skip"), "stop at rows without a label, or leave them out"
    )
    train_val_split: float = option("data", 0.1, "[0, 1)", "fraction of train held out if there is no validation split")
    max_train_samples: int | None = option("data", None, COUNT, "train on a random subset of this size")
    max_eval_samples: int | None = option("data", None, COUNT, "evaluate on random subsets of this size")
    random_resized_crop: float | None = option(
        "data",
        None,
        "[0, 1]",
        "smallest crop, as a fraction of the image area; 0 disables (default: 0.08, or 0 if all training images have "
        "the same size and fit in the cache)",
    )
    resize: str = option(
        "data",
        "auto",
        ("auto", "fit"),
        "fit: show the whole image, padded in black to the model's size, in training and evaluation; auto: crop it, or "
        "change its proportions, unless the checkpoint was trained with fit",
    )
    crop_pct: float | None = option(
        "data",
        None,
        "(0, 1]",
        "fraction of the short side kept in evaluation (default: the checkpoint's; from scratch 0.875 with random "
        "crops, otherwise 1)",
    )
    streaming: bool = option("data", False, None, "stream the dataset instead of downloading it")
    shuffle_buffer_size: int = option("data", 1000, COUNT, "shuffle buffer of each streaming worker, in rows")
    cache_images: str = option(
        "data",
        "auto",
        ("auto", "off"),
        "auto: keep a split decoded on the device if it fits in 4 GiB and is not randomly cropped",
    )
    dataloader_num_workers: int | None = option(
        "data",
        None,
        AMOUNT,
        "decoding workers per training process (default: on a GPU, an equal share of the CPU cores, up to 16; on a CPU "
        "0, or 1 with --streaming)",
    )
    on_bad_image: str = option(
        "data", "error", ("error", "skip"), "stop at an image that cannot be decoded, or skip it"
    )
    bit_depth: int | None = option(
        "data", None, "[8, 16]", "bits of gray images with more than 8 (default: as the first training images show)"
    )

    variant: str | None = option("model", None, None, "model size and patch size, such as Ti/16 (default: S/16)")
    image_size: int | None = option(
        "model", None, COUNT, "image height and width in pixels (default: 224, or the checkpoint's)"
    )
    model: dict | None = option(
        "model", None, None, "ViTSimpleConfig fields as YAML, instead of --variant and --image_size"
    )
    model_name_or_path: str | None = option(
        "model",
        None,
        None,
        "checkpoint to fine-tune or evaluate: a folder, file or Hub id, of vit_simple, timm or transformers; without a "
        "recipe, six other defaults follow, see docs/fine_tuning.md (default: train from scratch)",
    )
    conversion: dict | None = option(
        "model", None, None, "options of convert_checkpoint.py as YAML, for what that checkpoint does not state"
    )
    initialization: str = option(
        "model",
        "random",
        ("random", "mimetic"),
        "mimetic: attention starts like that of trained models",
    )
    drop_path_rate: float | None = option(
        "model", None, "[0, 1)", "stochastic depth rate of the last block (default: 0, or the checkpoint's)"
    )
    freeze_backbone: bool = option("model", False, None, "train only the head")
    lora_rank: int | None = option(
        "model",
        None,
        COUNT,
        "train the head, and additions of this rank to the attention weights (LoRA, through peft)",
    )
    lora_save: str = option(
        "model",
        "merged",
        ("merged", "adapter"),
        "merged: save a plain checkpoint; adapter: save what LoRA trained, to be added to the checkpoint with peft",
    )
    gradient_checkpointing: bool = option("model", False, None, "recompute activations to save memory")

    num_train_epochs: int = option("optimization", 100, COUNT, "number of epochs")
    max_steps: int | None = option("optimization", None, COUNT, "number of optimizer steps, instead of epochs")
    per_device_train_batch_size: int | None = option(
        "optimization",
        None,
        COUNT,
        "images per batch and process (default: 128, or a quarter of fewer than 512 training images)",
    )
    gradient_accumulation_steps: int = option("optimization", 1, COUNT, "batches per optimizer step")
    per_device_eval_batch_size: int = option("optimization", 256, COUNT, "images per evaluation batch and process")
    learning_rate: float = option("optimization", 1e-3, AMOUNT, "peak learning rate of AdamW")
    weight_decay: float = option("optimization", 0.05, AMOUNT, "weight decay, applied to weight matrices only")
    optim: str = option(
        "optimization",
        "adamw",
        ("adamw", "muon"),
        "muon: Muon for the 2D weights of the transformer blocks, AdamW for the rest",
    )
    muon_learning_rate: float = option("optimization", 0.02, AMOUNT, "peak learning rate of Muon")
    lr_scheduler_type: str = option("optimization", "cosine", SCHEDULES, "learning rate schedule after the warmup")
    warmup_steps: float = option("optimization", 0.1, AMOUNT, "warmup steps, or a fraction of all steps if below 1")
    decay_steps: float = option(
        "optimization", 0.2, AMOUNT, "decay steps of warmup_stable_decay, or a fraction of all steps if below 1"
    )
    max_grad_norm: float = option("optimization", 1.0, AMOUNT, "gradient clipping norm; 0 disables")
    ema_decay: float | None = option(
        "optimization", None, "[0, 1)", "decay of an exponential moving average of the weights (default: no average)"
    )
    layer_decay: float = option(
        "optimization", 1.0, "(0, 1]", "learning rate factor per layer, from the head down; 1 disables"
    )
    class_weights: str | None = option(
        "optimization", None, ("balanced",), "balanced: weight the loss by inverse class frequency"
    )

    output_dir: str | None = option(
        "run", None, None, "folder of the run (default: outputs/DATASET, then outputs/DATASET-2, ...)"
    )
    resume_from_checkpoint: str | None = option(
        "run",
        None,
        None,
        "resume from 'latest' (in --output_dir) or from a checkpoints/step_N folder; options that affect the result "
        "must match the original run",
    )
    seed: int = option("run", 0, AMOUNT, "random seed")
    logging_steps: int = option("run", 10, COUNT, "log every N steps")
    eval_steps: int | None = option("run", None, COUNT, "evaluate every N steps (default: every epoch)")
    save_steps: int = option("run", 500, COUNT, "save a checkpoint every N steps")
    save_total_limit: int = option("run", 2, COUNT, "keep the last N checkpoints")
    report_to: str | None = option("run", None, ("tensorboard", "wandb", "trackio"), "also log to this tracker")
    probe: bool = option(
        "run",
        True,
        None,
        "begin a run from pretrained weights with a logistic regression on their features, and warn if the run ends "
        "below it",
    )
    eval_only: bool = option(
        "run", False, None, "only evaluate --model_name_or_path on the validation and test splits; write nothing"
    )
    mixed_precision: str | None = option(
        "run",
        None,
        ("no", "bf16"),
        "precision for training (default: the setting of `accelerate launch`, otherwise no)",
    )
    torch_compile: bool = option("run", False, None, "compile the model")
    calibrate: bool = option(
        "run",
        False,
        None,
        "divide the head of the exported weights by the temperature that is fitted on the validation split",
    )
    card_images: bool = option(
        "run",
        True,
        None,
        "show images of the dataset in the model card; false keeps them out of the folder",
    )

    horizontal_flip: float = option(
        "augmentation", 0.5, "[0, 1]", "probability of a horizontal flip; set to 0 for digits or text"
    )
    crop_padding: int = option("augmentation", 0, AMOUNT, "pad by this many pixels, then crop at random")
    randaugment_num_ops: int = option("augmentation", 0, AMOUNT, "RandAugment operations per image")
    randaugment_magnitude: float = option("augmentation", 9.0, "[0, 10]", "RandAugment magnitude")
    random_erasing: float = option("augmentation", 0.0, "[0, 1]", "probability of random erasing")
    mixup_alpha: float = option("augmentation", 0.0, AMOUNT, "mixup alpha; 0 disables")
    cutmix_alpha: float = option("augmentation", 0.0, AMOUNT, "CutMix alpha; 0 disables")
    label_smoothing_factor: float = option("augmentation", 0.0, "[0, 1)", "label smoothing; 0 disables")
    affine_degrees: float = option("augmentation", 0.0, "[0, 90)", "maximum rotation in degrees")
    affine_translate: float = option("augmentation", 0.0, "[0, 1)", "maximum shift, as a fraction of the image size")
    affine_scale: float = option("augmentation", 0.0, "[0, 1)", "scale by a random factor in [1 - X, 1 + X]")
    affine_shear: float = option("augmentation", 0.0, "[0, 90)", "maximum shear in degrees")

    push_to_hub: bool = option("hub", False, None, "push the result to the Hub and verify it")
    hub_model_id: str | None = option("hub", None, None, "repository, USER/NAME; created if needed")
    hub_strategy: str = option("hub", "end", ("end", "every_save"), "push at the end, or also at every checkpoint")
    hub_private_repo: bool = option("hub", False, None, "create the repository as private; fail if it is public")
    license: str | None = option(
        "hub",
        None,
        None,
        "license id, such as apache-2.0 (default: the base model's); required for a push if no license is known",
    )

    def __post_init__(self):
        for name, item in OPTIONS.items():
            value, allowed = getattr(self, name), item.metadata["allowed"]
            if value is None or allowed is None:
                continue
            if isinstance(allowed, tuple) and value not in allowed:
                raise UserError(f"--{name}: expected {' or '.join(allowed)}, got {value!r}")
            if isinstance(allowed, str) and not is_in(value, allowed):
                raise UserError(f"--{name}: expected a number in {allowed}, got {value!r}")
        if self.model is not None and (self.variant is not None or self.image_size is not None):
            raise UserError("--variant and --image_size cannot be combined with --model, which sets both")
        if self.streaming and (self.max_train_samples is not None or self.max_eval_samples is not None):
            raise UserError("--max_train_samples and --max_eval_samples cannot be combined with --streaming")
        if self.resize == "fit" and (self.random_resized_crop or self.crop_pct is not None):
            raise UserError(
                "--resize fit cannot be combined with --random_resized_crop and --crop_pct: nothing is cropped"
            )
        if self.model_name_or_path is not None:
            for name in ("variant", "model"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--{name} cannot be combined with --model_name_or_path: the checkpoint defines the "
                        "architecture; --image_size and --drop_path_rate can be changed"
                    )
            if self.initialization != "random":
                raise UserError(
                    "--initialization cannot be combined with --model_name_or_path: the checkpoint has its weights"
                )
        elif self.conversion is not None:
            raise UserError("--conversion needs --model_name_or_path, the checkpoint to convert")
        self.check_lora_options()
        if self.push_to_hub != (self.hub_model_id is not None):
            raise UserError("--push_to_hub and --hub_model_id must be given together")
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            raise UserError(f"--hub_model_id: expected USER/NAME, got {self.hub_model_id}")
        if self.eval_only and self.model_name_or_path is None:
            raise UserError("--eval_only needs --model_name_or_path, the checkpoint to evaluate")
        if self.eval_only and self.calibrate:
            raise UserError("--calibrate cannot be combined with --eval_only, which writes nothing")
        if self.eval_only and self.push_to_hub:
            raise UserError("--push_to_hub cannot be combined with --eval_only: push_to_hub.py pushes a checkpoint")

    def check_lora_options(self):
        """Raises UserError if the options of LoRA conflict with others."""
        if self.lora_rank is None:
            if self.lora_save != "merged":
                raise UserError("--lora_save needs --lora_rank")
            return
        if self.model_name_or_path is None:
            raise UserError("--lora_rank needs --model_name_or_path: LoRA adapts pretrained weights")
        if self.freeze_backbone:
            raise UserError("--lora_rank cannot be combined with --freeze_backbone: LoRA freezes it and adds to it")
        if self.optim == "muon":
            raise UserError("--lora_rank cannot be combined with --optim muon, which is made for whole weight matrices")
        if self.lora_save == "adapter" and self.push_to_hub:
            raise UserError(
                "--push_to_hub cannot be combined with --lora_save adapter: a push verifies a whole checkpoint; "
                "use --lora_save merged"
            )

    @property
    def adapter_base(self) -> str | None:
        """The checkpoint to which the saved adapter will be added, None if the result is a whole checkpoint."""
        return self.model_name_or_path if self.lora_save == "adapter" else None

    def group(self, title: str) -> dict:
        """The options of a group by name."""
        return {name: getattr(self, name) for name, item in OPTIONS.items() if item.metadata["group"] == title}

    @property
    def has_fixed_images(self) -> bool:
        """Whether no option of the group "augmentation" changes an image."""
        harmless = ("label_smoothing_factor", "randaugment_magnitude")
        return not any(value for name, value in self.group("augmentation").items() if name not in harmless)


OPTIONS = {option.name: option for option in fields(TrainConfig)}


def is_in(value: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    return low <= value <= high and (interval[0] == "[" or value > low) and (interval[-1] == "]" or value < high)


def value_type(name: str) -> typing.Any:
    """The type of an option's value, without None."""
    kind = OPTIONS[name].type
    return typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def convert(name: str, value):
    """Converts a value from the command line or a recipe to the type of its option. YAML reads 1e-3 as a string.

    Raises:
        UserError: the value does not fit the type.
    """
    kind = value_type(name)
    if value is None and kind is not OPTIONS[name].type:
        return None
    if value is False and name in ("mixed_precision", "cache_images"):
        return {"mixed_precision": "no", "cache_images": "off"}[name]  # YAML reads both words as False
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is dict:
            return dict(parse_yaml(value, f"--{name}") if isinstance(value, str) else value)
        return kind(str(value))
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, yaml.YAMLError):
        expected = {bool: "true or false", int: "an integer", float: "a number", dict: "a YAML mapping"}[kind]
        raise UserError(f"--{name}: expected {expected}, got {value!r}") from None


def parse_yaml(text: str, source: str):
    """The content of YAML in the few forms that options need. What YAML reads as another number is refused.

    Raises:
        UserError: it has an alias, which can stand for any amount of text, is nested deeply, or has a number such as
            010 (8, in base 8) or 3:44 (224, in base 60).
        yaml.YAMLError: it is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{source}: expected YAML without aliases, got *{event.anchor}")
        if depth > MAX_YAML_DEPTH:
            raise UserError(f"{source}: expected YAML that is nested at most {MAX_YAML_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and MISREAD_NUMBER.fullmatch(event.value):
            raise UserError(f"{source}: expected a decimal number without leading zeros, or quotes, got {event.value}")
    return yaml.safe_load(text)


def unknown(name: str, source: str, known) -> UserError:
    """The error for a name that does not exist; it suggests the nearest one."""
    near = difflib.get_close_matches(str(name).lstrip("-"), known, 1)
    return UserError(f"{source}: {name!r} is not known" + (f", did you mean {near[0]!r}?" if near else ""))


def build_parser(description: str) -> argparse.ArgumentParser:
    usage = "train.py [recipe.yaml] [--option value ...]"
    parser = argparse.ArgumentParser("train.py", usage, description, allow_abbrev=False, exit_on_error=False)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)
    parser.add_argument("recipe", nargs="?", help="YAML file of options; the command line overrides it")
    groups = {}
    for name, item in OPTIONS.items():
        title, allowed, kind = item.metadata["group"], item.metadata["allowed"], value_type(name)
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        text = item.metadata["help"]
        if item.default is not None and item.default is not False:
            text += f" (default: {'true' if kind is bool else item.default})"
        value = {int: "N", float: "X", dict: "YAML", bool: "true|false"}.get(kind, name.rsplit("_", 1)[-1].upper())
        options: dict[str, typing.Any] = {"metavar": "|".join(allowed) if isinstance(allowed, tuple) else value}
        if kind is bool:
            options |= {"nargs": "?", "const": "true"}
        groups[title].add_argument(f"--{name}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **options)
    return parser


def parse_config(arguments: list[str], description: str = "") -> TrainConfig:
    """Reads the options: the command line overrides the recipe, which overrides the defaults.

    Raises:
        UserError: an option does not exist or has a wrong value, or the recipe cannot be read.
    """
    try:
        given, extra = build_parser(description).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error}") from error
    if extra:
        raise unknown(extra[0].split("=")[0], "command line", OPTIONS)
    given = vars(given)
    path = given.pop("recipe")
    if path is None and "dataset_name" not in given:
        path = ROOT / "recipes/digits.yaml"
    recipe = read_recipe(Path(path)) if path is not None else {}
    replaced = set()  # the command line's model replaces the recipe's
    if {"variant", "model", "model_name_or_path"} & given.keys():
        replaced = {"variant", "image_size", "model", "model_name_or_path", "conversion"}
    elif "image_size" in given and isinstance(recipe.get("model"), dict):
        size = TrainConfig(image_size=convert("image_size", given.pop("image_size"))).image_size  # checks it
        given["model"] = {**recipe["model"], "image_size": size}
    recipe = {name: value for name, value in recipe.items() if name not in replaced}
    config = TrainConfig(**{name: convert(name, value) for name, value in {**recipe, **given}.items()})
    if path is None and config.model_name_or_path is not None:
        config.undecided = tuple(name for name in UNDECIDED if name not in given)
    return config


def read_recipe(path: Path) -> dict:
    """Raises UserError if the recipe is not a YAML mapping of options."""
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe: {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe: expected a mapping of options in {path}, got {type(recipe).__name__}")
    for name in recipe:
        if name not in OPTIONS:
            raise unknown(name, str(path), OPTIONS)
    return recipe
