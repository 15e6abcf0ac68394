"""The image processor of a model that is trained from scratch, and how any processor is opened."""

import json
import tempfile
from pathlib import Path

from transformers import AutoImageProcessor, BaseImageProcessor


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


def open_processor(content: dict) -> BaseImageProcessor:
    """The processor that a preprocessor_config.json stands for."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
