"""The plots of a run: curves.png, confusion.png and predictions.png."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit
from ..data.labels import Labels
from ..data.streaming import StreamingSplit
from ..files import read_metrics
from .metrics import Evaluation, captions

TITLES = {
    "loss": "loss",
    "top1": "top-1 accuracy (%)",
    "map": "mean average precision (%)",
    "mae": "mean absolute error",
    "lr": "learning rate",
}
FEW_CLASSES = 30  # a confusion matrix of more classes has no room for names and counts
SAMPLES = 32  # images in predictions.png


def plot_run(
    folder: Path,
    name: str | None,
    labels: Labels,
    result: Evaluation | None,
    predictions: tuple[torch.Tensor, list[tuple[str, bool]]] | None,
):
    """Writes all plots of a run that its data allows.

    Args:
        name, result: the evaluated split, if any.
        predictions: see `predict_samples`.
    """
    plot_curves(folder)
    if result is not None and result.confusion is not None:
        title = f"{name}: {result.values['correct']} of {result.values['count']} correct"
        plot_confusion(result.confusion.numpy(), labels.class_names, title, folder / "confusion.png")
    if predictions is not None:
        plot_predictions(*predictions, folder / "predictions.png")


@torch.no_grad()
def predict_samples(
    model: torch.nn.Module, split: MapStyleSplit | StreamingSplit, augment: Augment
) -> tuple[torch.Tensor, list[tuple[str, bool]]] | None:
    """Some images (B, C, H, W), uint8, of a split and their captions; None if they cannot be shown.

    Called by every process, since a model may be spread over all of them.
    """
    samples = split.samples(SAMPLES) if split.data.channels in (1, 3) else []
    if not samples:
        return None
    pixels, targets = torch.stack([image for image, _ in samples]), [target for _, target in samples]
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # no compilation for one batch
        logits = model(augment.normalize(pixels.to(augment.mean.device))).logits.float().cpu()
    return pixels, captions(logits, targets, split.data.labels)


def plot_curves(folder: Path):
    """Writes curves.png: loss, accuracy and learning rate over the steps in metrics.jsonl."""
    series = defaultdict(list)
    for record in read_metrics(folder):
        name = record["split"] + (" (averaged weights)" if record.get("weights") == "ema" else "")
        for quantity in TITLES:
            if quantity in record and record["split"] != "test":
                series[quantity, name].append((record["step"], record[quantity]))
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
    """Writes the confusion matrix: counts (K, K) of images of each class (row) predicted as each class (column)."""
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(class_names) <= FEW_CLASSES
    side = max(4.5, 0.45 * len(class_names)) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=150)
    axis = figure.subplots()
    shown = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, shrink=0.8, label="fraction of the class")
    axis.set(title=title, xlabel="predicted class", ylabel="class")
    if few:
        ticks = range(len(class_names))
        upright = max(map(len, class_names)) <= 2
        axis.set_xticks(ticks, class_names, rotation=0 if upright else 45, ha="center" if upright else "right")
        axis.set_yticks(ticks, class_names)
        for row, column in zip(*counts.nonzero()):
            ink = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=ink, fontsize=8)
    figure.savefig(path)


def plot_predictions(pixels: torch.Tensor, captions: list[tuple[str, bool]], path: Path):
    """Writes a grid of images (B, C, H, W), uint8, C = 1 or 3, with captions, red if the prediction is wrong."""
    images = pixels.permute(0, 2, 3, 1).cpu().numpy()
    (count, height, width, channels), columns = images.shape, 8
    rows, gap = math.ceil(count / columns), 0.2  # for a caption, as a fraction of the height
    figure = Figure(figsize=(1.35 * columns, 1.35 * rows * (1 + gap) * height / width), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows * (1 + gap), 0))
    axis.axis("off")
    for number, (image, (caption, is_correct)) in enumerate(zip(images, captions)):
        row, column = divmod(number, columns)
        top, left = row * (1 + gap) + gap, column + 0.03
        shown = image if channels == 3 else image[..., 0]
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(left, left + 0.94, top + 0.97, top), aspect="auto")
        ink = "black" if is_correct else "tab:red"
        axis.text(left + 0.47, top - 0.04, caption, fontsize=7, color=ink, ha="center", va="bottom")
    figure.savefig(path)
