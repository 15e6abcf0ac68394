"""What a run needs before its first step: the dataset, the model, the image processor and the splits."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator

from ..configuration_vit_simple import OWN_FIELDS, ViTSimpleConfig, label_maps, pair
from ..conversion.convert import Checkpoint
from ..data.dataloader import MapStyleSplit, find_bit_depth, fits_in_cache, have_equal_sizes, seed_for
from ..data.decoding import Decoder
from ..data.labels import REGRESSION, SINGLE, Labels
from ..data.loading import ImageData, load_image_data
from ..data.processors import open_processor, padding_fields, pads, side_before_crop, stock_processor
from ..data.streaming import StreamingSplit
from ..files import UserError, terminal_text
from ..inference.opening import trained_bit_depth
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .base import base_processor, load_base_model, open_base, summary
from .calibration import MIN_IMAGES
from .config import TrainConfig, unknown
from .defaults import with_fine_tuning_defaults
from .devices import build_loader_context, on_main_process, require_memory
from .initialization import initialize_mimetic
from .lora import add_lora, check_lora
from .step import compile_blocks

FEW_IMAGES = 1000  # with fewer, a model from scratch may learn next to nothing
DEFAULT_BATCH_SIZE = 128


def open_inputs(config: TrainConfig, accelerator: Accelerator) -> tuple[TrainConfig, ImageData, Checkpoint | None]:
    """The options with the defaults that follow from the dataset, the dataset, and the checkpoint to start from.

    Prints what should be known of the dataset.

    Raises:
        UserError: see `open_base`, `check_lora` and `load_data`; the options do not suit the size of the dataset.
    """
    with accelerator.local_main_process_first():  # which downloads it
        base = open_base(config)
    check_lora(config, base)
    data = load_data(config, accelerator)
    if not config.eval_only:
        if base is not None:
            config = with_resize_of(base, config, data)
            config = with_fine_tuning_defaults(config, data, base.config.hidden_size, accelerator.num_processes)
        config = fit_to_size(config, data, accelerator.num_processes)
    for line in data.report:
        accelerator.print(terminal_text(line))
    return config, data, base


def with_resize_of(base: Checkpoint, config: TrainConfig, data: ImageData) -> TrainConfig:
    """The options, with --resize fit if the checkpoint pads its images and neither options nor arrays prevent it."""
    asks_for_crops = config.random_resized_crop or config.crop_pct is not None
    if asks_for_crops or data.array_shape is not None or not pads(open_processor(base.processor)):
        return config
    padding = replace(config, resize="fit")
    padding.undecided = config.undecided
    return padding


def load_data(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """The dataset that the options ask for.

    Raises:
        UserError: it cannot be loaded, or the options do not suit its labels.
    """
    # One process prepares the dataset, then the others read it.
    with contextlib.nullcontext() if config.streaming else accelerator.local_main_process_first():
        data = load_image_data(
            config.dataset_name,
            config_name=config.dataset_config_name,
            revision=config.dataset_revision,
            image_column=config.image_column_name,
            label_column=config.label_column_name,
            validation_fraction=config.train_val_split,
            max_train_samples=config.max_train_samples,
            max_eval_samples=config.max_eval_samples,
            seed=config.seed,
            streaming=config.streaming,
            count_classes=config.class_weights is not None,
            problem_type=config.problem_type,
            on_missing_label=config.on_missing_label,
            on_main_process=functools.partial(on_main_process, accelerator),
        )
    problem = data.labels.problem_type
    if problem != SINGLE and config.label_smoothing_factor:
        raise UserError(f"--label_smoothing_factor needs one class per image, but the labels are {problem}")
    if problem == REGRESSION and config.class_weights:
        raise UserError("--class_weights needs classes, but the labels are numbers (regression)")
    if problem == REGRESSION and config.calibrate:
        raise UserError("--calibrate needs classes, but the labels are numbers (regression)")
    if config.calibrate and (count := data.sizes.get("validation", 0)) < MIN_IMAGES:
        raise UserError(f"--calibrate: expected at least {MIN_IMAGES} validation images, got {count}")
    found = find_bit_depth(data)
    data.bit_depth = config.bit_depth or (found and (evaluated_bit_depth(config) or found))
    if found is not None:
        data.report.append(
            f"gray images of {data.bit_depth} bits are scaled to 8 bits, while pipelines clip their values at 255; "
            "--bit_depth sets another number"
        )
    return data


def evaluated_bit_depth(config: TrainConfig) -> int | None:
    """The bit depth that a checkpoint was trained with, if this run evaluates it and it says so."""
    if not config.eval_only or Path(config.model_name_or_path).is_file():
        return None
    return trained_bit_depth(config.model_name_or_path)


def fit_to_size(config: TrainConfig, data: ImageData, num_processes: int) -> TrainConfig:
    """The options with a batch size that suits the number of training images, and a warning if they are few.

    Raises:
        UserError: the images do not fill one step.
    """
    count = data.sizes["train"]
    accumulation, batch_size = config.gradient_accumulation_steps, config.per_device_train_batch_size
    images_per_batch = count // num_processes // accumulation
    if not images_per_batch:
        raise UserError(
            f"--gradient_accumulation_steps: expected at most {count // num_processes}, because there are {count} "
            f"training images and {num_processes} processes, got {accumulation}"
        )
    if batch_size is None:
        batch_size = max(1, min(DEFAULT_BATCH_SIZE, images_per_batch // 4))
        if batch_size < DEFAULT_BATCH_SIZE:
            data.report.append(
                f"the batch size is {batch_size}, so that the {count} training images make at least four steps per "
                "epoch; --per_device_train_batch_size sets another"
            )
    if images_per_batch < batch_size:
        raise UserError(
            f"--per_device_train_batch_size: expected at most {images_per_batch}, so that the training images fill one "
            f"step, got {batch_size}"
        )
    if count < FEW_IMAGES and config.model_name_or_path is None:
        data.report.append(
            f"{count} training images are few for a model that starts from scratch: it may learn next to nothing; "
            "--model_name_or_path CHECKPOINT starts from pretrained weights"
        )
    return replace(config, per_device_train_batch_size=batch_size)


def label_fields(labels: Labels) -> dict:
    """The fields of a config that describe the labels."""
    return {
        **label_maps(labels.class_names),
        "problem_type": None if labels.problem_type == SINGLE else labels.problem_type,
    }


def build_model_config(config: TrainConfig, labels: Labels, channels: int = 3) -> ViTSimpleConfig:
    """The config that the options ask for, with the channels and the labels of the dataset.

    Raises:
        UserError: ViTSimpleConfig does not have or does not accept a field of --model or the variant.
    """
    fields = dict(config.model or {})
    for name, value in fields.items():
        if name not in OWN_FIELDS:
            raise unknown(name, "--model", OWN_FIELDS)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                fields[name] = float(value)  # YAML reads 1e-5 as a string
    if fields.get("num_channels", channels) != channels:
        reason = "because every image becomes RGB" if channels == 3 else "as in the arrays"
        raise UserError(f"--model: expected num_channels {channels}, {reason}, got {fields['num_channels']}")
    fields |= {"num_channels": channels, **label_fields(labels)}
    if config.drop_path_rate is not None:
        fields["drop_path_rate"] = config.drop_path_rate
    variant = "S/16" if config.variant is None else config.variant
    try:
        if config.model is not None:
            return ViTSimpleConfig(**fields)
        return ViTSimpleConfig.from_variant(variant, image_size=config.image_size or 224, **fields)
    except ValueError as error:
        raise UserError(str(error)) from error  # it begins with the name of the field


def build_model(
    config: TrainConfig, labels: Labels, channels: int = 3, base: Checkpoint | None = None
) -> ViTSimpleForImageClassification:
    """The model with initial weights drawn by the seed, or those of the checkpoint, with a new head for new labels.

    Args:
        base: the checkpoint; its report gets a line about what was taken, and its tensors are moved into the model.

    Raises:
        UserError: see `build_model_config`; the checkpoint has other channels or, for --eval_only, other labels.
    """
    torch.manual_seed(seed_for(config.seed, "weights"))
    if config.model_name_or_path is None:
        model_config = build_model_config(config, labels, channels)
        require_model_and_batch(config, model_config)
        model = ViTSimpleForImageClassification(model_config)
        if config.initialization == "mimetic":
            initialize_mimetic(model)
    else:
        has_head = "head.weight" in base.tensors
        model = load_base_model(base, config, channels)
        require_model_and_batch(config, model.config)
        head = fit_head(model, labels, config.eval_only, has_head)
        base.report.insert(0, summary(base, model, head))
    if config.freeze_backbone:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    if config.lora_rank is not None and not config.eval_only:
        add_lora(model, config.lora_rank)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # which works after frozen embeddings, too
    if config.torch_compile:
        compile_blocks(model)
    return model


def require_model_and_batch(config: TrainConfig, model_config: ViTSimpleConfig):
    """Raises UserError if the largest matrices of the model, and a batch of pixels with its padding, need more memory.

    It is a lower bound: training needs several times as much.
    """
    (height, width), (patch_height, patch_width) = pair(model_config.image_size), pair(model_config.patch_size)
    hidden, depth = model_config.hidden_size, model_config.num_hidden_layers
    positions = height // patch_height * (width // patch_width) * hidden
    blocks = depth * hidden * (4 * hidden + 2 * model_config.intermediate_size)
    require_memory(4 * (positions + blocks), f"a model of {depth} blocks of width {hidden} at {height}x{width} pixels")
    count, padding = config.per_device_train_batch_size or DEFAULT_BATCH_SIZE, config.crop_padding
    require_memory(
        count * model_config.num_channels * (height + 2 * padding) * (width + 2 * padding),
        f"--per_device_train_batch_size {count} with images of {height}x{width} pixels and --crop_padding {padding}",
    )


def fit_head(model: ViTSimpleForImageClassification, labels: Labels, eval_only: bool, has_head: bool = True) -> str:
    """Gives a checkpoint's model a new head, unless it already has these labels; returns what became of its head.

    Raises:
        UserError: a new head cannot be evaluated.
    """
    class_names, problem = list(model.config.id2label.values()), model.config.problem_type or SINGLE
    if eval_only and not has_head:
        raise UserError(
            "--eval_only: expected a checkpoint with a head for these labels, got one without a head: train it first"
        )
    numbered = class_names == [f"LABEL_{number}" for number in range(len(labels.class_names))]
    kept = "head kept"
    if eval_only and numbered and problem == labels.problem_type in (SINGLE, REGRESSION):
        model.config.update(label_fields(labels))
        class_names = labels.class_names
        kept = "head kept, whose outputs have no names: taken in the order of the dataset's"
    if not has_head or class_names != labels.class_names or problem != labels.problem_type:
        if eval_only:
            raise UserError(
                f"--eval_only: expected the labels of the checkpoint, {first(class_names)} for {problem}, "
                f"got {first(labels.class_names)} for {labels.problem_type}"
            )
        model.config.update(label_fields(labels))
        model.head = torch.nn.Linear(model.head.in_features, len(labels.class_names))
        model._init_weights(model.head)
        return "head dropped" if has_head else "no head"
    if labels.problem_type == REGRESSION:
        with torch.no_grad():  # the inverse of denormalize_head
            model.head.bias.sub_(labels.mean).div_(labels.std)
            model.head.weight.div_(labels.std)
    return kept


def first(names: list[str], limit: int = 20) -> str:
    return f"{names[:limit]}" + (f" and {len(names) - limit} more" if len(names) > limit else "")


def denormalize_head(weights: dict[str, torch.Tensor], labels: Labels) -> dict[str, torch.Tensor]:
    """The weights to save: the head of a regression, trained on normalized targets, then predicts the labels' unit."""
    if labels.problem_type != REGRESSION:
        return weights
    weight, bias = weights["head.weight"] * labels.std, weights["head.bias"] * labels.std + labels.mean
    return {**weights, "head.weight": weight, "head.bias": bias}


