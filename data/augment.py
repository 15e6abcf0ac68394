"""The device side of the data: whole `uint8` batches to augmented, normalised and mixed float batches.

`B` batch, `H W` pixels, `K` classes. Each image has draws of its own, from torch's global generator on the CPU, so that
a seed draws the same on every device; only the noise of erased rectangles is drawn where the images are.
"""

import kornia.augmentation as K
import kornia.enhance
import kornia.geometry
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor

# RandAugment's operations on (B, 3, H, W) in [0, 1], with a strength in [-1, 1] for each image, 0 for no change where
# that is possible. Ranges are those of the reference implementation, but that a sign is drawn wherever there are two
# directions, and that a larger magnitude always changes more.


def gray_outside(warp, x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """A map of the plane that leaves gray where the image has moved away."""
    return warp(x - 0.5, amount) + 0.5


def along(axis: int, amount: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 2): the amount along one axis, x being 0 and y 1."""
    zeros = torch.zeros_like(amount)
    return torch.stack([zeros, amount] if axis else [amount, zeros], 1)


def posterize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Keeps 8 bits at no strength and 4 at the full one."""
    step = 2 ** (4 * strength.abs()).round()[:, None, None, None]
    return ((x * 255).round() / step).floor() * step / 255


def equalize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Gives every channel an even histogram, all images at once; a channel of one level stays as it is."""
    levels = (x * 255).round().long().flatten(2)  # (B, 3, HW)
    histogram = torch.zeros(*levels.shape[:2], 256, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=histogram.dtype))
    below = histogram.cumsum(2)
    least = below.gather(2, levels.amin(2, keepdim=True))  # pixels of the lowest level, which becomes 0
    above = levels.shape[2] - least
    even = (below - least).gather(2, levels) / above.clamp(min=1)
    return torch.where(above > 0, even, x.flatten(2)).view_as(x)


def autocontrast(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Stretches every channel to [0, 1]; a channel of one level stays as it is."""
    least, most = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(most > least, (x - least) / (most - least).clamp(min=1e-6), x)


OPERATIONS = {
    "Identity": lambda x, s: x,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Posterize": posterize,
    "Solarize": lambda x, s: torch.where(x >= 1 - s.abs()[:, None, None, None], 1 - x, x),
    "Brightness": lambda x, s: kornia.enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s),
    "Color": lambda x, s: kornia.enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * s),
    "Contrast": lambda x, s: kornia.enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s),
    "Sharpness": lambda x, s: kornia.enhance.sharpness(x, 1 + 0.9 * s),
    "Rotate": lambda x, s: gray_outside(kornia.geometry.rotate, x, 30 * s),
    "ShearX": lambda x, s: gray_outside(kornia.geometry.shear, x, along(0, 0.3 * s)),
    "ShearY": lambda x, s: gray_outside(kornia.geometry.shear, x, along(1, 0.3 * s)),
    "TranslateX": lambda x, s: gray_outside(kornia.geometry.translate, x, along(0, 0.45 * x.shape[3] * s)),
    "TranslateY": lambda x, s: gray_outside(kornia.geometry.translate, x, along(1, 0.45 * x.shape[2] * s)),
}


def rand_augment(x: torch.Tensor, num_ops: int, magnitude: float) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> the same: `num_ops` operations, drawn for each image; magnitude in [0, 10].

    Cubuk et al., 2019, arXiv:1909.13719, section 3. Images with the same operation are changed together.
    """
    x = x.clone()
    for _ in range(num_ops):
        drawn = torch.randint(len(OPERATIONS), (len(x),))
        strength = magnitude / 10 * (1 - 2 * torch.randint(2, (len(x),)))
        for number, operation in enumerate(OPERATIONS.values()):
            rows = (drawn == number).nonzero()[:, 0]
            if len(rows) and number:
                rows_there = rows.to(x.device, non_blocking=True)
                changed = operation(x[rows_there], strength[rows].to(x.device, non_blocking=True))
                x.index_copy_(0, rows_there, changed.clamp(0, 1))
    return x


def padded_crop(x: torch.Tensor, padding: int) -> torch.Tensor:
    """(B, C, H, W) -> the same: each image moved by up to `padding` pixels either way, black where it was not."""
    rows, (height, width) = torch.arange(len(x)), x.shape[2:]
    down, right = torch.randint(2 * padding + 1, (2, len(x)))
    windows = F.pad(x, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    rows, down, right = (index.to(x.device, non_blocking=True) for index in (rows, down, right))
    return windows[rows, :, down, right]


def random_flip(x: torch.Tensor, probability: float) -> torch.Tensor:
    rows = (torch.rand(len(x)) < probability).nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.index_copy(0, rows, x[rows].flip(3))


def rectangles(top: torch.Tensor, left: torch.Tensor, height: torch.Tensor, width: torch.Tensor, like: torch.Tensor):
    """True within a rectangle of each image, (B, 1, H, W); all four in pixels (B,), which may lie outside."""
    top, left, height, width = (
        side[:, None, None, None].to(like.device, non_blocking=True) for side in (top, left, height, width)
    )
    y = torch.arange(like.shape[2], device=like.device)[:, None]
    x = torch.arange(like.shape[3], device=like.device)
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def random_erase(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Normal noise in one rectangle of 2 % to a third of the image, of ratio 0.3 to 3.3.

    Zhong et al., 2017, arXiv:1708.04896, section 3. A side that would be longer than the image is cut to it.
    """
    H, W = x.shape[2:]
    area = torch.empty(len(x)).uniform_(0.02, 1 / 3) * H * W
    ratio = torch.empty(len(x)).uniform_(-1, 1).mul(torch.tensor(3.3).log()).exp()
    height, width = (area * ratio).sqrt().clamp(max=H), (area / ratio).sqrt().clamp(max=W)
    top, left = torch.rand(len(x)) * (H - height), torch.rand(len(x)) * (W - width)
    height = torch.where(torch.rand(len(x)) < probability, height, 0)
    return torch.where(rectangles(top.round(), left.round(), height.round(), width.round(), x), torch.randn_like(x), x)


