"""What a run needs before its first step: the dataset, the model, the image processor and the splits."""

import contextlib
import functools
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import cached_file

from ..configuration_vit_simple import OWN_FIELDS, ViTSimpleConfig, label_maps, pair
from ..data.dataloader import MapStyleSplit, fits_in_cache, have_equal_sizes, seed_for
from ..data.decoding import Decoder
from ..data.labels import REGRESSION, SINGLE, Labels
from ..data.loading import ImageData, load_image_data
from ..data.processors import open_processor, stock_processor
from ..data.streaming import StreamingSplit
from ..files import SAFETENSORS, UserError, check_weights, read_json
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .config import TrainConfig, unknown
from .devices import build_loader_context, on_main_process, require_memory
from .initialization import initialize_mimetic
from .step import compile_blocks


def load_data(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """The dataset that the options ask for.

    Raises:
        UserError: it cannot be loaded, or the options do not suit its labels or its size.
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
            on_main_process=functools.partial(on_main_process, accelerator),
        )
    problem = data.labels.problem_type
    if problem != SINGLE and config.label_smoothing_factor:
        raise UserError(f"--label_smoothing_factor needs one class per image, but the labels are {problem}")
    if problem == REGRESSION and config.class_weights:
        raise UserError("--class_weights needs classes, but the labels are numbers (regression)")
    images_per_batch = data.sizes["train"] // accelerator.num_processes // config.gradient_accumulation_steps
    if images_per_batch < config.per_device_train_batch_size and not config.eval_only:
        raise UserError(
            f"--per_device_train_batch_size: expected at most {images_per_batch}, so that the training images fill one "
            f"step, got {config.per_device_train_batch_size}"
        )
    return data


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


def build_model(config: TrainConfig, labels: Labels, channels: int = 3) -> ViTSimpleForImageClassification:
    """The model with initial weights drawn by the seed, or those of the checkpoint, with a new head for new labels.

    Raises:
        UserError: see `build_model_config`; the checkpoint cannot be read, has another model type or other channels or,
            for --eval_only, other labels.
    """
    torch.manual_seed(seed_for(config.seed, "weights"))
    if config.model_name_or_path is None:
        model_config = build_model_config(config, labels, channels)
        require_model_and_batch(config, model_config)
        model = ViTSimpleForImageClassification(model_config)
        if config.initialization == "mimetic":
            initialize_mimetic(model)
    else:
        model = load_model(config)
        require_model_and_batch(config, model.config)
        if model.config.num_channels != channels:
            raise UserError(
                f"--model_name_or_path: expected a checkpoint for {channels} channels, "
                f"got one for {model.config.num_channels}"
            )
        fit_head(model, labels, config.eval_only)
    if config.freeze_backbone:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
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
    count, padding = config.per_device_train_batch_size, config.crop_padding
    require_memory(
        count * model_config.num_channels * (height + 2 * padding) * (width + 2 * padding),
        f"--per_device_train_batch_size {count} with images of {height}x{width} pixels and --crop_padding {padding}",
    )


def load_model(config: TrainConfig) -> ViTSimpleForImageClassification:
    """The checkpoint in float32. Raises UserError if it cannot be read or has another model type."""
    path = config.model_name_or_path
    fields = {} if config.drop_path_rate is None else {"drop_path_rate": config.drop_path_rate}
    try:
        model_type = PretrainedConfig.get_config_dict(path)[0].get("model_type")
        if model_type != ViTSimpleConfig.model_type:
            raise UserError(f"expected the model type vit_simple, got {model_type}")
        model = ViTSimpleForImageClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **fields
        )
        folder = Path(cached_file(path, "config.json")).parent
        for file in (file for pattern in SAFETENSORS for file in folder.glob(pattern)):
            check_weights(file)
        return model
    except (OSError, ValueError, SafetensorError) as error:  # the config raises ValueError
        raise UserError(f"--model_name_or_path: {path} cannot be read: {error}") from error


def fit_head(model: ViTSimpleForImageClassification, labels: Labels, eval_only: bool):
    """Gives a checkpoint's model a new head, unless it already has these labels.

    Raises:
        UserError: a new head cannot be evaluated.
    """
    class_names, problem = list(model.config.id2label.values()), model.config.problem_type or SINGLE
    if class_names != labels.class_names or problem != labels.problem_type:
        if eval_only:
            raise UserError(
                f"--eval_only: expected the labels of the checkpoint, {class_names} for {problem}, "
                f"got {labels.class_names} for {labels.problem_type}"
            )
        model.config.update(label_fields(labels))
        model.head = torch.nn.Linear(model.head.in_features, len(labels.class_names))
        model._init_weights(model.head)
    elif labels.problem_type == REGRESSION:
        with torch.no_grad():  # the inverse of denormalize_head
            model.head.bias.sub_(labels.mean).div_(labels.std)
            model.head.weight.div_(labels.std)


def denormalize_head(weights: dict[str, torch.Tensor], labels: Labels) -> dict[str, torch.Tensor]:
    """The weights to save: the head of a regression, trained on normalized targets, then predicts the labels' unit."""
    if labels.problem_type != REGRESSION:
        return weights
    weight, bias = weights["head.weight"] * labels.std, weights["head.bias"] * labels.std + labels.mean
    return {**weights, "head.weight": weight, "head.bias": bias}


def processor_content(
    config: TrainConfig, image_size: tuple[int, int], cropped: bool, array_shape: tuple[int, int, int] | None = None
) -> dict:
    """The content of preprocessor_config.json: the checkpoint's, or a stock one that makes RGB values in [-1, 1].

    Images are resized to `image_size`; with --crop_pct, or if training crops at random (`cropped`), their short side is
    resized and the center is cropped. Arrays of shape (C, H, W) are only rescaled.

    Raises:
        UserError: the checkpoint has no image processor; --crop_pct does not suit the images.
    """
    if config.model_name_or_path is not None:
        try:
            file = cached_file(config.model_name_or_path, "preprocessor_config.json")
        except OSError as error:
            raise UserError(f"--model_name_or_path: it has no image processor: {error}") from error
        return read_json(Path(file))
    height, width = image_size
    if array_shape is not None and config.crop_pct is not None:
        raise UserError("--crop_pct cannot be combined with arrays, which are neither resized nor cropped")
    if height != width and config.crop_pct is not None:
        raise UserError(f"--crop_pct needs a square image_size, got {image_size}")
    if array_shape is not None:
        scale = {"image_mean": [0.5] * array_shape[0], "image_std": [0.5] * array_shape[0]}
        return stock_processor(image_size) | {"do_convert_rgb": False, "do_resize": False} | scale
    crops = height == width and (cropped or config.crop_pct is not None)
    return stock_processor(image_size, round(height / (config.crop_pct or 0.875)) if crops else None)


def build_splits(
    config: TrainConfig, data: ImageData, image_size: tuple[int, int], accelerator: Accelerator
) -> tuple[dict[str, MapStyleSplit | StreamingSplit], dict]:
    """The splits as pixels, decoded in memory if they are cached, and the content of preprocessor_config.json.

    Raises:
        UserError: see `processor_content`; the checkpoint's image processor or the arrays have another size.
        BadImage: an image cannot be decoded, with --on_bad_image error.
    """
    shape = (data.channels, *image_size)
    if data.array_shape is not None and data.array_shape[1:] != image_size:
        raise UserError(f"--image_size: expected {data.array_shape[1:]}, the size of the arrays, got {image_size}")
    min_area = config.random_resized_crop
    if min_area is None:
        min_area = default_crop_area(config, data, shape)
    content = processor_content(config, image_size, bool(min_area), data.array_shape)
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
        decode = Decoder(processor, shape, data.array_shape is not None, split_area, config.seed, data.sources)
        arguments = (data, name, decode, context, config.on_bad_image, config.seed)
        if config.streaming:
            splits[name] = StreamingSplit(*arguments, buffer_size=config.shuffle_buffer_size)
            continue
        splits[name] = split = MapStyleSplit(*arguments)
        if config.cache_images == "auto" and split_area == 0 and fits_in_cache(data.sizes[name], shape):
            split.cache(quiet=not accelerator.is_main_process)
    return splits, content


def default_crop_area(config: TrainConfig, data: ImageData, shape: tuple[int, int, int]) -> float:
    """The minimum area of random crops without --random_resized_crop; 0: no crops."""
    if config.eval_only or data.array_shape is not None:
        return 0.0
    is_cached = not config.streaming and fits_in_cache(data.sizes["train"], shape)
    return 0.0 if is_cached and have_equal_sizes(data) else 0.08