def processor_content(
    config: TrainConfig,
    image_size: tuple[int, int],
    cropped: bool,
    array_shape: tuple[int, int, int] | None = None,
    base: Checkpoint | None = None,
) -> dict:
    """The content of preprocessor_config.json: the checkpoint's, or a stock one that makes RGB values in [-1, 1].

    Images are resized to `image_size`; with --crop_pct, or if training crops at random (`cropped`), their short side is
    resized and the center is cropped; with --resize fit they are padded. Arrays of shape (C, H, W) are only rescaled.

    Raises:
        UserError: --crop_pct or --resize does not suit the images.
    """
    if array_shape is not None and (config.crop_pct is not None or config.resize == "fit"):
        raise UserError("--crop_pct and --resize fit cannot be combined with arrays, which are not resized")
    padding = padding_fields(image_size) if config.resize == "fit" else {}
    if base is not None:
        content = base_processor(base, image_size, config.crop_pct, padding)
        unchanged = {"do_convert_rgb": False, "do_resize": False, "do_center_crop": False}
        return content if array_shape is None else content | unchanged
    height, width = image_size
    if height != width and config.crop_pct is not None:
        raise UserError(f"--crop_pct needs a square image_size, got {image_size}")
    if array_shape is not None:
        scale = {"image_mean": [0.5] * array_shape[0], "image_std": [0.5] * array_shape[0]}
        return stock_processor(image_size) | {"do_convert_rgb": False, "do_resize": False} | scale
    crops = height == width and (cropped or config.crop_pct is not None)
    short = side_before_crop(height, config.crop_pct or 0.875) if crops else None
    return stock_processor(image_size, short) | padding