def mix(x: torch.Tensor, targets: torch.Tensor, mixup_alpha: float, cutmix_alpha: float):
    """Images (B, C, H, W) and targets (B, K), each mixed with those of the next image.

    mixup (Zhang et al., 2017, arXiv:1710.09412, section 2) adds two images; CutMix (Yun et al., 2019, arXiv:1905.04899,
    section 3.1) puts a rectangle of one into the other. Where both are on, each image has one of them at even odds.
    A target gets the share that its image has in the pixels, so that the sum of targets stays what it was.
    """
    B, _, H, W = x.shape
    cut = torch.rand(B) < bool(cutmix_alpha) / (bool(cutmix_alpha) + bool(mixup_alpha))
    kept = torch.ones(B)
    for alpha, chosen in ((mixup_alpha, ~cut), (cutmix_alpha, cut)):
        if alpha:
            kept = torch.where(chosen, torch.distributions.Beta(alpha, alpha).sample((B,)), kept)
    side = (1 - kept).sqrt()
    top, left = torch.rand(B) * H - side * H / 2, torch.rand(B) * W - side * W / 2
    inside = rectangles(top.round(), left.round(), (side * H).round(), (side * W).round(), x)
    cut, kept = (draw[:, None, None, None].to(x.device, non_blocking=True) for draw in (cut, kept))
    weight = torch.where(cut, 1.0 - inside.float(), kept)  # of the image itself, (B, 1, H, W)
    share = weight.mean((2, 3))
    return x * weight + x.roll(1, 0) * (1 - weight), targets * share + targets.roll(1, 0) * (1 - share)


class Augment(nn.Module):
    """uint8 (B, C, H, W) and labels -> float32 (B, C, H, W) and targets (B, K), as the loss takes them.

    Classes (B,) become one-hot; float labels (B, K), of several classes or a number, are mixed as they are.

    In this order: padded crop, flip, affine map, RandAugment, normalisation, erasing, mixup or CutMix; what is left at
    its default is off.

    Args:
        processor: the checkpoint's image processor, for its mean, standard deviation and scale.
        num_classes: K.
        label_smoothing_factor: the part of each target that is spread over all classes, in [0, 1); for classes (B,).
        crop_padding: pixels of the padding around an image that is then cropped at random.
        horizontal_flip: probability.
        affine_degrees: largest rotation, either way; the border is repeated.
        affine_translate: largest shift, either way, as a part of height and width.
        affine_scale: largest change of size, either way, as a part of it.
        affine_shear: largest horizontal shear in degrees, either way.
        randaugment_num_ops, randaugment_magnitude: see `rand_augment`.
        random_erasing: probability, see `random_erase`.
        mixup_alpha, cutmix_alpha: of the Beta distributions, see `mix`.

    Raises:
        ValueError: the processor does not scale and normalise; RandAugment for other than three channels.
    """

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
            raise ValueError("processor: expected do_rescale and do_normalize, got one that leaves pixels as they are")
        if randaugment_num_ops and len(processor.image_mean) != 3:
            channels = len(processor.image_mean)
            raise ValueError(f"--randaugment_num_ops: expected 0 for images of {channels} channels, it is made for RGB")
        self.num_classes, self.label_smoothing_factor = num_classes, label_smoothing_factor
        self.crop_padding, self.horizontal_flip, self.random_erasing = crop_padding, horizontal_flip, random_erasing
        self.randaugment_num_ops, self.randaugment_magnitude = randaugment_num_ops, randaugment_magnitude
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.max_value = 1 / processor.rescale_factor  # 255; a product with its inverse would differ in the last bit
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None], persistent=False)
        shift, size = (affine_translate, affine_translate), (1 - affine_scale, 1 + affine_scale)
        self.affine = None
        if affine_degrees or affine_translate or affine_scale or affine_shear:
            self.affine = K.RandomAffine(affine_degrees, shift, size, affine_shear, padding_mode="border", p=1.0)

    def scale(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().div_(self.max_value)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32, the processor's pixel_values bit for bit."""
        return self.scale(pixels).sub_(self.mean).div_(self.std)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = labels if labels.is_floating_point() else F.one_hot(labels, self.num_classes).float()
        if self.label_smoothing_factor:
            targets = targets.lerp(torch.full_like(targets, 1 / self.num_classes), self.label_smoothing_factor)
        x = padded_crop(pixels, self.crop_padding) if self.crop_padding else pixels
        x = random_flip(x, self.horizontal_flip) if self.horizontal_flip else x
        x = self.scale(x)
        x = x if self.affine is None else self.affine(x)
        x = rand_augment(x, self.randaugment_num_ops, self.randaugment_magnitude) if self.randaugment_num_ops else x
        x = x.sub_(self.mean).div_(self.std)
        x = random_erase(x, self.random_erasing) if self.random_erasing else x
        if self.mixup_alpha or self.cutmix_alpha:
            x, targets = mix(x, targets, self.mixup_alpha, self.cutmix_alpha)
        return x, targets
