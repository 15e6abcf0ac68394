"""The checkpoint that a run starts from: one of ours, or one of timm or transformers, converted in memory."""

import torch

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..conversion.convert import OPTIONS, Checkpoint, open_checkpoint
from ..conversion.processors import FAMILIES, INTERPOLATIONS, fit_processor
from ..conversion.timm import HIDDEN_ACTS
from ..data.processors import side_before_crop, stock_processor
from ..files import UserError, check_types
from ..modeling_vit_simple import ViTSimpleForImageClassification, resize
from .config import TrainConfig, unknown


def open_base(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that --model_name_or_path names, None without that option.

    Raises:
        UserError: it cannot be read, or is not a plain ViT.
    """
    source, options = config.model_name_or_path, config.conversion or {}
    if source is None:
        return None
    for name in options:
        if name not in OPTIONS:
            raise unknown(name, "--conversion", list(OPTIONS))
    check_types(options, OPTIONS, "--conversion")
    for name, values in (("family", FAMILIES), ("interpolation", INTERPOLATIONS), ("hidden_act", HIDDEN_ACTS)):
        if options.get(name) not in (None, *values):
            raise UserError(f"--conversion: expected {name} to be one of {', '.join(values)}, got {options[name]}")
    try:
        return open_checkpoint(source, **options)
    except (UserError, OSError) as error:
        reason = str(error).removeprefix("SOURCE: ")
        named = [name for name in OPTIONS if f"--{name}" in reason and name not in options]
        hint = f"; train.py takes them as --conversion '{{{named[0]}: VALUE}}'" if named else ""
        raise UserError(f"--model_name_or_path: {source} cannot be read: {reason}{hint}") from error


def load_base_model(base: Checkpoint, config: TrainConfig, channels: int) -> ViTSimpleForImageClassification:
    """The model of the checkpoint in float32, at the size that the options ask for; a missing head is not initialized.

    Its tensors are moved out of `base`.

    Raises:
        UserError: the options do not suit the checkpoint.
    """
    if (taken := base.config.num_channels) != channels:
        reason = ", since image files become RGB" if channels == 3 else ", as in the arrays"
        images = "image files, which become RGB" if taken == 3 else f"uint8 arrays ({taken}, height, width)"
        raise UserError(
            f"--model_name_or_path: expected a checkpoint for {channels} channels{reason}, got one for {taken}; use "
            f"another checkpoint, change this one to num_channels={channels} (docs/conversion.md shows how), or store "
            f"the images as {images}"
        )
    stored = change(base.config, drop_path_rate=config.drop_path_rate)
    target = change(stored, image_size=config.image_size)
    stored.dtype = torch.float32
    with torch.device("meta"):
        model = ViTSimpleForImageClassification(stored)
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in base.tensors.items()}
    base.tensors.clear()  # a second copy of a large model takes gigabytes
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.head.weight.is_meta:
        model.head.to_empty(device="cpu")
    model.name_or_path = config.model_name_or_path
    resize(model, target)
    return model.eval()


def change(config: ViTSimpleConfig, **fields) -> ViTSimpleConfig:
    """A copy with other values for the fields that are not None. Raises UserError if they are not valid."""
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        changed = ViTSimpleConfig.from_dict(config.to_dict(), **fields)
        changed.check()
    except ValueError as error:
        raise UserError(str(error)) from error
    return changed


def base_processor(base: Checkpoint, image_size: tuple[int, int], crop_pct: float | None, padding: dict) -> dict:
    """The checkpoint's image processor for this size: with its mean, std and interpolation and, by default, its crop.

    Args:
        padding: see `padding_fields`; {} without padding.

    Raises:
        UserError: --crop_pct does not suit the size.
    """
    height, width = image_size
    content = base.processor
    if crop_pct is not None:
        if height != width:
            raise UserError(f"--crop_pct needs a square image_size, got {image_size}")
        crop = stock_processor(image_size, side_before_crop(height, crop_pct), content["resample"])
        content = content | {
            name: crop[name] for name in ("image_processor_type", "size", "do_center_crop", "crop_size")
        }
    if padding:
        content = {name: value for name, value in content.items() if name != "crop_size"} | padding
    return fit_processor(content, change(base.config, image_size=list(image_size)), base.report)


def summary(base: Checkpoint, model: ViTSimpleForImageClassification, head: str) -> str:
    """One line that says what was taken of the checkpoint."""
    height, width = pair(model.config.image_size)
    size = f"{height}" if height == width else f"{height}x{width}"
    return f"{base.origin}: {model.num_parameters() / 1e6:.1f} M parameters, {head}, {size} px"
