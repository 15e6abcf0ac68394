import io
import random

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import processor
from vit_simple.data.decoding import Decoder, load_rgb, random_resized_crop, sample_crop_box
from vit_simple.data.reading import BadImage
from vit_simple.train import main

sizes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 70)), st.sampled_from([(1, 2000), (2000, 1), (3, 900), (900, 3)])
)


def stored(image: PIL.Image.Image, kind: str, **options) -> dict:
    """An undecoded row."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def rgb(image: PIL.Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    return np.array(load_rgb(PIL.Image.open(io.BytesIO(stored(image, kind, **options)["bytes"]))))


@settings(max_examples=150)
@given(
    st.sampled_from(
        [
            *(("PNG", mode) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")),
            *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
            *(
                ("TIFF", mode)
                for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B")
            ),
            *(("GIF", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
            *(("WEBP", mode) for mode in ("RGB", "RGBA")),
            *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
            ("PPM", "I;16"),
        ]
    ),
    sizes,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 3, 6, 8]),
)
def test_pictures_of_any_kind_and_size_become_pixels(form, size, seed, orientation):
    (kind, mode), (width, height) = form, size
    draw = np.random.default_rng(seed)
    if "I" in mode:
        array = draw.integers(0, 2**16, (height, width), dtype=np.uint16)
        image = PIL.Image.fromarray(array.astype(np.int32) if mode == "I" else array)
        if mode == "I;16B":
            image = PIL.Image.frombytes("I;16B", (width, height), array.astype(">u2").tobytes())
    else:
        noise = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = PIL.Image.fromarray(noise).convert("RGB" if mode in ("YCbCr", "CMYK") else "RGBA")
        if mode == "LAB":
            image = PIL.Image.frombytes("LAB", (width, height), noise[..., :3].tobytes())
        image = image if image.mode == mode else image.convert(mode)
    options = {}
    if orientation and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif}
    value = stored(image, kind, **options)
    squashed, centered = Decoder(SQUASHED, (3, 8, 8)), Decoder(CENTRED, (3, 8, 8))
    crop = Decoder(CENTRED, (3, 8, 12), crop_min_area=0.1, seed=seed)
    try:
        squashed(value, 0, 0)
    except BadImage as error:
        assert mode == "LAB" and "LAB" in str(error), (form, error)
        return
    decoded = load_rgb(PIL.Image.open(io.BytesIO(value["bytes"])))
    turned = bool(options) and orientation in (6, 8)
    assert decoded.mode == "RGB" and decoded.size == ((height, width) if turned else (width, height))
    for decode in (squashed, centered):
        pixels = decode.stack([decode(value, 0, 0), None])
        assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.uint8 and (pixels[1] == 0).all()
    pixels = crop.stack([crop(value, 0, 0), None])
    assert pixels.shape == (2, 3, 8, 12) and pixels.dtype == torch.uint8 and (pixels[1] == 0).all()
    small = np.array(decoded).reshape(-1, 3)  # what is resized stays within what was there
    assert (pixels[0].flatten(1).min(1).values.numpy() >= small.min(0)).all() or kind == "JPEG"


SQUASHED, CENTRED = processor(8), processor(8, cropped=True)


def test_what_is_transparent_lies_on_white():
    image = PIL.Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (200, 0, 0, 255), (0, 100, 0, 51)])
    assert rgb(image).tolist() == [[[255, 255, 255], [200, 0, 0], [204, 224, 204]]]
    assert rgb(image, "TIFF").tolist() == rgb(image).tolist()
    grey = PIL.Image.new("LA", (2, 1))
    grey.putdata([(10, 0), (10, 255)])
    assert rgb(grey).tolist() == [[[255] * 3, [10] * 3]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.putdata([0, 1])
    assert rgb(palette, transparency=0).tolist() == [[[255, 255, 255], [6, 5, 4]]]
    assert rgb(PIL.Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)).tolist() == [[[255] * 3]]


def test_sixteen_bits_become_their_upper_eight():
    values = np.array([[0, 255, 256, 2**15, 2**16 - 1]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert rgb(PIL.Image.fromarray(values), kind)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert rgb(PIL.Image.fromarray(values.astype(np.int32)), "TIFF")[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([[0, 2**16]], dtype=np.int32), "of 8 or 16 bits, got 32 bits with values from 0 to 65536"),
        (np.array([[-1, 5]], dtype=np.int32), "with values from -1 to 5"),
        (np.array([[0, 200]], dtype=np.int32), "with values from 0 to 200"),
        (np.array([[0.5]], dtype=np.float32), "expected integer pixels, got floating-point ones"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(array, message):
    value = stored(PIL.Image.fromarray(array), "TIFF")
    for area in (0.0, 0.5):
        with pytest.raises(BadImage, match=message):
            Decoder(SQUASHED, (3, 8, 8), crop_min_area=area)(value, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [PIL.Image.new("RGB", (6, 4), shade) for shade in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (rgb(frames[0], kind, save_all=True, append_images=frames[1:], **options) == [255, 0, 0]).all()


@pytest.mark.parametrize("width, height", [(5000, 1), (1, 5000), (9000, 100), (100, 9000)])
def test_an_image_that_is_all_length_keeps_its_middle(width, height):
    """Its short side would be resized to 256 pixels and its long one to over a million."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    middle = max(width, height) // 2
    (image.swapaxes(0, 1) if width > height else image)[middle - 50 : middle + 50] = 200
    decode = Decoder(processor(224, cropped=True), (3, 224, 224))
    value = stored(PIL.Image.fromarray(image), "PNG")
    cut = decode.cut_long_image(load_rgb(PIL.Image.open(io.BytesIO(value["bytes"]))))
    assert max(cut.size) == 50 * min(cut.size)
    assert (decode.stack([cut])[0, :, 100:124, 100:124] == 200).all()


