"""The device side of the data: whole `uint8` batches to augmented, scaled and normalised float batches."""

import kornia.augmentation as K
import torch
from torch import nn
from transformers import BaseImageProcessor


class Augment(nn.Module):
    """uint8 (B, C, H, W) -> float32 (B, C, H, W): a random affine map per image, then what the processor does.

    Draws come from torch's global generator.

    Args:
        processor: the checkpoint's image processor, for its mean, standard deviation and scale.
        degrees: largest rotation, either way.
        translate: largest shift, either way, as a part of height and width.
        scale: largest change of size, either way, as a part of it.
        shear: largest horizontal shear in degrees, either way.
    """

    def __init__(self, processor: BaseImageProcessor, degrees=0.0, translate=0.0, scale=0.0, shear=0.0):
        super().__init__()
        self.white = 1 / processor.rescale_factor  # 255; a product with its inverse would differ in the last bit
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None], persistent=False)
        # The border is repeated: a shifted digit on a dark ground stays on a dark ground.
        self.affine = K.RandomAffine(
            degrees, (translate, translate), (1 - scale, 1 + scale), shear, padding_mode="border", p=1.0
        )
        self.is_identity = degrees == translate == scale == shear == 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.float() / self.white
        x = x if self.is_identity else self.affine(x)
        return (x - self.mean) / self.std
