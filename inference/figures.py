"""Figures of what a model looks at: maps of patches over images, at the images' own resolution.

H W pixels of the image, which may be larger than what the model takes; rows x columns patches. A box is the part of an
image that its patches cover: (left, upper, right, lower) in pixels, beyond the edges if the processor pads.
"""

import math
import textwrap

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from transformers import BaseImageProcessor

COLORS = colormaps["viridis"]  # brighter is more, in print and for the color-blind, too
BRIGHTEST = 0.99  # quantile of a map from which on all is as bright: single patches may take most of the attention
RANGE = ["lowest", "highest"]  # on a scale of colors
DPI = 150
PANEL = (400, 1000)  # least and most pixels of the longer side of a panel
MAX_RATIO = 10  # of the sides of a panel; a longer image is compressed
TITLE_SIZE, CAPTION_SIZE = 10, 9  # points
CAPTION = 2.2  # least inches for a caption: the panel may be narrower
LEAST_BAR = 2.5  # inches; in a lower figure, the scale of colors is at the bottom
MAX_PANELS = 7  # rows and columns of patches whose position is shown

Box = tuple[float, float, float, float]


def box_of(processor: BaseImageProcessor, width: int, height: int) -> Box:
    """The part of an image that its processor passes on: it resizes the image, then crops or pads at the center."""
    options = processor.to_dict()
    size, resized = options["size"] if options.get("do_resize") else {}, (width, height)
    if "shortest_edge" in size:
        shorter, longer = sorted(resized)
        edges = {shorter: size["shortest_edge"], longer: int(size["shortest_edge"] * longer / shorter)}
        resized = edges[width], edges[height]
    elif options.get("do_pad"):
        scale = min(size["width"] / width, size["height"] / height)
        resized = round(width * scale), round(height * scale)
    elif size:
        resized = size["width"], size["height"]
    crop = {"width": resized[0], "height": resized[1]}
    if options.get("do_center_crop") or options.get("do_pad"):
        crop = options["crop_size"] if options.get("do_center_crop") else size
    left, upper = (resized[0] - crop["width"]) // 2, (resized[1] - crop["height"]) // 2
    x, y = width / resized[0], height / resized[1]
    return left * x, upper * y, (left + crop["width"]) * x, (upper + crop["height"]) * y


def spread(values: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """The value (rows, columns, ...) of the patch that covers each pixel, (H, W, ...), NaN where there is no patch."""
    (left, upper, right, lower), (rows, columns) = box, values.shape[:2]
    row = np.floor((np.arange(height) + 0.5 - upper) / (lower - upper) * rows).astype(int)
    column = np.floor((np.arange(width) + 0.5 - left) / (right - left) * columns).astype(int)
    result = values[row.clip(0, rows - 1)][:, column.clip(0, columns - 1)].astype(np.float32)
    result[(row < 0) | (row >= rows)] = np.nan
    result[:, (column < 0) | (column >= columns)] = np.nan
    return result


def overlay(image: np.ndarray, values: torch.Tensor, box: Box) -> np.ndarray:
    """A map (rows, columns) in colors over an image, uint8 (H, W, 3); what the model does not see is gray and dim."""
    return blend(image, COLORS(scaled(values).numpy())[..., :3], box)


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map of (..., rows, columns) from its lowest value, 0, to its highest ones, 1."""
    values = maps.flatten(-2)
    low, high = values.amin(dim=-1)[..., None, None], values.quantile(BRIGHTEST, dim=-1)[..., None, None]
    return ((maps - low) / (high - low).clamp(min=1e-12)).clamp(max=1)


def blend(image: np.ndarray, colors: np.ndarray, box: Box, strength: float = 0.65) -> np.ndarray:
    """Colors of patches (rows, columns, 3), in [0, 1], over the shades of an image; uint8 (H, W, 3)."""
    shades = image.mean(axis=-1, keepdims=True, dtype=np.float32) / 255
    covered = spread(colors, box, *image.shape[:2])
    mixed = np.where(np.isnan(covered), 0.25 * shades + 0.6, (1 - strength) * shades + strength * covered)
    return (255 * mixed).round().astype(np.uint8)


def wrapped(text: str, inches: float, size: int) -> str:
    """A text in as many lines as a width needs with the present font in this size, in points."""
    font = FontProperties(size=size)
    for characters in range(max(len(text), 1), 0, -1):
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, characters)]
        if all(text_to_path.get_text_width_height_descent(line, font, False)[0] <= 72 * inches for line in lines):
            break
    return "\n".join(lines)


def draw_panels(
    panels: list[list[tuple[str, np.ndarray]]],
    title: str,
    bar: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Rows of images (H, W, 3) with captions, and what bright means.

    Args:
        size: width and height in pixels of what a panel shows; by default, those of the first image.
    """
    width, height = size or panels[0][0][1].shape[1::-1]
    ratio = min(max(width / height, 1 / MAX_RATIO), MAX_RATIO)
    longest = min(max(max(height, width), PANEL[0]), PANEL[1]) / DPI
    panel_width, panel_height = max(longest * min(ratio, 1), CAPTION), longest / max(ratio, 1)
    fitted = {caption: wrapped(caption, panel_width - 0.1, CAPTION_SIZE) for line in panels for caption, _ in line}
    more_lines = sum(max(fitted[caption].count("\n") for caption, _ in line) for line in panels)
    columns = max(map(len, panels))
    inches = columns * (panel_width + 0.1), len(panels) * (panel_height + 0.3) + 0.15 * more_lines
    is_low = inches[1] < LEAST_BAR
    if bar:
        inches = (inches[0], inches[1] + 0.6) if is_low else (inches[0] + 1, inches[1])
    title = wrapped(title, inches[0] - 0.1, TITLE_SIZE)
    figure = Figure((inches[0], inches[1] + 0.4 + 0.15 * title.count("\n")), DPI, layout="constrained")
    figure.suptitle(title, fontsize=TITLE_SIZE)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, panels):
        for axis, (caption, image) in zip(row, line):
            axis.imshow(image, interpolation="nearest", aspect=width / height / ratio)
            axis.set_title(fitted[caption], fontsize=CAPTION_SIZE)
    if bar:
        place = {"location": "bottom", "aspect": 8 * inches[0]} if is_low else {"aspect": 30}
        scale = figure.colorbar(ScalarMappable(Normalize(0, 1), COLORS), ax=axes, shrink=0.8, label=bar, **place)
        scale.set_ticks([0, 1], labels=RANGE)
    return figure


