"""preprocessor_config.json: the stock one, each family's, timm's, and what another library needs of it."""

import math
import re

import PIL.Image

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..data.processors import open_processor, stock_processor

BILINEAR, BICUBIC = PIL.Image.Resampling.BILINEAR.value, PIL.Image.Resampling.BICUBIC.value
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FAMILIES = {  # resampling, part of the short side that the crop keeps (None: all is squashed), mean and deviation
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
KNOWN_PROCESSORS = ("ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor")


def family_processor(family: str, image_size: tuple[int, int]) -> dict:
    """What the checkpoints of a family were published with; images that are not square are squashed."""
    resample, part, scale = FAMILIES[family]
    square = image_size[0] == image_size[1]
    return stock_processor(image_size, math.floor(image_size[0] / part) if part and square else None, resample) | scale


def fit_processor(content: dict, config: ViTSimpleConfig, notes: list[str]) -> dict:
    """The content with nothing left to defaults, for images of the size and channels that the network takes.

    Raises:
        ValueError: a processor that does more or other things than those of plain ViTs.
    """
    processor, (height, width) = open_processor(content), pair(config.image_size)
    kind = re.sub("(Fast|Pil)$", "", type(processor).__name__)
    if kind not in KNOWN_PROCESSORS:
        raise ValueError(f"preprocessor_config.json: expected {' or '.join(KNOWN_PROCESSORS)}, got {kind}")
    try:
        mean, std = list(processor.image_mean), list(processor.image_std)
        size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
        resample = int(processor.resample)
        made = crop if getattr(processor, "do_center_crop", False) else size
        made = made.get("height") or made["shortest_edge"], made.get("width") or made["shortest_edge"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"preprocessor_config.json: expected size, resample, image_mean and image_std, got {content}"
        ) from error
    cropped = made != (size.get("height"), size.get("width"))
    if made != (height, width):
        notes.append(
            f"the image processor makes {(height, width)} pixels, as the network takes, in the place of {made}"
        )
    if height != width and cropped:
        notes.append("the image processor squashes, since images are not square")
        kind, cropped, size = "ViTImageProcessor", False, {"height": height, "width": width}
    else:
        size = {
            side: round(length * (height if side != "width" else width) / made[side == "width"])
            for side, length in size.items()
        }
    channels = config.num_channels
    if len(mean) != channels:
        notes.append(f"the image processor scales {channels} channels by the averages of {len(mean)}")
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return {
        "image_processor_type": kind,
        "do_convert_rgb": channels == 3 and bool(processor.do_resize),  # said, since pipelines send RGB; not of arrays
        "do_resize": processor.do_resize,
        "size": size,
        "resample": resample,
        "do_center_crop": cropped,
        **({"crop_size": {"height": height, "width": width}} if cropped else {}),
        "do_rescale": processor.do_rescale,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize,
        "image_mean": mean,
        "image_std": std,
    }


def processor_from_timm(pretrained: dict, image_size: tuple[int, int], notes: list[str]) -> dict:
    """What timm's `pretrained_cfg` does to images.

    Raises:
        ValueError: a crop or an interpolation that no image processor has, or something is not told.
    """
    (height, width), part = image_size, pretrained.get("crop_pct") or 0.875
    mode, interpolation = pretrained.get("crop_mode") or "center", pretrained.get("interpolation") or "bicubic"
    resample = getattr(PIL.Image.Resampling, str(interpolation).upper(), None)
    mean, std = pretrained.get("mean"), pretrained.get("std")
    if resample is None or mode not in ("center", "squash") or not (mean and std):
        raise ValueError(
            "pretrained_cfg: expected mean, std, an interpolation of pillow and the crop_mode center or squash, "
            f"got {mean}, {std}, {interpolation} and {mode}"
        )
    edges = {"height": math.floor(height / part), "width": math.floor(width / part)}
    if mode == "center" and height == width:
        content = stock_processor(image_size, edges["height"], resample.value)
    else:
        if mode == "center":
            notes.append("the image processor squashes, since images are not square")
        content = stock_processor(image_size, None, resample.value)
        if mode == "squash" and part < 1:
            crop = {"do_center_crop": True, "crop_size": content["size"]}
            content |= {"image_processor_type": "DeiTImageProcessor", "size": edges, **crop}
    return content | {"image_mean": list(mean), "image_std": list(std)}


def processor_to_timm(processor: dict, config: ViTSimpleConfig) -> dict:
    """timm's `pretrained_cfg` for an image processor that `fit_processor` has made.

    Raises:
        ValueError: steps that timm does not take, or leaves that it always takes.
    """
    size, (height, width) = processor["size"], pair(config.image_size)
    if not (processor["do_resize"] and processor["do_rescale"] and math.isclose(processor["rescale_factor"], 1 / 255)):
        raise ValueError(f"--to timm: expected images that are resized and scaled by 1 / 255, got {processor}")
    normal = processor["do_normalize"]
    return {
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "interpolation": PIL.Image.Resampling(processor["resample"]).name.lower(),
        "crop_pct": crop_part(height, size.get("shortest_edge") or size["height"]),
        "crop_mode": "center" if "shortest_edge" in size else "squash",
        "mean": processor["image_mean"] if normal else [0.0] * config.num_channels,
        "std": processor["image_std"] if normal else [1.0] * config.num_channels,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def crop_part(side: int, edge: int) -> float:
    """The shortest number by which timm, which divides and rounds down, comes from a side to an edge."""
    parts = (round(side / edge, digits) for digits in range(1, 17))
    return next(part for part in parts if math.floor(side / part) == edge)
