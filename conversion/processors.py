"""Image processors: the preset of each family, timm's `pretrained_cfg`, and the one that fits a model's input."""

import math
import re

import PIL.Image
from transformers import BaseImageProcessor

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..data.processors import open_processor, padding_fields, pads, side_before_crop, stock_processor
from ..files import PREPROCESSOR, UserError

BILINEAR, BICUBIC = PIL.Image.Resampling.BILINEAR.value, PIL.Image.Resampling.BICUBIC.value
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FAMILIES = {  # resampling; crop fraction, None to squash the whole image; mean and standard deviation
    "google": (BILINEAR, None, HALF),
    "augreg": (BICUBIC, 0.9, HALF),
    "deit": (BICUBIC, 0.875, IMAGENET),
    "deit3": (BICUBIC, 0.9, IMAGENET),
    "dino": (BICUBIC, 0.875, IMAGENET),
    "dinov2": (BICUBIC, 0.875, IMAGENET),
    "mae": (BICUBIC, 0.875, IMAGENET),
    "clip": (BICUBIC, 1.0, OPENAI),
}
FAMILY_OF_TYPE = {"vit_mae": "mae", "dinov2": "dinov2", "dinov2_with_registers": "dinov2"}
PROCESSOR_OF_TYPE = {  # the class that transformers opens for a model_type if preprocessor_config.json names none
    **{name: "ViTImageProcessor" for name in ("vit", "vit_mae")},
    **{"deit": "DeiTImageProcessor", "dinov2": "BitImageProcessor", "clip": "CLIPImageProcessor"},
}
INTERPOLATIONS = [method.name.lower() for method in PIL.Image.Resampling]
SQUASHED = "the image processor squashes images, because center crops are square and the model's input is not"
EXPECTED = "expected size, resample, image_mean and image_std"
KNOWN_PROCESSORS = ("ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor")
PADDING = "DonutImageProcessor"  # known with the padding that train.py --resize fit gives it


def family_processor(family: str, image_size: tuple[int, int]) -> dict:
    """The preprocessing that a family was published with; images that are not square are squashed."""
    resample, crop, normalization = FAMILIES[family]
    if family == "dinov2" and image_size == (518, 518):  # it was trained last at this size, and is used at 224
        image_size = (224, 224)
    height, width = image_size
    shortest_edge = side_before_crop(height, crop) if crop and height == width else None
    return stock_processor(image_size, shortest_edge, resample) | normalization


def processor_output(content: dict) -> tuple[int, int]:
    """Height and width of the pixels that an image processor makes.

    Raises:
        UserError: the processor does not do what the processors of plain ViTs do.
    """
    processor, _ = open_known_processor(content)
    try:
        crops = getattr(processor, "do_center_crop", False)
        size = dict(processor.crop_size if crops else processor.size)
        return size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{PREPROCESSOR}: {EXPECTED}, got {content}") from error


def fit_processor(content: dict, config: ViTSimpleConfig, report: list[str]) -> dict:
    """An image processor for the size and channels of the model, with every field written out.

    Raises:
        UserError: the processor does not do what the processors of plain ViTs do.
    """
    output = processor_output(content)
    processor, kind = open_known_processor(content)
    try:
        mean, std = list(processor.image_mean), list(processor.image_std)
        size, resample = dict(processor.size), int(processor.resample)
    except TypeError as error:
        raise UserError(f"{PREPROCESSOR}: {EXPECTED}, got {content}") from error
    height, width = pair(config.image_size)
    is_cropped = output != (size.get("height"), size.get("width"))
    if output != (height, width):
        report.append(f"changed the image processor from {output} to {(height, width)} pixels, the model's input size")
    if is_cropped and height != width:
        report.append(SQUASHED)
        kind, is_cropped, size = "ViTImageProcessor", False, {"height": height, "width": width}
    else:
        for side, length in size.items():
            new, old = (width, output[1]) if side == "width" else (height, output[0])
            size[side] = round(length * new / old)
    channels = config.num_channels
    if len(mean) != channels:
        report.append(f"averaged the mean and std of {len(mean)} channels, because the model has {channels}")
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return {
        **(padding_fields((height, width)) if kind == PADDING else {}),
        "image_processor_type": kind,
        # Written out, because pipelines pass RGB images. Arrays, which are not resized, are never converted.
        "do_convert_rgb": channels == 3 and bool(processor.do_resize),
        "do_resize": processor.do_resize,
        "size": size,
        "resample": resample,
        "do_center_crop": is_cropped,
        **({"crop_size": {"height": height, "width": width}} if is_cropped else {}),
        "do_rescale": processor.do_rescale,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize,
        "image_mean": mean,
        "image_std": std,
    }


