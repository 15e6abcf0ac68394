"""The pictures of a run, from what it recorded."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TITLES = {
    "loss": "loss",
    "top1": "images right (%)",
    "map": "mean average precision (%)",
    "mae": "mean absolute error",
    "lr": "learning rate",
}
FEW_CLASSES = 30  # as many names and counts as a picture of the confusions has room for


def plot_curves(folder: Path):
    """Writes curves.png: loss, accuracy and learning rate over the steps in metrics.jsonl."""
    series = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["split"] + (" (averaged weights)" if row.get("weights") == "ema" else "")
        for quantity in TITLES:
            if quantity in row and row["split"] != "test":
                series[quantity, name].append((row["step"], row[quantity]))
    names = list(dict.fromkeys(name for _, name in series))
    figure = Figure(figsize=(11, 3.2), layout="constrained", dpi=150)
    titles = {name: title for name, title in TITLES.items() if name in {quantity for quantity, _ in series}}
    for axis, (quantity, title) in zip(figure.subplots(1, len(titles), sharex=True), titles.items()):
        for number, name in enumerate(names):
            if (quantity, name) in series:
                steps, values = np.array(series[quantity, name]).T
                values = values * (100 if quantity in ("top1", "map") else 1)
                axis.plot(
                    steps, values, marker="o" if len(steps) < 20 else "", ms=3, lw=1.2, c=f"C{number}", label=name
                )
        axis.set(title=title, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "curves.png")


def plot_confusion(counts: np.ndarray, class_names: list[str], title: str, path: Path):
    """Writes a picture of how often each class (a row of K) was taken for each class (a column of K)."""
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(class_names) <= FEW_CLASSES
    side = max(4.5, 0.45 * len(class_names)) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=150)
    axis = figure.subplots()
    shown = axis.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, shrink=0.8, label="part of the class")
    axis.set(title=title, xlabel="taken for", ylabel="class")
    if few:
        ticks = range(len(class_names))
        upright = max(map(len, class_names)) <= 2
        axis.set_xticks(ticks, class_names, rotation=0 if upright else 45, ha="center" if upright else "right")
        axis.set_yticks(ticks, class_names)
        for row, column in zip(*counts.nonzero()):
            ink = "white" if parts[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=ink, fontsize=8)
    figure.savefig(path)


def plot_predictions(pixels: torch.Tensor, captions: list[tuple[str, bool]], path: Path):
    """Writes a grid of images (B, C, H, W), uint8, of one channel or three; each with its caption, red where wrong."""
    images = pixels.permute(0, 2, 3, 1).cpu().numpy()
    (count, height, width, channels), columns = images.shape, 8
    rows, gap = math.ceil(count / columns), 0.2  # for a caption, as a part of the height
    figure = Figure(figsize=(1.35 * columns, 1.35 * rows * (1 + gap) * height / width), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows * (1 + gap), 0))
    axis.axis("off")
    for number, (image, (caption, right)) in enumerate(zip(images, captions)):
        row, column = divmod(number, columns)
        top, left = row * (1 + gap) + gap, column + 0.03
        shown = image if channels == 3 else image[..., 0]
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(left, left + 0.94, top + 0.97, top), aspect="auto")
        ink = "black" if right else "tab:red"
        axis.text(left + 0.47, top - 0.04, caption, fontsize=7, color=ink, ha="center", va="bottom")
    figure.savefig(path)
