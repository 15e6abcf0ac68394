"""From a row of a dataset to `uint8` pixels: decoding, EXIF rotation, conversion to RGB, cropping and resizing.

`C` channels, `H W` pixels. Every random crop is a function of the seed, the epoch and the row.
"""

import contextlib
import io
import math
import random
import warnings
from collections.abc import Iterable

import kornia_rs
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from transformers import BaseImageProcessor

from .processors import pads, pillow_resize, process
from .reading import BadImage, read_bytes, retry_machine_errors

JPEG_DECODER = kornia_rs.io.ImageDecoder()
MAX_ASPECT_RATIO = 50  # a longer image is cut to about this many times its short side, if its center is cropped anyway
TRANSPARENT, DEEP = "transparent", "more than 8 bits"  # images that have other pixels in a pipeline
MAX_FULL_BYTES = 16 * 2**20  # of the images that a process keeps at their full size; a larger one is kept alone


@contextlib.contextmanager
def raise_bad_image():
    """Turns every error that Pillow raises because of an image's bytes into BadImage, and its warning of a bomb, too.

    Errors of the machine pass through: a lack of memory, and what the operating system reports, which has an `errno`.

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
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # each image format has its own errors
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_image(data: bytes) -> PIL.Image.Image:
    """Opens an encoded image; only its header is read."""
    return PIL.Image.open(io.BytesIO(data))


def load_rgb(image: PIL.Image.Image, bit_depth: int = 16, changes: set[str] | None = None) -> PIL.Image.Image:
    """Decodes an opened image, rotates it by its EXIF orientation and converts it to RGB.

    Of an animation, the first frame is decoded. Transparent images are drawn on white, and of more than 8 bits the
    upper 8 are kept. Pipelines differ in the last two: they drop transparency and clip values at 255.

    Args:
        bit_depth: of gray images with more than 8 bits; a 16-bit file may hold the 12 bits of a camera.
        changes: gets TRANSPARENT or DEEP if a pipeline sees other pixels.

    Raises:
        BadImage: floating-point pixels, or values that do not fit the bit depth.
    """
    PIL.ImageOps.exif_transpose(image, in_place=True)
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    changes = set() if changes is None else changes
    if is_deep(image):
        image = PIL.Image.fromarray(upper_bits(np.asarray(image), bit_depth, image.mode == "I"))
        changes.add(DEEP)
    if image.mode == "F":
        raise BadImage("expected integer pixels, got floating-point ones of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            changes.add(TRANSPARENT)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def same_pixels_code(kinds: Iterable[str], bit_depth: int) -> list[str]:
    """The lines of Python that give a pipeline the pixels of training, for images that were changed in these ways."""
    lines = []
    if DEEP in kinds:
        lines.append(f"image = Image.fromarray((np.asarray(image) >> {bit_depth - 8}).astype(np.uint8))")
    if TRANSPARENT in kinds:
        image = 'image.convert("RGBA")'
        lines.append(f'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), {image}).convert("RGB")')
    return lines


def exif_orientation(image: PIL.Image.Image) -> int:
    """From 1, upright, to 8, as the Exif standard numbers them."""
    return image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1)


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that the Exif data ask for."""
    is_sideways = exif_orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow swaps those of a TIFF
    return image.size[::-1] if is_sideways else image.size


