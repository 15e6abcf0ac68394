"""From a row of a data set to `uint8` pixels: decoding, turning, conversion to RGB, cropping.

`C` channels, `H W` pixels. Every random crop is a function of a seed, the epoch and the row.
"""

import contextlib
import io
import math
import random
import warnings

import fsspec
import kornia_rs
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from transformers import BaseImageProcessor

JPEG_DECODER = kornia_rs.io.ImageDecoder()
MAX_ASPECT_RATIO = 50  # times its short side is what is kept of an image whose middle is cut out


class BadImage(ValueError):
    """A row whose image cannot be decoded, or is too large to be decoded."""


@contextlib.contextmanager
def raise_bad_image():
    """Within it, whatever Pillow has against an image is a BadImage; a decompression bomb, too, of which it only warns.

    Raises:
        BadImage: says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"more than {PIL.Image.MAX_IMAGE_PIXELS} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise BadImage("not an image that Pillow knows") from error
    except BadImage:
        raise
    except Exception as error:  # every format has errors of its own
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_image(value: dict | None) -> PIL.Image.Image:
    """The image of an undecoded row, its header read and no more."""
    if value is None:
        raise BadImage("there is none")
    data = value["bytes"]
    if data is None:
        with fsspec.open(value["path"], "rb") as file:  # on this machine or on the Hub, in an archive or not
            data = file.read()
    if not data:
        raise BadImage("empty")
    return PIL.Image.open(io.BytesIO(data))


def load_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an opened image, turns it as its EXIF orientation says and makes it RGB.

    The first frame of an animation; what is transparent, in part, too, lies on white; 16 bits become the upper 8 of
    them. Pipelines do the same but for the last two: they drop transparency and clip 16 bits at 255.

    Raises:
        BadImage: pixels of 32 bits whose range is not surely that of 16 bits.
    """
    PIL.ImageOps.exif_transpose(image, in_place=True)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image)
        least, most = pixels.min(), pixels.max()
        if least < 0 or most >= 2**16 or (image.mode == "I" and 0 < most < 2**8):
            raise BadImage(f"expected pixels of 8 or 16 bits, got 32 bits with values from {least} to {most}")
        image = PIL.Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("expected integer pixels, got floating-point ones, whose range is not known")
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def sample_crop_box(width: int, height: int, min_area: float, generator: random.Random) -> tuple[float, ...]:
    """A box (left, upper, right, lower) of at least `min_area` of the image, its sides 3:4 to 4:3.

    Szegedy et al., 2014, arXiv:1409.4842, section 6. Where none fits in ten draws: the largest in the middle.
    """
    for _ in range(10):
        area = generator.uniform(min_area, 1) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def crop_and_resize(pixels: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> torch.Tensor:
    """A box of uint8 (H, W, C) pixels, resized, bilinear with antialiasing, to (C, height, width)."""
    left, upper = int(box[0]), int(box[1])
    right, lower = max(left + 1, round(box[2])), max(upper + 1, round(box[3]))
    part = torch.from_numpy(pixels[upper:lower, left:right].copy()).permute(2, 0, 1)
    return F.interpolate(part[None], size, mode="bilinear", antialias=True)[0]


def random_resized_crop(
    value: dict | np.ndarray | None, size: tuple[int, int], min_area: float, generator: random.Random
) -> torch.Tensor:
    """Decodes an undecoded row, or takes an array (C, H, W), crops it and resizes it to uint8 (C, height, width).

    JPEG is decoded at a half to an eighth of its size where that is enough, and otherwise, if it needs no turning, with
    libjpeg-turbo directly: the pixels are Pillow's, the copies are saved. Resizing is torch's, faster than Pillow's.
    """
    if isinstance(value, np.ndarray):
        return crop_and_resize(
            value.transpose(1, 2, 0), sample_crop_box(*value.shape[:0:-1], min_area, generator), size
        )
    image = open_image(value)
    orientation = image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1)
    turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size Pillow turns itself
    width, height = image.size[::-1] if turned else image.size
    left, upper, right, lower = sample_crop_box(width, height, min_area, generator)
    needed = max(size[1] / (right - left), size[0] / (lower - upper))
    pixels = None
    if image.format == "JPEG" and orientation == 1 and needed > 0.5:
        with contextlib.suppress(Exception):  # CMYK, and what is broken: Pillow decodes it or says why not
            pixels = JPEG_DECODER.decode(image.fp.getvalue())
    if pixels is None:
        image.draft("RGB", tuple(math.ceil(side * needed) for side in image.size))
        pixels = np.array(load_rgb(image))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    return crop_and_resize(pixels, (left * x, upper * y, right * x, lower * y), size)


def stack_as_uint8(images: list[PIL.Image.Image]) -> torch.Tensor:
    """uint8 (B, C, H, W) of images of one size, as they are."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


class Decoder:
    """Undecoded rows to uint8 pixels: what the processor does before it scales them, or random crops of the same size.

    Args:
        processor: the checkpoint's image processor.
        shape: (C, H, W) of the pixels.
        arrays: whether the rows hold arrays (C, H, W), or (H, W) of one channel, in the place of images.
        crop_min_area: the smallest part of an image that a random crop keeps; 0: no random crop.
        seed: decides the crops.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        shape: tuple[int, int, int],
        arrays: bool = False,
        crop_min_area: float = 0.0,
        seed: int = 0,
    ):
        self.processor, self.shape, self.arrays = processor, shape, arrays
        self.crop_min_area, self.seed = crop_min_area, seed
        # Resizing the short side would blow up an image that is all length; the middle is all that is used of it.
        self.crops_center = getattr(processor, "do_center_crop", False)
        self.size = shape[:0:-1]
        self.is_identity = False  # of images that have the size already
        if not (arrays or crop_min_area):
            noise = np.random.default_rng(0).integers(0, 256, (*shape[1:], 3), np.uint8)
            noise = [PIL.Image.fromarray(noise)]
            self.is_identity = torch.equal(self.stack(noise), stack_as_uint8(noise))

    def __call__(
        self, value: dict | np.ndarray | list | None, epoch: int, row: int | tuple
    ) -> PIL.Image.Image | torch.Tensor:
        """Raises BadImage, which says why it cannot be used."""
        with raise_bad_image():
            if self.arrays:
                if value is None:
                    raise BadImage("there is none")
                value = value.reshape(-1, *value.shape[-2:])  # (H, W) -> (1, H, W)
            if self.crop_min_area:
                generator = random.Random(repr((self.seed, "crop", epoch, row)))
                return random_resized_crop(value, self.shape[1:], self.crop_min_area, generator)
            if self.arrays:
                return torch.tensor(value)
            image = load_rgb(open_image(value))
            longest = MAX_ASPECT_RATIO * min(image.size)
            if self.crops_center and max(image.size) > longest:
                width, height = (min(side, longest) for side in image.size)
                left, upper = (image.width - width) // 2, (image.height - height) // 2
                image = image.crop((left, upper, left + width, upper + height))
            return image

    def stack(self, images: list[PIL.Image.Image | torch.Tensor | None]) -> torch.Tensor:
        """uint8 (B, C, H, W); None is black."""
        if self.arrays or self.crop_min_area:
            blank = torch.zeros(self.shape, dtype=torch.uint8)
            return torch.stack([blank if image is None else image for image in images])
        blank = PIL.Image.new("RGB", self.size)
        images = [blank if image is None else image for image in images]
        if self.is_identity and all(image.size == self.size for image in images):
            return stack_as_uint8(images)
        unscaled = {"do_rescale": False, "do_normalize": False}
        return self.processor(images, **unscaled, return_tensors="pt")["pixel_values"]
