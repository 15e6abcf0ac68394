"""The contract for pixels (docs/environments.md): what training and evaluation see is what a pipeline sees."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from vit_simple.data.augment import Augment
from vit_simple.data.decoding import Decoder
from vit_simple.data.processors import padding_fields, stock_processor
from vit_simple.data.reading import BadImage

SIZE = (16, 16)
PROCESSORS = {
    "squash": stock_processor(SIZE),
    "crop": stock_processor(SIZE, 18),
    "bicubic": stock_processor(SIZE, 16, resample=3),
    "imagenet": stock_processor(SIZE, 18) | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
NOISE = np.random.default_rng(0).integers(0, 256, (61, 45, 4), dtype=np.uint8)
RGB = PIL.Image.fromarray(NOISE[..., :3])


def line(width: int, height: int) -> PIL.Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


TURNED = PIL.Image.Exif()
TURNED[0x0112] = 6
FILES = {
    "rgb.png": (RGB, {}),
    "rgb_of_the_size.png": (RGB.resize(SIZE), {}),
    "gray.png": (RGB.convert("L"), {}),
    "two_levels.png": (RGB.convert("1"), {}),
    "palette.png": (RGB.convert("P"), {}),
    "palette.gif": (RGB.convert("P"), {}),
    "rgb.jpg": (RGB, {}),
    "gray.jpg": (RGB.convert("L"), {}),
    "turned_by_exif.jpg": (RGB, {"exif": TURNED}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "rgb.webp": (RGB, {}),
    "one_column.png": (line(1, 5000), {}),
    "one_row.png": (line(5000, 1), {}),
    "one_odd_row.png": (line(5001, 1), {}),
    "three_rows.png": (line(50, 3), {}),
}


@pytest.fixture(params=PROCESSORS)
def processor(request, tmp_path):
    """Opened as a user of the checkpoint opens it."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[request.param]))
    return AutoImageProcessor.from_pretrained(tmp_path)


def decoded(processor, *files) -> torch.Tensor:
    """What train.py makes of image files without a random crop."""
    decode = Decoder(processor, (3, *SIZE))
    return decode.stack([decode({"bytes": file.read_bytes(), "path": None}, 0, 0) for file in files])


def by_pipeline(processor, image: PIL.Image.Image, **options) -> torch.Tensor:
    """pixel_values as a pipeline makes them, with one difference.

    The Pillow processors of transformers before 5.4 take an image of one or three rows for one of so many channels,
    and fail or give something else; here they are told what it is.
    """
    name = type(processor).__name__
    pillow_before_5_4 = Version(transformers.__version__) < Version("5.4") and not name.endswith("Fast")
    if pillow_before_5_4 and image.height in (1, 3):
        options["input_data_format"] = "channels_last"
    return processor(image, return_tensors="pt", **options).pixel_values[0]


def test_pixels_are_those_of_the_pipeline(processor, tmp_path):
    for name, (image, options) in FILES.items():
        image.save(tmp_path / name, **options)
    files = [tmp_path / name for name in FILES]
    pixels = decoded(processor, *files)
    normalized = Augment(processor, 2).normalize(pixels)
    for file, ours, ours_normalized in zip(files, pixels, normalized):
        image = load_image(str(file))
        theirs = by_pipeline(processor, image, do_rescale=False, do_normalize=False)
        assert ours.dtype == theirs.dtype == torch.uint8
        assert torch.equal(ours, theirs), file.name
        difference = (ours_normalized - by_pipeline(processor, image)).abs().max().item()
        assert difference <= 1e-6, (file.name, difference)


def test_long_images_are_within_one_level_of_the_pipeline(processor, tmp_path):
    line(907, 11).save(tmp_path / "long.png")
    (ours,) = decoded(processor, tmp_path / "long.png")
    theirs = by_pipeline(processor, load_image(str(tmp_path / "long.png")), do_rescale=False, do_normalize=False)
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16)])
def test_padded_pixels_are_those_of_the_pipeline_and_show_the_whole_image(size, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor(size) | padding_fields(size)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    decode, height, width = Decoder(processor, (3, *size)), *size
    for shape in ((40, 40), (60, 20), (20, 61), (9, 5), (300, 30), (25, 200)):
        image = line(*shape).point(lambda value: 100 + value // 2)  # nowhere black, as the padding is
        image.save(tmp_path / "image.png")
        ours = decode.stack([decode({"bytes": (tmp_path / "image.png").read_bytes(), "path": None}, 0, 0)])
        assert torch.equal(ours[0], by_pipeline(processor, image, do_rescale=False, do_normalize=False))
        normalized = Augment(processor, 2).normalize(ours)[0]
        assert (normalized - by_pipeline(processor, image)).abs().max() <= 1e-6
        scale = min(width / shape[0], height / shape[1])
        seen = ours[0].sum(0) > 0
        for axis, side, length in ((0, shape[0], width), (1, shape[1], height)):
            covered = seen.any(axis).nonzero()[:, 0]
            left, right = covered[0], length - 1 - covered[-1]
            assert abs(len(covered) - side * scale) <= 1 and abs(left - right) <= 1
    line(300, 1).save(tmp_path / "long.png")
    with pytest.raises(BadImage, match="at most 16 times as long as wide, since it is padded"):
        decode({"bytes": (tmp_path / "long.png").read_bytes(), "path": None}, 0, 0)


def test_transparent_images_lie_on_white_where_pipelines_drop_transparency(processor, tmp_path):
    image = PIL.Image.fromarray(NOISE)
    image.save(tmp_path / "transparent.png")
    white = PIL.Image.new("RGBA", image.size, "white")
    PIL.Image.alpha_composite(white, image).convert("RGB").save(tmp_path / "on_white.png")
    ours, on_white = decoded(processor, tmp_path / "transparent.png", tmp_path / "on_white.png")
    assert torch.equal(ours, on_white)
    image = load_image(str(tmp_path / "transparent.png"))
    assert not torch.equal(ours, by_pipeline(processor, image, do_rescale=False, do_normalize=False))


def test_images_of_16_bits_are_scaled_where_pipelines_saturate(processor, tmp_path):
    values = NOISE[..., 0].astype(np.uint16) << 8
    PIL.Image.fromarray(values).save(tmp_path / "16_bits.png")
    PIL.Image.fromarray(NOISE[..., 0]).save(tmp_path / "8_bits.png")
    ours, of_8_bits = decoded(processor, tmp_path / "16_bits.png", tmp_path / "8_bits.png")
    assert torch.equal(ours, of_8_bits)
    image = load_image(str(tmp_path / "16_bits.png"))
    assert by_pipeline(processor, image, do_rescale=False, do_normalize=False).min() > ours.min()
