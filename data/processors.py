"""The image processor of a model that is trained from scratch, and how any processor is opened and called."""

import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import is_torchvision_available

from ..files import PREPROCESSOR, UserError, check_types

MAX_SIDE = 2**14  # of the images that a processor makes
CLASS_FIELDS = ("image_processor_type", "feature_extractor_type")  # the second one in old files
FIELDS = {
    **{name: str | None for name in CLASS_FIELDS},
    **{f"do_{name}": bool | None for name in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")},
    **{f"do_{name}": bool | None for name in ("thumbnail", "align_long_axis", "pad")},
    **{name: int | dict[str, int | None] | None for name in ("size", "crop_size")},
    **{name: float | list[float] | None for name in ("image_mean", "image_std")},
    "rescale_factor": float | None,
    "resample": int | None,
}


def stock_processor(image_size: tuple[int, int], shortest_edge: int | None = None, resample: int = 2) -> dict:
    """preprocessor_config.json of transformers' own processors: RGB, scaled to [-1, 1].

    Args:
        image_size: (height, width) that it makes.
        shortest_edge: of the image before a crop to `image_size`; None: all of it is squashed to `image_size`.
        resample: as PIL.Image.Resampling counts, 2 bilinear, 3 bicubic.
    """
    height, width = image_size
    squash = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    crop = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": shortest_edge},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    return (squash if shortest_edge is None else crop) | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def side_before_crop(side: int, crop_pct: float) -> int:
    """The side in pixels before a center crop to `side` that keeps the fraction `crop_pct`, rounded down as in timm."""
    return math.floor(side / crop_pct)


def padding_fields(image_size: tuple[int, int]) -> dict:
    """The fields of preprocessor_config.json that resize the whole image to fit into `image_size` and pad it in black.

    Donut's processor pads before it normalizes, and returns nothing but pixels. It resizes the short side to that
    of the model and then, if the long side is too long, both.
    """
    height, width = image_size
    return {
        "image_processor_type": "DonutImageProcessor",
        "size": {"height": height, "width": width},
        "resample": PIL.Image.Resampling.BICUBIC.value,  # transformers 5.0 and older take it for the second step anyway
        "do_thumbnail": True,
        "do_align_long_axis": False,
        "do_pad": True,
        "do_center_crop": False,
    }


def pads(processor: BaseImageProcessor) -> bool:
    """Whether a processor has the `padding_fields`."""
    return all(getattr(processor, f"do_{name}", None) for name in ("resize", "thumbnail", "pad"))


def open_processor(content: dict) -> BaseImageProcessor:
    """The processor that a preprocessor_config.json describes.

    Raises:
        UserError: a field has a wrong type or value; or this version of transformers needs torchvision for it, and
            torchvision is not installed.
    """
    check_content(content)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR).write_text(json.dumps(content), encoding="utf-8")
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:  # no such type
            raise UserError(f"{PREPROCESSOR}: {error}") from error
        except ImportError as error:
            if is_torchvision_available():
                raise
            raise UserError(
                f"transformers {transformers.__version__} needs torchvision to open an image processor: "
                "pip install torchvision, or pip install 'transformers>=5.18'"
            ) from error


def names_class(content: dict) -> bool:
    """Whether a preprocessor_config.json says which class opens it."""
    return any(content.get(name) for name in CLASS_FIELDS)


def check_content(content: dict):
    """Raises UserError if a preprocessor_config.json has a wrong type, or a value that makes no usable pixels."""

    def check(name: str, expected: str, is_right: Callable[[float], bool]):
        given = content.get(name)
        values = given.values() if isinstance(given, dict) else given if isinstance(given, list) else [given]
        if not all(is_right(value) for value in values if value is not None):
            raise UserError(f"{PREPROCESSOR}: expected {name} to be {expected}, got {given}")

    check_types(content, FIELDS, PREPROCESSOR)
    if not names_class(content):
        raise UserError(f"{PREPROCESSOR}: expected image_processor_type, such as ViTImageProcessor, got none; add it")
    check("image_mean", "finite", math.isfinite)
    check("image_std", "positive", lambda value: 0 < value < math.inf)
    check("rescale_factor", "in (0, 1]", lambda value: 0 < value <= 1)
    for name in ("size", "crop_size"):
        check(name, f"from 1 to {MAX_SIDE}", lambda value: 1 <= value <= MAX_SIDE)


def pillow_resize(processor: BaseImageProcessor) -> Callable[[PIL.Image.Image], PIL.Image.Image] | None:
    """A function that makes the processor's pixels from an RGB image without copying it at its full size.

    It takes about two thirds of the time of `process`. None if the processor does something else, such as resizing with
    torchvision: the pixels of images of several shapes are compared.
    """
    size, crop = processor.size or {}, getattr(processor, "crop_size", None) or {}
    short, crops = size.get("shortest_edge"), bool(getattr(processor, "do_center_crop", False))
    width, height = (crop if crops else size).get("width"), (crop if crops else size).get("height")
    if None in (width, height) or crops != (short is not None) or (crops and short < max(width, height)):
        return None
    if processor.resample not in (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC):
        return None  # libraries that choose another nearest pixel may agree on a few images
    resize = functools.partial(resize_and_crop, size=(width, height), short=short, resample=processor.resample)
    noise = np.random.default_rng(0)
    for shape in ((2 * height + 1, 3 * width + 2), (3 * height + 5, width), (height // 2 + 1, width // 3 + 2)):
        image = PIL.Image.fromarray(noise.integers(0, 256, (*shape, 3), np.uint8))
        if not np.array_equal(process(processor, [image])[0].permute(1, 2, 0), np.asarray(resize(image))):
            return None
    return resize


def resize_and_crop(image: PIL.Image.Image, size: tuple[int, int], short: int | None, resample: int) -> PIL.Image.Image:
    """An image of `size` (width, height): squashed or, with a length of its short side, resized and cropped."""
    if short is None:
        return image.resize(size, resample)
    sides = [int(short * side / min(image.size)) for side in image.size]
    left, upper = ((side - kept) // 2 for side, kept in zip(sides, size))
    return image.resize(sides, resample).crop((left, upper, left + size[0], upper + size[1]))


def process(processor: BaseImageProcessor, images: list[PIL.Image.Image]) -> torch.Tensor:
    """uint8 (B, C, H, W): RGB images as the processor resizes and crops them, before it scales them.

    The images go in as arrays. Without `input_data_format` an image of three rows is ambiguous; with it, the
    torchvision processors of transformers 5.0 to 5.20 read PIL images wrong.
    """
    arrays = [np.array(image) for image in images]  # (H, W, C); copies, since torch warns about read-only memory
    unscaled = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}
    return processor(arrays, **unscaled, return_tensors="pt")["pixel_values"]
