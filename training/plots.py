"""The plots of a run, which its model card shows."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit
from ..data.labels import MULTI, Labels
from ..data.streaming import StreamingSplit
from ..files import read_metrics, shorten
from ..inference.attention import position_similarity
from ..inference.explanation import explain_pixels
from ..inference.figures import draw_panels, draw_positions
from ..inference.fonts import plain_text, readable_names
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .lora import ADAPTER_CONFIG, load_merged
from .metrics import Evaluation, captions
from .mistakes import NAME_WIDTH, Samples, mistake_captions
from .report import optional

TITLES = {
    "loss": "loss",
    "top1": "top-1 accuracy (%)",
    "map": "mean average precision (%)",
    "mae": "mean absolute error",
    "lr": "learning rate",
}
FEW_CLASSES = 30  # a confusion matrix of more classes has no room for names and counts
FEW_PREDICTIONS, PALE = 10, "#c6dbef"  # a bar of fewer predictions says little
SAMPLES = 32  # images in predictions.png
EXPLAINED = 4  # images in attention.png
OF_DATA = ("predictions.png", "mistakes.png", "attention.png")  # plots that show images of the dataset


@torch.no_grad()
def predict_samples(model: torch.nn.Module, split: MapStyleSplit | StreamingSplit, augment: Augment) -> Samples | None:
    """Some images of a split and what the model predicts; None if they cannot be shown.

    Called by every process, since a model may be spread over all of them.
    """
    samples = split.samples(SAMPLES) if split.data.channels in (1, 3) else []
    if not samples:
        return None
    pixels, targets = torch.stack([image for image, _ in samples]), [target for _, target in samples]
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # no compilation for one batch
        pixel_values = augment.normalize(pixels.to(augment.get_buffer("mean").device))
        logits = model(pixel_values).logits.float().cpu()
    return Samples(pixels, logits, targets, pixel_values[:EXPLAINED].cpu())


def plot_run(
    folder: Path, name: str | None, labels: Labels, result: Evaluation | None, samples: Samples | None
) -> list[int]:
    """Writes all plots of a run that its data allows; a plot that fails is left out, and a line says so.

    Args:
        folder: of the run, with the checkpoint.
        name, result: the evaluated split, if any.
        samples: images of it that may be shown; without them, no plot shows an image.

    Returns:
        The classes that the plots show by number, because no font has the characters of their names.
    """
    class_names, families, numbered = readable_names(labels.class_names)
    shown = dataclasses.replace(labels, class_names=class_names)
    model = functools.cache(lambda: load_result(folder))
    for file in OF_DATA:
        (folder / file).unlink(missing_ok=True)  # of an earlier run in this folder
    with plain_text(families):
        draw(folder / "curves.png", lambda: plot_curves(read_metrics(folder)))
        if result is not None and result.confusion is not None:
            title = f"{name}: {result.values['correct']} of {result.values['count']} correct"
            draw(folder / "confusion.png", lambda: plot_confusion(result.confusion.numpy(), class_names, title))
        if result is not None and result.reliability:
            draw(folder / "reliability.png", lambda: plot_reliability(result, name, labels.problem_type))
        if samples is not None:
            draw(folder / "predictions.png", lambda: plot_predictions(samples, shown))
            if result.mistakes is not None and result.mistakes.pixels.ndim == 4:  # not features of a frozen backbone
                draw(folder / "mistakes.png", lambda: plot_mistakes(result.mistakes, shown))
            draw(folder / "attention.png", lambda: plot_attention(model(), samples, shown))
        draw(folder / "positions.png", lambda: plot_positions(model()))
    return numbered


def load_result(folder: Path) -> ViTSimpleForImageClassification:
    """The checkpoint in a run's folder, on the CPU: the trained model may be compiled or spread over processes."""
    shows_progress = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        if (folder / ADAPTER_CONFIG).exists():
            return load_merged(folder)
        return ViTSimpleForImageClassification.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shows_progress:
            enable_progress_bar()


def draw(path: Path, plot: Callable[[], Figure]):
    """Writes a plot under another name and renames it; if it fails, an older plot of other weights does not remain."""
    unfinished = path.with_name(f".{path.name}")
    with optional(path.name):
        try:
            plot().savefig(unfinished)
            unfinished.replace(path)
        except BaseException:
            for file in (unfinished, path):
                file.unlink(missing_ok=True)
            raise


def plot_curves(metrics: list[dict]) -> Figure:
    """Loss, accuracy and learning rate over the steps."""
    series = defaultdict(list)
    for record in metrics:
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
    return figure


