"""The images of an evaluation with the worst predictions, for a plot.

`B` batch, `C` channels, `H W` pixels, `K` classes.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..data.labels import MULTI, REGRESSION, Labels
from ..files import shorten

KEPT = 8  # images
NAME_WIDTH = 18  # of a class name in a plot, in characters; with a probability, it fits above an image


@dataclass
class Samples:
    """Images (B, C, H, W), uint8, C = 1 or 3, the model's logits (B, K) for them, and their labels.

    Args:
        pixel_values: some of the images, as the model takes them.
    """

    pixels: torch.Tensor
    logits: torch.Tensor
    targets: list
    pixel_values: torch.Tensor | None = None


class Mistakes:
    """Collects the images with the largest errors; each process has its own."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []  # errors, pixels, logits and targets

    def update(self, errors: torch.Tensor, pixels: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor):
        """Adds a batch, with errors (B,) that are 0 for correct predictions, without waiting for the device."""
        batch = largest([errors, pixels, logits, targets])
        self.kept = largest([torch.cat(parts) for parts in zip(self.kept, batch)]) if self.kept else batch

    def compute(self, accelerator: Accelerator) -> Samples | None:
        """The images of all processes, those with the largest errors first; None if there are none."""
        if not self.kept:
            return None
        errors, *rest = (part.cpu() for part in largest([accelerator.gather(part) for part in self.kept]))
        pixels, logits, targets = (part[errors > 0] for part in rest)
        return Samples(pixels, logits, targets.tolist()) if len(pixels) else None


def largest(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The rows with the largest errors, which are the first part."""
    rows = parts[0].topk(min(KEPT, len(parts[0]))).indices
    return [part[rows] for part in parts]


def mistake_captions(logits: torch.Tensor, targets: list, labels: Labels) -> list[str]:
    """Two lines for each image: what was predicted with which probability, and what is true.

    With several labels for each image, they name the one whose probability is most wrong.
    """
    names, captions = [shorten(name, NAME_WIDTH) for name in labels.class_names], []
    for scores, target in zip(logits, targets):
        if labels.problem_type == REGRESSION:
            predicted, true = (value * labels.std + labels.mean for value in (scores.item(), target[0]))
            captions.append(f"{predicted:.3g}\nlabel: {true:.3g}")
        elif labels.problem_type == MULTI:
            probabilities = scores.sigmoid()
            worst = (probabilities - torch.tensor(target)).abs().argmax()
            captions.append(f"{names[worst]}: {probabilities[worst]:.2f}\nlabel: {'yes' if target[worst] else 'no'}")
        else:
            probability, predicted = scores.softmax(dim=-1).max(dim=-1)
            captions.append(f"{names[predicted]}: {probability:.2f}\nlabel: {names[target]}")
    return captions
