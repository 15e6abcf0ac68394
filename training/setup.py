"""What a run needs before its first step: the network, the image processor and the pixels."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from transformers import PretrainedConfig
from transformers.utils import cached_file

from ..configuration_vit_simple import OWN_FIELDS, ViTSimpleConfig
from ..data.dataloader import LoaderContext, MapStyleSplit, fits_in_cache, have_equal_sizes, seed_for
from ..data.decoding import Decoder
from ..data.labels import REGRESSION, SINGLE, Labels
from ..data.loading import ImageData
from ..data.processors import open_processor, stock_processor
from ..data.streaming import StreamingSplit
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .config import TrainConfig, unknown
from .initialization import initialize_mimetic
from .step import compile_blocks


def mixed_precision_of(config: TrainConfig) -> str:
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The devices and the group of processes.

    Raises:
        ValueError: a tracker that is not installed, a precision that is no option, a launcher that makes no group, what
            FSDP cannot do.
    """
    if mixed_precision_of(config) not in ("no", "bf16"):
        raise ValueError(
            f"--mixed_precision: expected no or bf16, got {mixed_precision_of(config)} from accelerate launch"
        )
    if config.report_to and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"--report_to: expected {config.report_to} to be installed: pip install {config.report_to}")
    alone = os.environ.get("ACCELERATE_USE_CPU") == "True" and "WORLD_SIZE" not in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        raise ValueError("accelerate launch --cpu: expected one process, several of its do not meet; use torchrun")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright: torchrun on a CPU makes no group otherwise
        mixed_precision="no",  # train.py has its own autocast, around the training step alone
        log_with=config.report_to,
        project_dir=".",  # asked for by some trackers; it becomes the run's folder, once that is known
        # The others wait while one prepares a large data set.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        for name, used in (
            ("optim muon", config.optim == "muon"),
            ("ema_decay", config.ema_decay is not None),
            ("eval_only", config.eval_only),
        ):
            if used:
                raise ValueError(f"--{name}: expected a run without it under FSDP, which splits every parameter")
    return accelerator


def check_labels(config: TrainConfig, labels: Labels):
    """Raises ValueError for options that these labels have no use for."""
    if labels.problem_type != SINGLE and config.label_smoothing_factor:
        raise ValueError(f"--label_smoothing_factor: expected 0 for {labels.problem_type}, it is for single labels")
    if labels.kind == "number" and config.class_weights:
        raise ValueError("--class_weights: expected none for a regression, which has no classes")


def check_batch_size(config: TrainConfig, images: int, processes: int):
    """Raises ValueError where the training images do not fill one step."""
    most = images // processes // config.gradient_accumulation_steps
    if most < config.per_device_train_batch_size and not config.eval_only:
        raise ValueError(
            f"--per_device_train_batch_size: expected at most {most}, a batch's share of the training images, "
            f"got {config.per_device_train_batch_size}"
        )


def label_fields(labels: Labels) -> dict:
    """The labels as a config has them: names in the order of the outputs, and what kind of problem it is."""
    return {
        "id2label": dict(enumerate(labels.class_names)),
        "label2id": {name: index for index, name in enumerate(labels.class_names)},
        "problem_type": None if labels.problem_type == SINGLE else labels.problem_type,
    }


def build_model_config(config: TrainConfig, labels: Labels, channels: int = 3) -> ViTSimpleConfig:
    """The network that the options ask for, with the channels and the labels of the data.

    Raises:
        ValueError: a field of the model mapping that ViTSimpleConfig lacks or refuses, or other channels.
    """
    fields = dict(config.model or {})
    for name, value in fields.items():
        if name not in OWN_FIELDS:
            raise unknown(name, "--model", OWN_FIELDS)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                fields[name] = float(value)  # YAML reads 1e-5 as a string
    if fields.get("num_channels", channels) != channels:
        reason = "since every image becomes RGB" if channels == 3 else "as the arrays have"
        raise ValueError(f"--model: expected num_channels {channels}, {reason}, got {fields['num_channels']}")
    fields |= {"num_channels": channels, **label_fields(labels)}
    if config.drop_path_rate is not None:
        fields["drop_path_rate"] = config.drop_path_rate
    if config.model is not None:
        return ViTSimpleConfig(**fields)
    variant = "S/16" if config.variant is None else config.variant
    return ViTSimpleConfig.from_variant(variant, image_size=config.image_size or 224, **fields)