def draw_grid(image: np.ndarray, box: Box, grid: tuple[int, int]) -> Figure:
    """The patches of an image."""
    left, upper, right, lower = box
    is_seen = ~np.isnan(spread(np.zeros((*grid, 1)), box, *image.shape[:2]))
    shown = np.where(is_seen, image, blend(image, np.zeros((*grid, 3)), box))
    note = "" if is_seen.all() else "; the model does not see what is gray"
    height, width = image.shape[:2]
    x, y = (min(left, 0), max(right, width)), (min(upper, 0), max(lower, height))
    size = (x[1] - x[0], y[1] - y[0])
    figure = draw_panels([[("", shown)]], f"{grid[0]} x {grid[1]} patches{note}", size=size)
    axis = figure.axes[0]
    for color, thickness in (("black", 0.8), ("white", 0.4)):  # visible on any image
        axis.hlines(np.linspace(upper, lower, grid[0] + 1) - 0.5, left - 0.5, right - 0.5, color, linewidth=thickness)
        axis.vlines(np.linspace(left, right, grid[1] + 1) - 0.5, upper - 0.5, lower - 0.5, color, linewidth=thickness)
    axis.set(xlim=(x[0] - 0.5, x[1] - 0.5), ylim=(y[1] - 0.5, y[0] - 0.5))
    return figure


def draw_mosaic(maps: torch.Tensor, title: str, labels: tuple[str, str], bar: str, own_range: bool = True) -> Figure:
    """Maps (n, m, rows, columns) as n rows of m small ones.

    Args:
        labels: what the n rows and the m columns are.
        own_range: each map has colors of its own from its lowest to its highest value; otherwise all share one range.
    """
    (n, m, rows, columns), gap = maps.shape, max(1, round(max(maps.shape[2:]) / 12))
    if own_range:
        maps = scaled(maps)
    cells = torch.full((n, m, rows + gap, columns + gap), math.nan)
    cells[..., :rows, :columns] = maps
    mosaic = cells.permute(0, 2, 1, 3).reshape(n * (rows + gap), m * (columns + gap))[:-gap, :-gap]
    side = min(0.9, 12 / max(n, m)) / max(rows, columns)
    inches = max(mosaic.shape[1] * side + 2, 2 * CAPTION), max(mosaic.shape[0] * side + 1, LEAST_BAR)
    figure = Figure(inches, DPI, layout="constrained")
    figure.suptitle(wrapped(title, inches[0] - 0.1, TITLE_SIZE), fontsize=TITLE_SIZE)
    axis = figure.subplots()
    norm = Normalize(0, 1) if own_range else None
    shown = axis.imshow(mosaic.numpy(), cmap=COLORS, norm=norm, interpolation="nearest")
    axis.set(xlabel=labels[1], ylabel=labels[0])
    axis.set_xticks(np.arange(m) * (columns + gap) + (columns - 1) / 2, [str(column) for column in range(m)])
    axis.set_yticks(np.arange(n) * (rows + gap) + (rows - 1) / 2, [str(row) for row in range(n)])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    scale = figure.colorbar(shown, shrink=0.8, aspect=30, label=bar)
    if own_range:
        scale.set_ticks([0, 1], labels=RANGE)
    return figure


def some_positions(similarity: torch.Tensor) -> tuple[list[int], list[int]]:
    """Rows and columns, evenly spaced, of the patches that a figure has room for."""
    return tuple(
        np.linspace(0, side - 1, min(side, MAX_PANELS)).round().astype(int).tolist() for side in similarity.shape[:2]
    )


def draw_positions(similarity: torch.Tensor) -> Figure:
    """How alike the position of some patches is to those of all, from (rows, columns, rows, columns)."""
    rows, columns = some_positions(similarity)
    title = "Each map compares one patch's position with the positions of all patches"
    labels = ("row of the patch", "column of the patch")
    figure = draw_mosaic(similarity[rows][:, columns], title, labels, "cosine similarity", own_range=False)
    axis = figure.axes[0]
    axis.set_xticks(axis.get_xticks(), [str(column) for column in columns])
    axis.set_yticks(axis.get_yticks(), [str(row) for row in rows])
    return figure
