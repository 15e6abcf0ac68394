"""The plots of a run: curves.png, confusion.png and predictions.png."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit
from ..data.labels import Labels
from ..data.streaming import StreamingSplit
from ..files import printable, read_metrics
from .metrics import Evaluation, captions
from .report import optional

TITLES = {
    "loss": "loss",
    "top1": "top-1 accuracy (%)",
    "map": "mean average precision (%)",
    "mae": "mean absolute error",
    "lr": "learning rate",
}
FEW_CLASSES = 30  # a confusion matrix of more classes has no room for names and counts
REGULAR = range(300, 501)  # weights of fonts that are neither thin nor bold
SAMPLES = 32  # images in predictions.png


@dataclasses.dataclass
class Samples:
    """Images (B, C, H, W), uint8, C = 1 or 3, the model's logits (B, K) for them, and their labels."""

    pixels: torch.Tensor
    logits: torch.Tensor
    targets: list


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
        logits = model(augment.normalize(pixels.to(augment.get_buffer("mean").device))).logits.float().cpu()
    return Samples(pixels, logits, targets)


def plot_run(
    folder: Path, name: str | None, labels: Labels, result: Evaluation | None, samples: Samples | None
) -> list[int]:
    """Writes all plots of a run that its data allows; a plot that fails is left out, and a line says so.

    Args:
        name, result, samples: the evaluated split, if any.

    Returns:
        The classes that the plots show by number, because no font has the characters of their names.
    """
    class_names, families, numbered = readable_names(labels.class_names)
    # Without these, a class named "$5_$10" would be parsed as a formula.
    with rc_context({"text.parse_math": False, "text.usetex": False, "font.family": families}):
        draw(folder / "curves.png", lambda: plot_curves(read_metrics(folder)))
        if result is not None and result.confusion is not None:
            title = f"{name}: {result.values['correct']} of {result.values['count']} correct"
            draw(folder / "confusion.png", lambda: plot_confusion(result.confusion.numpy(), class_names, title))
        if samples is not None:
            shown = dataclasses.replace(labels, class_names=class_names)
            draw(folder / "predictions.png", lambda: plot_predictions(samples, shown))
    return numbered


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


def readable_names(class_names: list[str]) -> tuple[list[str], list[str], list[int]]:
    """The class names as the fonts of this machine can draw them, these fonts, and the classes that became a number."""
    names = [printable(name) for name in class_names]
    families, missing = fonts_for({character for name in names for character in name})
    numbered = [number for number, name in enumerate(names) if missing.intersection(name)]
    for number in numbered:
        names[number] = f"class {number}"
    return names, families, numbered


def fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """The usual font and, if it lacks some of the characters, others that have them; and the characters of no font."""
    families = list(rcParams["font.family"])
    missing = characters - drawn_by(font_manager.findfont(font_manager.FontProperties()), characters)
    if not missing:
        return families, missing
    files = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in REGULAR and "Last Resort" not in font.name  # it draws boxes
    }
    drawn = {family: drawn_by(file, missing) for family, file in sorted(files.items())}
    while missing:
        best = max(drawn, key=lambda family: len(drawn[family] & missing))
        if not drawn[best] & missing:
            break
        families.append(best)
        missing = missing - drawn[best]
    return families, missing


def drawn_by(file: str, characters: set[str]) -> set[str]:
    """The characters for which a font has a glyph."""
    try:
        codes = font_manager.get_font(file).get_charmap()
    except (OSError, RuntimeError):  # a damaged font
        return set()
    return {character for character in characters if ord(character) in codes}


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
        upright = max(map(len, class_names)) <= 2
        axis.set_xticks(ticks, class_names, rotation=0 if upright else 45, ha="center" if upright else "right")
        axis.set_yticks(ticks, class_names)
        for row, column in zip(*counts.nonzero()):
            ink = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=ink, fontsize=8)
    return figure


def plot_predictions(samples: Samples, labels: Labels) -> Figure:
    """A grid of images with captions, red if the prediction is wrong."""
    images = samples.pixels.permute(0, 2, 3, 1).cpu().numpy()
    texts = captions(samples.logits, samples.targets, labels)
    (count, height, width, channels), columns = images.shape, 8
    rows, gap = math.ceil(count / columns), 0.2  # for a caption, as a fraction of the height
    figure = Figure(figsize=(1.35 * columns, 1.35 * rows * (1 + gap) * height / width), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows * (1 + gap), 0))
    axis.axis("off")
    for number, (image, (caption, is_correct)) in enumerate(zip(images, texts)):
        row, column = divmod(number, columns)
        top, left = row * (1 + gap) + gap, column + 0.03
        shown = image if channels == 3 else image[..., 0]
        axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(left, left + 0.94, top + 0.97, top), aspect="auto")
        ink = "black" if is_correct else "tab:red"
        axis.text(left + 0.47, top - 0.04, caption, fontsize=7, color=ink, ha="center", va="bottom")
    return figure