def build_splits(
    config: TrainConfig,
    data: ImageData,
    image_size: tuple[int, int],
    accelerator: Accelerator,
    base: Checkpoint | None = None,
) -> tuple[dict[str, MapStyleSplit | StreamingSplit], dict]:
    """The splits as pixels, decoded in memory if they are cached, and the content of preprocessor_config.json.

    Raises:
        UserError: see `processor_content`; the checkpoint's image processor or the arrays have another size; no split
            can be evaluated.
        BadImage: an image cannot be decoded, with --on_bad_image error.
    """
    shape = (data.channels, *image_size)
    if data.array_shape is not None and data.array_shape[1:] != image_size:
        raise UserError(f"--image_size: expected {data.array_shape[1:]}, the size of the arrays, got {image_size}")
    min_area = config.random_resized_crop
    if min_area is None:
        min_area = default_crop_area(config, data, shape)
    content = processor_content(config, image_size, bool(min_area), data.array_shape, base)
    processor = open_processor(content)
    if data.array_shape is None:
        made = processor(PIL.Image.new("RGB", (300, 200)), return_tensors="pt").pixel_values.shape[2:]
        if tuple(made) != image_size:
            raise UserError(
                f"--model_name_or_path: its image processor makes {tuple(made)}, its model takes {image_size}"
            )
    context = build_loader_context(config, accelerator)
    splits: dict[str, MapStyleSplit | StreamingSplit] = {}
    for name in data.splits:
        if name == "train" and config.eval_only:
            continue
        split_area = min_area if name == "train" else 0.0
        is_array, bit_depth = data.array_shape is not None, data.bit_depth or 16
        decode = Decoder(processor, shape, is_array, split_area, config.seed, data.sources, bit_depth)
        arguments = (data, name, decode, context, config.on_bad_image, config.seed)
        if config.streaming:
            splits[name] = StreamingSplit(*arguments, buffer_size=config.shuffle_buffer_size)
            continue
        splits[name] = split = MapStyleSplit(*arguments)
        if config.cache_images == "auto" and split_area == 0 and fits_in_cache(data.sizes[name], shape):
            split.cache(quiet=not accelerator.is_main_process)
    if not splits:
        raise UserError("--eval_only: expected a validation or test split with labels, got only 'train'")
    return splits, content


def default_crop_area(config: TrainConfig, data: ImageData, shape: tuple[int, int, int]) -> float:
    """The minimum area of random crops without --random_resized_crop; 0: no crops."""
    if config.eval_only or data.array_shape is not None or config.resize == "fit":
        return 0.0
    is_cached = not config.streaming and fits_in_cache(data.sizes["train"], shape)
    return 0.0 if is_cached and have_equal_sizes(data) else 0.08