def override_processor(content: dict, options: dict) -> dict:
    """An image processor that `fit_processor` returned, with the preprocessing of a training of one's own.

    Args:
        options: some of image_mean, image_std, interpolation and crop_pct.

    Raises:
        UserError: an option does not suit the model.
    """
    content = dict(content)
    for name in ("image_mean", "image_std"):
        if name in options:
            if len(options[name]) != len(content[name]):
                raise UserError(
                    f"--{name}: expected {len(content[name])} numbers, one per channel, got {options[name]}"
                )
            if content["do_rescale"]:
                check_scale(name, options[name])
            content[name] = options[name]
    if "interpolation" in options:
        content["resample"] = PIL.Image.Resampling[options["interpolation"].upper()].value
    if "crop_pct" in options:
        size, crop_pct = content.get("crop_size") or content["size"], options["crop_pct"]
        if not 0 < crop_pct <= 1 or size["height"] != size["width"]:
            raise UserError(f"--crop_pct: expected a fraction in (0, 1] and square images, got {crop_pct} and {size}")
        edge = {"shortest_edge": side_before_crop(size["height"], crop_pct)}
        crop = {"do_center_crop": True, "crop_size": size}
        content |= {"image_processor_type": "BitImageProcessor", "size": edge, **crop}
    return content


def check_scale(name: str, values: list[float]):
    """Raises UserError unless a mean or a standard deviation is for pixels from 0 to 1."""
    is_std = name == "image_std"
    if not all(0 <= value <= 1 for value in values) or (is_std and 0 in values):
        divided = " ".join(f"{value / 255:.4g}" for value in values)
        raise UserError(
            f"--{name}: expected numbers in {'(0, 1]' if is_std else '[0, 1]'}, for pixels from 0 to 1, got {values}"
            + (f"; divided by 255, they are {divided}" if max(values) > 1 else "")
        )


def open_known_processor(content: dict) -> tuple[BaseImageProcessor, str]:
    """The image processor and its class name, without the backend."""
    processor = open_processor(content)
    kind = re.sub("(Fast|Pil)$", "", type(processor).__name__)
    if kind not in KNOWN_PROCESSORS and not (kind == PADDING and pads(processor)):
        raise UserError(f"{PREPROCESSOR}: expected {' or '.join(KNOWN_PROCESSORS)}, got {kind}")
    return processor, kind


def processor_from_timm(pretrained: dict, image_size: tuple[int, int], report: list[str]) -> dict:
    """The image processor for timm's `pretrained_cfg`.

    Raises:
        UserError: a crop or an interpolation that no image processor has, or a missing field.
    """
    (height, width), crop_pct = image_size, pretrained.get("crop_pct") or 0.875
    mode, interpolation = pretrained.get("crop_mode") or "center", pretrained.get("interpolation") or "bicubic"
    resample = getattr(PIL.Image.Resampling, str(interpolation).upper(), None)
    mean, std = pretrained.get("mean"), pretrained.get("std")
    if resample is None or mode not in ("center", "squash") or not (mean and std):
        raise UserError(
            "pretrained_cfg: expected mean, std, an interpolation of Pillow and the crop_mode center or squash, "
            f"got {mean}, {std}, {interpolation} and {mode}"
        )
    before_crop = {"height": side_before_crop(height, crop_pct), "width": side_before_crop(width, crop_pct)}
    if mode == "center" and height == width:
        content = stock_processor(image_size, before_crop["height"], resample.value)
    else:
        if mode == "center":
            report.append(SQUASHED)
        content = stock_processor(image_size, None, resample.value)
        if mode == "squash" and crop_pct < 1:
            crop = {"do_center_crop": True, "crop_size": content["size"]}
            content |= {"image_processor_type": "DeiTImageProcessor", "size": before_crop, **crop}
    return content | {"image_mean": list(mean), "image_std": list(std)}


def processor_to_timm(processor: dict, config: ViTSimpleConfig) -> dict:
    """timm's `pretrained_cfg` for an image processor that `fit_processor` returned.

    Raises:
        UserError: the processor does not resize or scale the way timm always does.
    """
    size, (height, width) = processor["size"], pair(config.image_size)
    if not (processor["do_resize"] and processor["do_rescale"] and math.isclose(processor["rescale_factor"], 1 / 255)):
        raise UserError(f"--to timm: expected an image processor that resizes and scales by 1 / 255, got {processor}")
    if processor.get("do_pad"):
        raise UserError("--to timm: expected an image processor without padding, since timm pads in another color")
    normalizes = processor["do_normalize"]
    return {
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "interpolation": PIL.Image.Resampling(processor["resample"]).name.lower(),
        "crop_pct": crop_fraction(height, size.get("shortest_edge") or size["height"]),
        "crop_mode": "center" if "shortest_edge" in size else "squash",
        "mean": processor["image_mean"] if normalizes else [0.0] * config.num_channels,
        "std": processor["image_std"] if normalizes else [1.0] * config.num_channels,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def crop_fraction(crop: int, resized: int) -> float:
    """A short decimal fraction for which timm gets `resized`; 224 / 0.56 is a little less than 400, so not that one."""
    fractions = (round(crop / side, digits) for digits in range(1, 17) for side in (resized, resized + 0.5))
    return next(fraction for fraction in fractions if side_before_crop(crop, fraction) == resized)
