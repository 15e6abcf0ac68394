"""The device side of the data: whole `uint8` batches to augmented, normalized and mixed float batches.

`B` batch, `C` channels, `H W` pixels, `K` classes. Every image has its own draws. All draws of a batch come first, on
the CPU from torch's global generator, so that a seed draws the same on every device, and go to the device in one copy.
Then a fixed number of operations changes the whole batch: the host never waits for the device. Only the noise of erased
rectangles is drawn on the device. Numbers of images are computed by numpy, whose small operations cost least.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor

from ..files import UserError
from .randaugment import RandAugment, per_image, warp

# The draws of a batch: tables (n, B) of numbers


def uniform(*shape: int) -> np.ndarray:
    return torch.rand(*shape).numpy()


def draw_crop(B: int, padding: int) -> np.ndarray:
    """Row and column of each window in the padded image, (2, B)."""
    return torch.randint(2 * padding + 1, (2, B)).numpy()


def draw_flip(B: int, probability: float) -> np.ndarray:
    """True for an image to be mirrored, (1, B)."""
    return uniform(1, B) < probability


def draw_affine(B: int, H: int, W: int, degrees: float, translate: float, scale: float, shear: float) -> np.ndarray:
    """The map of each image for `warp`, (6, B). The limits are those of `Augment`."""
    angle, size, right, down, slant, _ = 2 * uniform(6, B) - 1  # the sixth: there is no vertical shear
    angle, size, slant = angle * math.radians(degrees), 1 + size * scale, np.tan(slant * math.radians(shear))
    cos, sin, right, down = np.cos(angle) / size, np.sin(angle) / size, 2 * translate * right, 2 * translate * down
    a, b, c, d = cos - slant * sin, (sin + slant * cos) * (H / W), -sin * (W / H), cos
    return np.stack([a, b, -a * right - b * down, c, d, -c * right - d * down])


def rectangle(*sides: np.ndarray) -> np.ndarray:
    """Center and half of height and width (4, B), in pixels, of top, left, height and width, which are rounded."""
    top, left, height, width = np.stack(sides).round()
    return np.stack([top + (height - 1) / 2, left + (width - 1) / 2, height / 2, width / 2])


def draw_erase(B: int, H: int, W: int, probability: float) -> np.ndarray:
    """The rectangle of each image, (4, B)."""
    area, ratio, top, left, chance = uniform(5, B)
    area, ratio = (0.02 + area * (1 / 3 - 0.02)) * H * W, 3.3 ** (2 * ratio - 1)
    height, width = np.sqrt(area * ratio).clip(max=H), np.sqrt(area / ratio).clip(max=W)
    return rectangle(top * (H - height), left * (W - width), height * (chance < probability), width)


def draw_mix(B: int, H: int, W: int, betas: dict[str, torch.distributions.Beta]) -> np.ndarray:
    """The part of the image itself outside of CutMix's rectangle and the rectangle, (5, B); no rectangle for mixup."""
    cut = uniform(B) < ("cutmix" in betas) / len(betas)
    kept = {name: beta.sample((B,)).numpy() for name, beta in betas.items()}  # Python keeps the order: mixup first
    side = np.where(cut, np.sqrt(1 - kept.get("cutmix", 1)), 0)
    top, left = uniform(2, B) - side / 2
    kept = np.where(cut, 1, kept.get("mixup", 1))
    return np.concatenate([kept[None], rectangle(top * H, left * W, side * H, side * W)])


# The operations, on the device


