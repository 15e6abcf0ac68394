"""What a run needs before its first step: the network, the image processor and the pixels."""

import contextlib
import importlib.util
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers import AutoImageProcessor, BaseImageProcessor, PretrainedConfig
from transformers.utils import cached_file

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import OWN_FIELDS
from vit_simple.data import ImageData, Images, equal_sizes, fits, seed_for
from vit_simple.options import TrainConfig, unknown


def precision_of(config: TrainConfig) -> str:
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ValueError for a tracker that is not installed, a precision that is no option, and what FSDP cannot do."""
    if precision_of(config) not in ("no", "bf16"):
        raise ValueError(f"--mixed_precision: expected no or bf16, got {precision_of(config)} from accelerate launch")
    if config.report_to and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"--report_to: expected {config.report_to} to be installed: pip install {config.report_to}")
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


def check_batch_size(config: TrainConfig, images: int, processes: int):
    """Raises ValueError where the training images do not fill one step."""
    most = images // processes // config.gradient_accumulation_steps
    if most < config.per_device_train_batch_size and not config.eval_only:
        raise ValueError(
            f"--per_device_train_batch_size: expected at most {most}, a batch's share of the training images, "
            f"got {config.per_device_train_batch_size}"
        )


def build_model_config(config: TrainConfig, class_names: list[str]) -> ViTSimpleConfig:
    """The network that the options ask for, with the classes of the data.

    Raises:
        ValueError: a field of the model mapping that ViTSimpleConfig lacks or refuses, or that is not for RGB.
    """
    fields = dict(config.model or {})
    for name, value in fields.items():
        if name not in OWN_FIELDS:
            raise unknown(name, "--model", OWN_FIELDS)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                fields[name] = float(value)  # YAML reads 1e-5 as a string
    if fields.get("num_channels", 3) != 3:
        raise ValueError(
            f"--model: expected num_channels 3, since every image becomes RGB, got {fields['num_channels']}"
        )
    fields["id2label"] = dict(enumerate(class_names))
    fields["label2id"] = {name: index for index, name in enumerate(class_names)}
    if config.drop_path_rate is not None:
        fields["drop_path_rate"] = config.drop_path_rate
    if config.model is not None:
        return ViTSimpleConfig(**fields)
    variant = "S/16" if config.variant is None else config.variant
    return ViTSimpleConfig.from_variant(variant, image_size=config.image_size or 224, **fields)


def build_network(config: TrainConfig, class_names: list[str]) -> ViTSimpleForImageClassification:
    """The network with its first weights: drawn by seed, or those of the checkpoint, with a new head for new classes.

    Raises:
        ValueError: as `build_model_config`; the checkpoint cannot be read or is of another model type.
    """
    torch.manual_seed(seed_for(config.seed, "weights"))
    path = config.model_name_or_path
    if path is None:
        network = ViTSimpleForImageClassification(build_model_config(config, class_names))
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
        if list(network.config.id2label.values()) != class_names:
            if config.eval_only:
                raise ValueError(
                    f"--eval_only: expected the classes of the checkpoint, {list(network.config.id2label.values())}, "
                    f"got {class_names}"
                )
            network.config.id2label = dict(enumerate(class_names))
            network.config.label2id = {name: index for index, name in enumerate(class_names)}
            network.head = torch.nn.Linear(network.head.in_features, len(class_names))
            network._init_weights(network.head)
    if config.freeze_backbone:
        network.requires_grad_(False)
        network.head.requires_grad_(True)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    if config.torch_compile:
        network.compile()
    return network


def processor_content(config: TrainConfig, image_size: tuple[int, int], cropped: bool) -> dict:
    """preprocessor_config.json: the checkpoint's, or a stock one that makes RGB of the size, scaled to [-1, 1].

    Images come to their size as a whole or, where `crop_pct` is given or training crops, by the short side and a crop.
    """
    if config.model_name_or_path is not None:
        try:
            file = cached_file(config.model_name_or_path, "preprocessor_config.json")
        except OSError as error:
            raise ValueError(f"--model_name_or_path: expected an image processor there: {error}") from error
        return json.loads(Path(file).read_text(encoding="utf-8"))
    height, width = image_size
    if height != width and config.crop_pct is not None:
        raise ValueError(f"--crop_pct: expected a square image_size, got {image_size}")
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    if height == width and (cropped or config.crop_pct is not None):
        content = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": round(height / (config.crop_pct or 0.875))},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return content | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def open_processor(content: dict) -> BaseImageProcessor:
    """The processor that a preprocessor_config.json stands for."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def build_images(
    config: TrainConfig, data: ImageData, image_size: tuple[int, int], accelerator: Accelerator
) -> tuple[dict[str, Images], dict]:
    """The splits as pixels, decoded already where they are kept, and the content of preprocessor_config.json.

    Raises:
        ValueError: the checkpoint's processor is missing or makes another size than its network takes.
        BadImage: an image that cannot be decoded, with `on_bad_image` "error".
    """
    crop, rows = config.random_resized_crop, data.splits["train"]
    if crop is None and not config.eval_only:
        crop = 0.0 if fits(len(rows), image_size) and equal_sizes(rows, data.image_column) else 0.08
    content = processor_content(config, image_size, bool(crop))
    processor = open_processor(content)
    made = processor(PIL.Image.new("RGB", (300, 200)), return_tensors="pt").pixel_values.shape[2:]
    if tuple(made) != image_size:
        raise ValueError(f"--model_name_or_path: expected a processor that makes {image_size}, got {tuple(made)}")
    images = {}
    for split in data.splits:
        if split == "train" and config.eval_only:
            continue
        area = crop if split == "train" else 0.0
        images[split] = Images(data, split, processor, image_size, area, config.on_bad_image, config.seed)
        if config.cache_images == "auto" and area == 0 and fits(len(data.splits[split]), image_size):
            images[split].keep(accelerator.device, workers_for(config, accelerator), not accelerator.is_main_process)
    return images, content


def workers_for(config: TrainConfig, accelerator: Accelerator) -> int:
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if accelerator.device.type == "cpu" else min(cores // local, 16)