def is_deep(image: PIL.Image.Image) -> bool:
    """Whether an image is gray with integers of more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode == "I"


def upper_bits(pixels: np.ndarray, bit_depth: int, has_32_bits: bool) -> np.ndarray:
    """The upper 8 bits of values of this many bits. Raises BadImage if larger, negative or ambiguous values occur."""
    lowest, highest = pixels.min(), pixels.max()
    if lowest < 0 or highest >= 2**16 or (has_32_bits and bit_depth == 16 and 0 < highest < 2**8):
        raise BadImage(f"expected pixels of 8 or 16 bits, got 32 bits with values from {lowest} to {highest}")
    if highest >= 2**bit_depth:
        needed = 2 * math.ceil(int(highest).bit_length() / 2)
        raise BadImage(
            f"expected gray values of {bit_depth} bits, got values up to {highest}; use --bit_depth {needed} or more"
        )
    return (pixels >> (bit_depth - 8)).astype(np.uint8)


def sample_crop_box(width: int, height: int, min_area: float, generator: random.Random) -> tuple[float, ...]:
    """A random box (left, upper, right, lower): at least the fraction `min_area` of the image, with sides 3:4 to 4:3.

    Szegedy et al., 2014, arXiv:1409.4842, section 6. If none of ten boxes fits, the largest one in the center.
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
    """Crops uint8 pixels (H, W, C) to a box and resizes it to (C, height, width), bilinear with antialiasing."""
    left, upper = int(box[0]), int(box[1])
    right, lower = max(left + 1, round(box[2])), max(upper + 1, round(box[3]))
    part = torch.from_numpy(pixels[upper:lower, left:right].copy()).permute(2, 0, 1)
    return F.interpolate(part[None], size, mode="bilinear", antialias=True)[0]


def random_resized_crop(
    source: bytes | np.ndarray,
    size: tuple[int, int],
    min_area: float,
    generator: random.Random,
    bit_depth: int = 16,
    changes: set[str] | None = None,
) -> torch.Tensor:
    """Decodes an encoded image, or takes an array (C, H, W), and crops and resizes it to uint8 (C, height, width).

    JPEG is decoded at 1/2 to 1/8 of its size where the crop allows it. At full size and without rotation, libjpeg-turbo
    decodes it directly: the pixels are the same as Pillow's, with fewer copies. torch resizes faster than Pillow.

    Args:
        bit_depth, changes: see `load_rgb`.

    Raises:
        BadImage: it cannot be decoded.
    """
    if isinstance(source, np.ndarray):
        height, width = source.shape[1:]
        return crop_and_resize(source.transpose(1, 2, 0), sample_crop_box(width, height, min_area, generator), size)
    with raise_bad_image():
        image = open_image(source)
        orientation = exif_orientation(image)
        width, height = upright_size(image)
        left, upper, right, lower = sample_crop_box(width, height, min_area, generator)
        scale = max(size[1] / (right - left), size[0] / (lower - upper))
        pixels = None
        if image.format == "JPEG" and orientation == 1 and scale > 0.5:
            with contextlib.suppress(Exception):  # CMYK or damaged: Pillow decodes it or says what is wrong
                pixels = JPEG_DECODER.decode(source)
        if pixels is None:
            image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            pixels = np.array(load_rgb(image, bit_depth, changes))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    return crop_and_resize(pixels, (left * x, upper * y, right * x, lower * y), size)