def padded_crop(pixels: torch.Tensor, draws: torch.Tensor, padding: int) -> torch.Tensor:
    """(B, C, H, W) -> the same: each image moved by up to `padding` pixels either way, black outside the image."""
    rows, (height, width) = torch.arange(len(pixels), device=pixels.device), pixels.shape[2:]
    windows = F.pad(pixels, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    down, right = draws.long()
    return windows[rows, :, down, right]


def flip(pixels: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    """Mirrors those of the uint8 images (B, C, H, W) for which `flipped` (B,) is 1, not 0.

    The difference wraps around, so the sum is exact. On a CPU, `torch.where` with one condition for each image takes
    three times as long.
    """
    return torch.addcmul(pixels, pixels.flip(3) - pixels, per_image(flipped.to(torch.uint8)))


def rectangles(draws: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """True in the rectangle of each image, (B, 1, H, W); the draws (4, B) are those of `rectangle`."""
    y, x, height, width = per_image(draws)
    rows = torch.arange(like.shape[2], device=like.device)[:, None] - y
    columns = torch.arange(like.shape[3], device=like.device) - x
    return (rows.abs() < height) & (columns.abs() < width)


def mix(x: torch.Tensor, targets: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and targets (B, K), each mixed with those of the next image.

    mixup (Zhang et al., 2017, arXiv:1710.09412, section 2) adds two images; CutMix (Yun et al., 2019, arXiv:1905.04899,
    section 3.1) puts a rectangle of one into the other. Where both are on, each image has one of them at even odds.
    A target gets the part that its image has in the pixels, so that the sum of targets stays the same.
    """
    weight = torch.where(rectangles(draws[1:], x), 0, per_image(draws[0]))  # of the image itself, (B, 1, H, W)
    share = weight.mean((2, 3))
    return torch.lerp(x.roll(1, 0), x, weight), torch.lerp(targets.roll(1, 0), targets, share)


class Augment(nn.Module):
    """uint8 (B, C, H, W) and labels -> float32 (B, C, H, W) and targets (B, K), as the loss takes them.

    Classes (B,) become one-hot; float labels (B, K), of several classes or a number, are mixed as they are.

    In this order: padded crop, flip, affine map, RandAugment, normalization, erasing, mixup or CutMix; what is left at
    its default is off. `compile()` fuses the operations on a GPU.

    Args:
        processor: the checkpoint's image processor, for its mean, standard deviation and scale.
        num_classes: K.
        label_smoothing_factor: fraction of each target that is spread over all classes, in [0, 1); for classes (B,).
        crop_padding: pixels of the padding around an image that is then cropped at random.
        horizontal_flip: probability.
        affine_degrees: largest rotation, either way; the border is repeated.
        affine_translate: largest shift, either way, as a fraction of height and width.
        affine_scale: largest change of size, either way, as a fraction of it.
        affine_shear: largest horizontal shear in degrees, either way.
        randaugment_num_ops, randaugment_magnitude: see `RandAugment`.
        random_erasing: probability, of `draw_erase`'s rectangle, which becomes normal noise.
        mixup_alpha, cutmix_alpha: of the Beta distributions, see `mix`.

    Raises:
        UserError: the processor does not scale and normalize; RandAugment for other than three channels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        processor: BaseImageProcessor,
        num_classes: int,
        *,
        label_smoothing_factor: float = 0.0,
        crop_padding: int = 0,
        horizontal_flip: float = 0.0,
        affine_degrees: float = 0.0,
        affine_translate: float = 0.0,
        affine_scale: float = 0.0,
        affine_shear: float = 0.0,
        randaugment_num_ops: int = 0,
        randaugment_magnitude: float = 9.0,
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ):
        super().__init__()
        if not (processor.do_rescale and processor.do_normalize):
            raise UserError("preprocessor_config.json: expected do_rescale and do_normalize to be true")
        if randaugment_num_ops and len(processor.image_mean) != 3:
            channels = len(processor.image_mean)
            raise UserError(f"--randaugment_num_ops needs RGB images, got {channels} channels")
        self.num_classes, self.label_smoothing_factor = num_classes, label_smoothing_factor
        self.crop_padding, self.horizontal_flip, self.random_erasing = crop_padding, horizontal_flip, random_erasing
        self.rand_augment = RandAugment(randaugment_num_ops, randaugment_magnitude) if randaugment_num_ops else None
        self.affine = {}
        if affine_degrees or affine_translate or affine_scale or affine_shear:
            self.affine = {"degrees": affine_degrees, "translate": affine_translate}
            self.affine |= {"scale": affine_scale, "shear": affine_shear}
        alphas = {"mixup": mixup_alpha, "cutmix": cutmix_alpha}
        self.betas = {name: torch.distributions.Beta(alpha, alpha) for name, alpha in alphas.items() if alpha}
        self.max_value = 1 / processor.rescale_factor  # 255; a product with its inverse would differ in the last bit
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None], persistent=False)

    def scale(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().div_(self.max_value)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32, the processor's pixel_values bit for bit."""
        return self.scale(pixels).sub_(self.mean).div_(self.std)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Classes (B,) or float labels (B, K) -> smoothed targets (B, K)."""
        if labels.is_floating_point():
            targets = labels
        else:
            targets = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).float()
        if self.label_smoothing_factor:
            targets = targets * (1 - self.label_smoothing_factor) + self.label_smoothing_factor / self.num_classes
        return targets

    def draw(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The draws of a batch on the device of its pixels: tables (n, B) by operation, and noise for erasing."""
        (B, _, H, W), device, draws, noise = pixels.shape, pixels.device, {}, None
        if self.crop_padding:
            draws["crop"] = draw_crop(B, self.crop_padding)
        if self.horizontal_flip:
            draws["flip"] = draw_flip(B, self.horizontal_flip)
        if self.affine:
            draws["affine"] = draw_affine(B, H, W, **self.affine)
        if self.rand_augment:
            draws["rand_augment"] = self.rand_augment.draw(B, H, W)
        if self.random_erasing:
            draws["erase"] = draw_erase(B, H, W, self.random_erasing)
            noise = torch.randn(pixels.shape, device=device)
        if self.betas:
            draws["mix"] = draw_mix(B, H, W, self.betas)
        if not draws:
            return {}, None
        table = torch.from_numpy(np.concatenate(list(draws.values()), dtype=np.float32))  # one copy for all
        table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
        return dict(zip(draws, table.split([len(rows) for rows in draws.values()]))), noise

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.apply_draws(pixels, labels, *self.draw(pixels))

    def compile(self):
        """Compiles what happens on the device."""
        self.apply_draws = torch.compile(self.apply_draws, dynamic=False)

    def apply_draws(self, pixels, labels, draws, noise) -> tuple[torch.Tensor, torch.Tensor]:
        targets = self.targets(labels)
        x = padded_crop(pixels, draws["crop"], self.crop_padding) if "crop" in draws else pixels
        x = flip(x, draws["flip"][0]) if "flip" in draws else x
        x = self.scale(x)
        x = warp(x, draws["affine"], "border") if "affine" in draws else x
        x = self.rand_augment(x, draws["rand_augment"]) if "rand_augment" in draws else x
        x = x.sub_(self.mean).div_(self.std)
        x = torch.where(rectangles(draws["erase"], x), noise, x) if "erase" in draws else x
        return mix(x, targets, draws["mix"]) if "mix" in draws else (x, targets)