def plot_confusion(counts: np.ndarray, class_names: list[str], title: str) -> Figure:
    """The confusion matrix: counts (K, K) of images of each class (row) predicted as each class (column)."""
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
        names = [shorten(name, NAME_WIDTH) for name in class_names]
        upright = max(map(len, names)) <= 2
        axis.set_xticks(ticks, names, rotation=0 if upright else 45, ha="center" if upright else "right")
        axis.set_yticks(ticks, names)
        for row, column in zip(*counts.nonzero()):
            ink = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=ink, fontsize=8)
    return figure


def plot_reliability(result: Evaluation, split: str, problem_type: str) -> Figure:
    """How often predictions come true, by their probability; beside it, the same after the temperature, if any."""
    titles = {"before": f"{split}, as trained", "after": f"{split}, divided by the temperature"}
    figure = Figure(figsize=(1 + 3.6 * len(result.reliability), 4.4), layout="constrained", dpi=150)
    options: dict = {"sharex": True, "sharey": "row", "height_ratios": (3, 1), "squeeze": False}
    for (name, bins), (axis, counts_axis) in zip(
        result.reliability.items(), figure.subplots(2, len(result.reliability), **options).T
    ):
        counts, _, hits = bins.numpy()
        edges = np.linspace(0, 1, len(counts) + 1)
        bars = {"width": np.diff(edges), "align": "edge", "edgecolor": "white"}
        colors = ["C0" if count >= FEW_PREDICTIONS else PALE for count in counts]
        axis.bar(edges[:-1], hits / np.maximum(counts, 1), color=colors, **bars)
        axis.plot((0, 1), (0, 1), ls="--", lw=1.2, color="black")
        values = result.values.get("calibration", {"before": result.values})[name]
        axis.set(title=f"{titles[name]}\nECE {values['expected_calibration_error']:.4f}", xlim=(0, 1), ylim=(0, 1))
        counts_axis.bar(edges[:-1], counts, color="0.5", **bars)
        counts_axis.set_yscale("symlog", linthresh=1)
        counts_axis.yaxis.set_major_formatter("{x:,.0f}")  # no formula, see `plain_text`
        for each in (axis, counts_axis):
            each.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("fraction that comes true")
    figure.axes[len(result.reliability)].set_ylabel("predictions")
    figure.supxlabel("probability" if problem_type == MULTI else "probability of the predicted class", fontsize=10)
    return figure


def plot_predictions(samples: Samples, labels: Labels) -> Figure:
    """A grid of images with captions, red if the prediction is wrong."""
    texts = captions(samples.logits, samples.targets, labels)
    return plot_images(samples.pixels, [(text, "black" if correct else "tab:red") for text, correct in texts], 8)


def plot_mistakes(samples: Samples, labels: Labels) -> Figure:
    """The images with the worst predictions, the worst first."""
    texts = mistake_captions(samples.logits, samples.targets, labels)
    return plot_images(samples.pixels, [(text, "black") for text in texts], 4)


def plot_images(pixels: torch.Tensor, texts: list[tuple[str, str]], columns: int) -> Figure:
    """A grid of images (B, C, H, W), uint8, each below its caption in a color."""
    images = pixels.permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = images.shape
    lines = 1 + max(text.count("\n") for text, _ in texts)
    rows, columns, gap = math.ceil(count / columns), min(columns, count), 0.2 * lines * width / height
    figure = Figure(figsize=(1.35 * columns, 1.35 * rows * (1 + gap) * height / width), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows * (1 + gap), 0))
    axis.axis("off")
    for number, (image, (caption, color)) in enumerate(zip(images, texts)):
        row, column = divmod(number, columns)
        top, left = row * (1 + gap) + gap, column + 0.03
        shown = image if channels == 3 else image[..., 0]
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(left, left + 0.94, top + 0.97, top), aspect="auto")
        axis.text(left + 0.47, top - 0.04, caption, fontsize=7, color=color, ha="center", va="bottom")
    return figure


def plot_attention(model: ViTSimpleForImageClassification, samples: Samples, labels: Labels) -> Figure:
    """Some images above the attention of the last block and the relevance for the prediction."""
    rows = [[], [], []]
    for pixels, pixel_values, (caption, _) in zip(
        samples.pixels, samples.pixel_values, captions(samples.logits, samples.targets, labels)
    ):
        image = pixels.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        found = explain_pixels(model, pixel_values[None], image, (0, 0, image.shape[1], image.shape[0]))
        overlays = found.over(found.attention[-1].mean(dim=0)), found.over(found.relevance)
        for row, text, panel in zip(rows, (caption, "attention", "relevance"), (image, *overlays)):
            row.append((text, panel))
    return draw_panels(rows, "", "attention or relevance in each map")


def plot_positions(model: ViTSimpleForImageClassification) -> Figure:
    return draw_positions(position_similarity(model, model.config.grid_size))