def stack_as_uint8(images: list[PIL.Image.Image]) -> torch.Tensor:
    """uint8 pixels (B, C, H, W) of images of the same size, which are not resized."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


class Decoder:
    """Undecoded rows to uint8 pixels: those of the image processor before it scales them, or random crops of that size.

    Without random crops the pixels are bit for bit those of a pipeline in this environment, except for images that are
    transparent, have 16 bits or are longer than `MAX_ASPECT_RATIO`: docs/environments.md.

    Args:
        processor: the checkpoint's image processor.
        shape: (C, H, W) of the pixels.
        arrays: whether the rows hold arrays (C, H, W), or (H, W) of one channel, instead of images.
        crop_min_area: the smallest fraction of an image that a random crop keeps; 0: no random crop.
        seed: determines the crops.
        sources: where rows may name files, see `dataset_sources`.
        bit_depth: of gray images with more than 8 bits.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        shape: tuple[int, int, int],
        arrays: bool = False,
        crop_min_area: float = 0.0,
        seed: int = 0,
        sources: tuple[str, ...] = (),
        bit_depth: int = 16,
    ):
        self.bit_depth = bit_depth
        self.processor, self.shape, self.arrays = processor, shape, arrays
        self.crop_min_area, self.seed, self.sources = crop_min_area, seed, sources
        self.crops_center = getattr(processor, "do_center_crop", False)
        self.size = shape[:0:-1]
        self.max_aspect_ratio = min(MAX_ASPECT_RATIO, *self.size) if pads(processor) else math.inf
        self.is_identity = False  # whether the processor leaves images of the right size as they are
        self.resize = None
        if not (arrays or crop_min_area):
            self.resize = pillow_resize(processor)
            noise = [PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[1:], 3), np.uint8))]
            self.is_identity = torch.equal(self.stack(noise), stack_as_uint8(noise))

    def __call__(
        self, value: dict | np.ndarray | None, epoch: int, row: int | tuple, changes: set[str] | None = None
    ) -> PIL.Image.Image | torch.Tensor:
        """An RGB image at its full size, which `PixelBatch` resizes, or the pixels (C, H, W) of a random crop or array.

        Args:
            changes: see `load_rgb`.

        Raises:
            BadImage: the image cannot be used; says why.
            OSError, MemoryError, an error of the HTTP library: the machine failed several times.
        """
        if isinstance(value, np.ndarray):
            return self.decode(value.reshape(-1, *value.shape[-2:]), epoch, row, changes)  # (H, W) -> (1, H, W)
        data = read_bytes(value, self.sources)
        return retry_machine_errors(lambda: self.decode(data, epoch, row, changes))

    def decode(
        self, source: bytes | np.ndarray, epoch: int, row: int | tuple, changes: set[str] | None
    ) -> PIL.Image.Image | torch.Tensor:
        if self.crop_min_area:
            generator, size = random.Random(repr((self.seed, "crop", epoch, row))), self.shape[1:]
            return random_resized_crop(source, size, self.crop_min_area, generator, self.bit_depth, changes)
        if isinstance(source, np.ndarray):
            return torch.tensor(source)
        with raise_bad_image():
            image = load_rgb(open_image(source), self.bit_depth, changes)
        if max(image.size) > self.max_aspect_ratio * min(image.size):  # resizing it first takes memory
            ratio = f"at most {self.max_aspect_ratio} times as long as wide"
            raise BadImage(f"expected an image that is {ratio}, since it is padded, got {image.size}")
        return self.cut_long_image(image)

    def cut_long_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Cuts a very long image to its middle, the only part that is used, since resizing all of it takes memory."""
        short = min(image.size)
        if not self.crops_center or max(image.size) <= MAX_ASPECT_RATIO * short:
            return image
        # Both ends lose the same multiple of the short side, so that the resized middle stays where it is.
        left, upper = (max(side - MAX_ASPECT_RATIO * short, 0) // (2 * short) * short for side in image.size)
        return image.crop((left, upper, image.width - left, image.height - upper))

    def stack(self, images: list) -> torch.Tensor:
        """uint8 pixels (B, C, H, W) of decoded images; None becomes black."""
        if self.arrays or self.crop_min_area:
            blank = torch.zeros(self.shape, dtype=torch.uint8)
            return torch.stack([blank if image is None else image for image in images])
        images = [PIL.Image.new("RGB", self.size) if image is None else image for image in images]
        if self.is_identity and all(image.size == self.size for image in images):
            return stack_as_uint8(images)
        if self.resize is not None:
            return stack_as_uint8([self.resize(image) for image in images])
        return process(self.processor, images)


class PixelBatch:
    """Collects the decoded images of a batch, and resizes them whenever they take more than `MAX_FULL_BYTES`.

    The processor is faster with many small images than with each alone, and large ones do not fit into memory.
    """

    def __init__(self, decode: Decoder):
        self.decode, self.parts = decode, []
        self.images, self.full_bytes = [], 0

    def append(self, image: PIL.Image.Image | torch.Tensor | None):
        self.images.append(image)
        self.full_bytes += 3 * image.width * image.height if isinstance(image, PIL.Image.Image) else 0
        if self.full_bytes > MAX_FULL_BYTES:
            self.resize()

    def resize(self):
        self.parts.append(retry_machine_errors(lambda: self.decode.stack(self.images)))
        self.images, self.full_bytes = [], 0

    def pixels(self) -> torch.Tensor:
        """uint8 pixels (B, C, H, W) of all images."""
        if self.images:
            self.resize()
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