def test_an_image_that_is_not_all_length_is_cropped_by_the_processor_alone():
    chosen = processor(16, cropped=True)
    decode = Decoder(chosen, (3, 16, 16))
    image = PIL.Image.effect_noise((500, 10), 80).convert("RGB")
    expected = chosen(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert torch.equal(decode.stack([decode(stored(image, "PNG"), 0, 0)]), expected)


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("area", [0.0, 0.3])
def test_arrays_of_any_channels_are_taken_or_cropped(channels, area):
    array = np.random.default_rng(0).integers(0, 256, (channels, 12, 20), dtype=np.uint8)
    decode = Decoder(SQUASHED, (channels, 12, 20), arrays=True, crop_min_area=area)
    pixels = decode.stack([decode(array, 0, 0), None])
    assert pixels.shape == (2, channels, 12, 20) and (pixels[1] == 0).all()
    assert np.array_equal(pixels[0], array) == (area == 0)


def test_a_crop_of_an_array_is_one_of_its_pixels(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (4, 30, 40), dtype=np.uint8)
    monkeypatch.setattr("vit_simple.data.decoding.sample_crop_box", lambda *_: (5.0, 7.0, 25.0, 17.0))
    assert np.array_equal(random_resized_crop(array, (10, 20), 0.5, random.Random(0)), array[:, 7:17, 5:25])


def test_a_random_crop_keeps_the_part_and_the_ratio_that_it_should():
    draw, boxes = random.Random(0), []
    for _ in range(500):
        left, upper, right, lower = sample_crop_box(300, 200, 0.25, draw)
        assert 0 <= left < right <= 300 and 0 <= upper < lower <= 200
        boxes.append(((right - left) * (lower - upper) / 60000, (right - left) / (lower - upper)))
    areas, ratios = np.array(boxes).T
    assert 0.25 <= areas.min() < 0.3 and 0.8 < areas.max() <= 1
    assert 0.75 - 1e-9 <= ratios.min() < 0.8 and 1.25 < ratios.max() <= 4 / 3 + 1e-9
    assert sample_crop_box(1000, 10, 0.9, draw) == pytest.approx((493.333, 0, 506.667, 10), abs=1e-3)  # none fits


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_training_on_16_bit_images_says_so_in_the_log_and_the_card(tmp_path, capsys, dtype):
    for number in range(8):
        (tmp_path / f"images/train/{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (16, 16), dtype=dtype)
        PIL.Image.fromarray(pixels).save(tmp_path / f"images/train/{number % 2}/{number}.png")
    options = ["--dataset_name", str(tmp_path / "images"), "--variant", "notebook/8", "--image_size", "16"]
    options += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--train_val_split", "0"]
    main([*options, "--output_dir", str(tmp_path / "run")])
    printed, card = capsys.readouterr().out, (tmp_path / "run/README.md").read_text()
    assert ("gray images of 16 bits are scaled to 8 bits" in printed) == (dtype == np.uint16)
    line = "For some images, a pipeline gives the model other pixels than training did: 8 images (more than 8 bits)"
    assert (line in card) == (dtype == np.uint16)