def build_model(config: TrainConfig, labels: Labels, channels: int = 3) -> ViTSimpleForImageClassification:
    """The network with its first weights: drawn by seed, or those of the checkpoint, with a new head for new labels.

    Raises:
        ValueError: as `build_model_config`; the checkpoint cannot be read or is of another model type, or, to be
            evaluated, has other labels.
    """
    torch.manual_seed(seed_for(config.seed, "weights"))
    path = config.model_name_or_path
    if path is None:
        network = ViTSimpleForImageClassification(build_model_config(config, labels, channels))
        if config.initialization == "mimetic":
            initialize_mimetic(network)
    else:
        try:
            kind = PretrainedConfig.get_config_dict(path)[0].get("model_type")
            if kind != ViTSimpleConfig.model_type:
                raise ValueError(
                    f"--model_name_or_path: expected a checkpoint of vit_simple, got one of {kind} in {path}"
                )
            fields = {} if config.drop_path_rate is None else {"drop_path_rate": config.drop_path_rate}
            network = ViTSimpleForImageClassification.from_pretrained(path, dtype=torch.float32, **fields)
        except OSError as error:
            raise ValueError(f"--model_name_or_path: {path} cannot be read: {error}") from error
        if network.config.num_channels != channels:
            raise ValueError(
                f"--model_name_or_path: expected a checkpoint for {channels} channels, "
                f"got one for {network.config.num_channels}"
            )
        fields, class_names = label_fields(labels), list(network.config.id2label.values())
        same_problem = (network.config.problem_type or SINGLE) == labels.problem_type
        if class_names != labels.class_names or not same_problem:
            if config.eval_only:
                raise ValueError(
                    f"--eval_only: expected the labels of the checkpoint, {class_names} for "
                    f"{network.config.problem_type or SINGLE}, got {labels.class_names} for "
                    f"{labels.problem_type}"
                )
            network.config.update(fields)
            network.head = torch.nn.Linear(network.head.in_features, len(labels.class_names))
            network._init_weights(network.head)
        elif labels.problem_type == REGRESSION:
            with torch.no_grad():  # the inverse of denormalize_head
                network.head.bias.sub_(labels.mean).div_(labels.std)
                network.head.weight.div_(labels.std)
    if config.freeze_backbone:
        network.requires_grad_(False)
        network.head.requires_grad_(True)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    if config.torch_compile:
        compile_blocks(network)
    return network


def denormalize_head(weights: dict[str, torch.Tensor], labels: Labels) -> dict[str, torch.Tensor]:
    """The weights as they are saved: a head that was trained in standard deviations from the mean gives numbers."""
    if labels.problem_type != REGRESSION:
        return weights
    weight, bias = weights["head.weight"] * labels.std, weights["head.bias"] * labels.std + labels.mean
    return {**weights, "head.weight": weight, "head.bias": bias}


