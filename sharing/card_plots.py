"""The plots in a model card, and how to read them."""

from pathlib import Path

PLOTS = {  # the title of each, and a sentence on how to read it
    "curves.png": ("Loss, {score} and learning rate", ""),
    "confusion.png": ("Confusion matrix", ""),
    "reliability.png": (
        "Reliability diagram",
        "A bar on the dashed line means that a probability of 0.8 comes true in 80% of cases; a bar below it means "
        "that the probabilities are too high. Pale bars have fewer than ten predictions, which the lower panel counts.",
    ),
    "predictions.png": ("Predictions; errors are red", ""),
    "mistakes.png": (
        "The worst predictions",
        "These images were predicted wrong {worst}; look for wrong labels, and for classes that look alike.",
    ),
    "attention.png": (
        "Attention and relevance",
        "Bright patches are those that the last block attends to most (middle row) and those that raise the output for "
        "the prediction most (bottom row); look whether they lie on the object or on its background.",
    ),
    "positions.png": (
        "Similarity of positions",
        "Each map compares one patch's position with those of all patches; a model that has learned the layout of the "
        "image finds neighbors, rows and columns alike (bright).",
    ),
}


def plots(folder: Path, score: str, problem_type: str | None) -> list[str]:
    """The plots that a folder has; `score` is the title of the metric beside the loss."""
    worst = "by the largest difference" if problem_type == "regression" else "with the highest probability"
    texts = []
    for file, (title, reading) in PLOTS.items():
        if (folder / file).exists():
            title = title.format(score=score)
            caption = f"*{title}.* {reading.format(worst=worst)}" if reading else f"*{title}*"
            texts.append(f"![{title}]({file})\n\n{caption}")
    return texts
