"""RandAugment for a whole batch in a fixed number of operations, without waiting for the device.

`B` batch, `C` channels, `H W` pixels. What happens to each image is drawn on the CPU; see `RandAugment.draw`.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DRAWS_VERSION = 2  # of what RandAugment draws from a seed; version 1 drew one round after the other


# RandAugment's operations. Ranges are those of the reference implementation, except that a sign is drawn wherever there
# are two directions, and that a larger magnitude always changes more.
OPERATIONS = (
    *("Identity", "AutoContrast", "Equalize", "Posterize", "Solarize", "Brightness", "Color", "Contrast", "Sharpness"),
    *("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
GRAY = 0.299, 0.587, 0.114  # weights of red, green and blue


def per_image(values: torch.Tensor) -> torch.Tensor:
    return values[..., None, None, None]  # (..., B) -> (..., B, 1, 1, 1)


def warp(x: torch.Tensor, maps: torch.Tensor, padding_mode: str) -> torch.Tensor:
    """Bilinear samples of x (B, C, H, W) at the places to which `maps` sends the pixels of the result.

    Args:
        maps: rows of the 2 x 3 matrices, (6, B), between coordinates in which an image spans [-1, 1].
        padding_mode: of `F.grid_sample`.
    """
    (H, W), (a, b, c) = x.shape[2:], maps.view(2, 3, -1, 1, 1).unbind(1)  # 3 x (2, B, 1, 1)
    horizontal = torch.linspace(1 / W - 1, 1 - 1 / W, W, device=x.device)
    vertical = torch.linspace(1 / H - 1, 1 - 1 / H, H, device=x.device)[:, None]
    grid = torch.addcmul(torch.addcmul(c, a, horizontal), b, vertical)  # (2, B, H, W), x and y of each source
    return F.grid_sample(x, grid.permute(1, 2, 3, 0), padding_mode=padding_mode, align_corners=False)


@functools.lru_cache
def motion_maps(magnitude: float, H: int, W: int) -> np.ndarray:
    """The map for `warp` of each operation in both directions, (operations, 2, 3, 3); the identity for colors.

    A map leads from a pixel of the result to its source, hence the signs; a shear keeps the first row or column.
    """
    maps = np.tile(np.eye(3, dtype=np.float32), (len(OPERATIONS), 2, 1, 1))
    for side, s in enumerate((magnitude / 10, -magnitude / 10)):
        cos, sin = math.cos(math.radians(30) * s), math.sin(math.radians(30) * s)
        row_x, row_y = {"Rotate": [cos, -sin * H / W, 0]}, {"Rotate": [sin * W / H, cos, 0]}
        row_x |= {"ShearX": [1, -0.3 * s * H / W, -0.3 * s * (H - 1) / W], "TranslateX": [1, 0, -0.9 * s]}
        row_y |= {"ShearY": [-0.3 * s * W / H, 1, -0.3 * s * (W - 1) / H], "TranslateY": [0, 1, -0.9 * s]}
        for row, found in enumerate((row_x, row_y)):
            for name, values in found.items():
                maps[NUMBER[name], side, row] = values
    return maps


class RandAugment(nn.Module):
    """(B, 3, H, W) in [0, 1] -> the same: `num_ops` operations, drawn for each image; magnitude in [0, 10].

    Cubuk et al., 2019, arXiv:1909.13719, section 3. All geometric operations of an image are one map with a single
    interpolation, and gray is what moves in from outside. It comes between the last color operation and those before,
    so that one or two operations keep their order. Colors have 256 levels, as in the reference implementation.
    """

    linear: torch.Tensor
    levels: torch.Tensor

    def __init__(self, num_ops: int, magnitude: float):
        super().__init__()
        self.num_ops, self.magnitude = num_ops, magnitude
        strength = torch.tensor([magnitude / 10, -magnitude / 10])
        gray, same, factor = torch.tensor(GRAY).expand(3, 3), torch.eye(3), (1 + 0.9 * strength)[:, None, None]
        # The new color is a matrix times the color plus one times the mean color, side by side: (operations, 2, 3, 6).
        linear = F.pad(same, (0, 3)).repeat(len(OPERATIONS), 2, 1, 1)
        linear[NUMBER["Brightness"], :, :, :3] = factor * same
        linear[NUMBER["Color"], :, :, :3] = factor * same + (1 - factor) * gray
        linear[NUMBER["Contrast"]] = torch.cat([factor * same, (1 - factor) * gray], 2)
        self.register_buffer("linear", linear.flatten(0, 1), persistent=False)
        # Where a level goes: (operations, 2, 256).
        level, step = torch.arange(256), 2 ** round(4 * magnitude / 10)  # of 8 bits, up to 4 are dropped
        levels = (level / 255).repeat(len(OPERATIONS), 2, 1)
        levels[NUMBER["Posterize"]] = level // step * step / 255
        levels[NUMBER["Solarize"]] = torch.where(level < 255 * (1 - magnitude / 10), level, 255 - level) / 255
        self.register_buffer("levels", levels.flatten(0, 1), persistent=False)

    def draw(self, B: int, H: int, W: int) -> np.ndarray:
        """An operation and a direction for each image and round, as a table for `forward`."""
        return self.table(torch.randint(2 * len(OPERATIONS), (self.num_ops, B)).numpy(), H, W)

    def table(self, drawn: np.ndarray, H: int, W: int) -> np.ndarray:
        """What happens to each image, (6 + 5 * num_ops, B), by what was drawn, (num_ops, B).

        The maps of the geometric operations take six rows. Integers follow, a row for each round: twice the operation,
        plus one for the other direction; an order of the images that begins with those to be stretched; one that begins
        with those to be sharpened. Last in these orders: how they are stretched, as `stretched` takes it; how much they
        are sharpened.
        """
        operation, direction = drawn // 2, 1 - 2 * (drawn % 2)
        maps = functools.reduce(np.matmul, motion_maps(self.magnitude, H, W).reshape(-1, 3, 3)[drawn])
        stretch = (operation == NUMBER["AutoContrast"]) + 2 * (operation == NUMBER["Equalize"])
        sharpen = 9 / 13 * 0.09 * self.magnitude * direction * (operation == NUMBER["Sharpness"])
        orders = [np.argsort(values == 0, 1, "stable") for values in (stretch, sharpen)]
        amounts = [np.take_along_axis(values, order, 1) for values, order in zip((stretch, sharpen), orders)]
        return np.concatenate([maps[:, :2].reshape(-1, 6).T, drawn, *orders, *amounts])

    def forward(self, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        maps, rounds = draws[:6], draws[6:].unflatten(0, (5, self.num_ops))
        integers, amounts = rounds[:3].long(), rounds[3:]
        for number in range(self.num_ops):
            if number == self.num_ops - 1:
                x = warp(x - 0.5, maps, "zeros").add_(0.5)
            x = self.change_colors(x, *integers[:, number], *amounts[:, number])
        return x

    def change_colors(self, x, drawn, stretch_order, sharpen_order, stretch, sharpen) -> torch.Tensor:
        """The color operations of one round of `draw`."""
        matrices = self.linear[drawn]  # (B, 3, 6)
        shift = matrices[:, :, 3:] @ x.mean((2, 3))[:, :, None]
        y = torch.baddbmm(shift, matrices[:, :, :3], x.flatten(2)).view_as(x)  # (B, 3, 3) x (B, 3, HW)
        # One image in 14 is sharpened and one in 7 stretched: this many slots hold them all but once in 10^11 batches.
        slots = len(x) // 8 + 16
        y.index_copy_(0, sharpen_order[:slots], sharpened(y[sharpen_order[:slots]], sharpen[:slots]))
        levels = y.clamp_(0, 1).mul_(255).round_().long().flatten(2)  # (B, 3, HW)
        table = self.levels[drawn][:, None].repeat(1, 3, 1)  # (B, 3, 256)
        slots = len(x) // 4 + 16
        chosen = stretch_order[:slots]
        table.index_copy_(0, chosen, self.stretched(levels[chosen], table[chosen], stretch[:slots, None, None]))
        return table.gather(2, levels).view_as(x)

    def stretched(self, levels: torch.Tensor, table: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """Where each level (B, C, 256) goes to fill the range, of levels (B, C, HW).

        Kind 1 moves the lowest and the highest level to the ends, kind 2 makes the histogram even; kind 0 and channels
        of one level keep their table.
        """
        counts = torch.zeros_like(table).scatter_add_(2, levels, torch.ones_like(levels, dtype=table.dtype))
        ramp = torch.where(kind == 2, counts.cumsum(2), self.levels[0])
        first, last = ramp.gather(2, levels.amin(2, keepdim=True)), ramp.gather(2, levels.amax(2, keepdim=True))
        return torch.where((kind > 0) & (last > first), ((ramp - first) / (last - first)).clamp_(0, 1), table)


def sharpened(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Moves x (B, C, H, W), in place, away from its blurred version, or towards it; the border stays, as in PIL."""
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    blurred = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # nine times the mean of 3 x 3 pixels
    inside = x[:, :, 1:-1, 1:-1]
    inside.addcmul_(torch.sub(inside, blurred, alpha=1 / 9), per_image(amount))
    return x