def processor_content(
    config: TrainConfig, image_size: tuple[int, int], cropped: bool, array_shape: tuple[int, int, int] | None = None
) -> dict:
    """preprocessor_config.json: the checkpoint's, or a stock one that makes RGB of the size, scaled to [-1, 1].

    Images come to their size as a whole or, where `crop_pct` is given or training crops, by the short side and a crop.
    Arrays (C, H, W) have their size and are scaled alone.

    Raises:
        ValueError: the checkpoint has none; `crop_pct` beside images that are not square or beside arrays.
    """
    if config.model_name_or_path is not None:
        try:
            file = cached_file(config.model_name_or_path, "preprocessor_config.json")
        except OSError as error:
            raise ValueError(f"--model_name_or_path: expected an image processor there: {error}") from error
        return json.loads(Path(file).read_text(encoding="utf-8"))
    height, width = image_size
    if array_shape is not None and config.crop_pct is not None:
        raise ValueError(f"--crop_pct: expected none for arrays, which are taken as they are, got {config.crop_pct}")
    if height != width and config.crop_pct is not None:
        raise ValueError(f"--crop_pct: expected a square image_size, got {image_size}")
    if array_shape is not None:
        scale = {"image_mean": [0.5] * array_shape[0], "image_std": [0.5] * array_shape[0]}
        return stock_processor(image_size) | {"do_convert_rgb": False, "do_resize": False} | scale
    crops = height == width and (cropped or config.crop_pct is not None)
    return stock_processor(image_size, round(height / (config.crop_pct or 0.875)) if crops else None)


def build_splits(
    config: TrainConfig, data: ImageData, image_size: tuple[int, int], accelerator: Accelerator
) -> tuple[dict[str, MapStyleSplit | StreamingSplit], dict]:
    """The splits as pixels, decoded already where they are kept, and the content of preprocessor_config.json.

    Raises:
        ValueError: as `processor_content`; the checkpoint's processor makes, or the arrays have, another size than the
            network takes.
        BadImage: an image that cannot be decoded, with `on_bad_image` "error".
    """
    crop, rows, shape = config.random_resized_crop, data.splits["train"], (data.channels, *image_size)
    if data.array_shape is not None:
        crop = crop or 0.0
        if data.array_shape[1:] != image_size:
            raise ValueError(f"--image_size: expected {data.array_shape[1:]}, the size of the arrays, got {image_size}")
    if crop is None and not config.eval_only:
        kept = not config.streaming and fits_in_cache(data.sizes["train"], shape)
        crop = 0.0 if kept and have_equal_sizes(rows, data.image_column) else 0.08
    content = processor_content(config, image_size, bool(crop), data.array_shape)
    processor = open_processor(content)
    if data.array_shape is None:
        made = processor(PIL.Image.new("RGB", (300, 200)), return_tensors="pt").pixel_values.shape[2:]
        if tuple(made) != image_size:
            raise ValueError(f"--model_name_or_path: expected a processor that makes {image_size}, got {tuple(made)}")
    process = build_loader_context(config, accelerator)
    found = {}
    for split in data.splits:
        if split == "train" and config.eval_only:
            continue
        area = crop if split == "train" else 0.0
        decode = Decoder(processor, shape, data.array_shape is not None, area, config.seed)
        given = (data, split, decode, process, config.on_bad_image, config.seed)
        if config.streaming:
            found[split] = StreamingSplit(*given, buffer_size=config.shuffle_buffer_size)
        else:
            found[split] = MapStyleSplit(*given)
            if config.cache_images == "auto" and area == 0 and fits_in_cache(data.sizes[split], shape):
                found[split].cache(quiet=not accelerator.is_main_process)
    return found, content


def on_main_process(accelerator: Accelerator, make: Callable):
    """What the main process makes, in every process."""
    return broadcast_object_list([make() if accelerator.is_main_process else None])[0]


def build_loader_context(config: TrainConfig, accelerator: Accelerator) -> LoaderContext:
    """This process. It decodes with a process for each core before the training; beside it, too, on accelerators, and
    on a CPU, which then trains, with one to read a stream."""
    workers = workers_before = config.dataloader_num_workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers_before = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16)
        workers = int(config.streaming) if accelerator.device.type == "cpu" else workers_before
    rank, world = accelerator.process_index, accelerator.num_processes
    return LoaderContext(accelerator.device, workers, rank, world, workers_before)
