"""What a model looks at in one image, as numbers and as figures.

L blocks, h heads, K labels; H W pixels of the image; rows x columns patches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..configuration_vit_simple import ViTSimpleConfig
from ..data.labels import MULTI, REGRESSION
from ..files import UserError
from .attention import grid_of, look, patch_colors, patch_map, relevance, rollout
from .figures import Box, blend, draw_grid, draw_mosaic, draw_panels, overlay
from .predicting import Decision

COLUMNS = 4  # of overlays side by side; fewer if the image is wide
MAX_NAME = 60  # characters of a class name in a figure; JSON has all


@dataclass
class Explanation:
    """What a model looks at in an image.

    Args:
        image: uint8 (H, W, 3).
        box: the part of it that the patches cover.
        reader: whose attention it is, in words.
        attention: of each block and head to each patch, (L, h, rows, columns).
        rollout: (rows, columns).
        colors, foreground: of the patch tokens, (rows, columns, 3) in [0, 1] and (rows, columns).
        prediction, confidence: the label with the highest logit and its probability, or the number that a regression
            predicts; these and the next are None without a head.
        label, relevance: a label, and the relevance of each patch for it, (rows, columns).
    """

    image: np.ndarray
    box: Box
    reader: str
    attention: torch.Tensor
    rollout: torch.Tensor
    colors: torch.Tensor
    foreground: torch.Tensor
    prediction: int | None = None
    confidence: float | None = None
    label: int | None = None
    relevance: torch.Tensor | None = None

    def over(self, values: torch.Tensor) -> np.ndarray:
        """A map (rows, columns) over the image."""
        return overlay(self.image, values, self.box)

    def figures(self, names: list[str]) -> dict[str, Figure]:
        """One figure for each question; `names` are those of the labels."""
        image, last, title = ("the image", self.image), self.attention[-1], f"Attention of {self.reader}"
        panels = [image, ("mean of all heads", self.over(last.mean(dim=0)))]
        panels += [(f"head {number}", self.over(head)) for number, head in enumerate(last)]
        height, width = self.image.shape[:2]
        across = max(1, int(COLUMNS / max(1, width / height / 2)))
        lines = [panels[start : start + across] for start in range(0, len(panels), across)]
        components = blend(self.image, self.colors.numpy(), self.box, strength=0.85)
        rows, columns = self.rollout.shape
        figures = {
            "grid": draw_grid(self.image, self.box, (rows, columns)),
            "attention": draw_panels(lines, f"{title} in the last block", "attention in each map"),
            "attention_blocks": draw_mosaic(self.attention, title, ("block", "head"), "attention in each map"),
            "rollout": draw_panels(
                [[image, ("attention rollout", self.over(self.rollout))]],
                f"How much of each patch reaches {self.reader} through all blocks",
                "rollout in each map",
            ),
            "components": draw_panels(
                [[image, ("principal components", components)]],
                "Patches of similar colors have similar tokens; black is the background",
            ),
        }
        if self.relevance is not None:
            prediction, label = (shortened(names[number]) for number in (self.prediction, self.label))
            found = (f"predicted: {prediction} ({self.confidence:.3g})", self.image)
            figures["relevance"] = draw_panels(
                [[found, (f"relevance for {label}", self.over(self.relevance))]],
                f"Which patches raise the output for {label}",
                "relevance in each map",
            )
        return figures

    def numbers(self, names: list[str]) -> dict:
        """The numbers as JSON knows them; `names` are those of the labels."""
        values = {name: value for name, value in vars(self).items() if name != "image" and value is not None}
        values |= {name: names[values[name]] for name in ("prediction", "label") if name in values}
        return {"size": self.image.shape[:2]} | {
            name: rounded(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }


def shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def rounded(values: torch.Tensor) -> list:
    return np.round(values.double().numpy(), 6).tolist()


def explain_pixels(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    image: np.ndarray,
    box: Box,
    patch: tuple[int, int] | None = None,
    label: int | None = None,
) -> Explanation:
    """Explains an image, uint8 (H, W, 3).

    Args:
        pixel_values: the image as the model takes it, (1, C, height, width).
        box: the part of the image that they are made of.
        patch: row and column of the patch whose attention is shown; by default, what the head reads.
        label: of the relevance; by default, that with the highest logit.

    Raises:
        UserError: the image has no such patch, or the model predicts several numbers.
    """
    config, grid, pixel_values = model.config, grid_of(pixel_values, model.config), pixel_values.to(model.device)
    if patch is not None and not all(0 <= index < side for index, side in zip(patch, grid)):
        sides = f"a row from 0 to {grid[0] - 1} and a column from 0 to {grid[1] - 1}"
        raise UserError(f"--patch: expected {sides}, got {patch[0]} and {patch[1]}")
    seen = look(model, pixel_values)
    attention = torch.stack([patch_map(weights, config, grid, patch) for weights in seen.attention])
    looked_at = patch_map(seen.attention[-1].mean(dim=0), config, grid).flatten()
    colors, foreground = patch_colors(seen.patches, looked_at)
    from_patches = patch_map(rollout(seen.attention), config, grid, patch)
    maps = [attention, from_patches, colors.unflatten(0, grid), foreground.unflatten(0, grid)]
    explanation = Explanation(image, box, reader_of(config, patch), *(each.cpu() for each in maps))
    if seen.logits is not None:
        best = int(seen.logits.argmax())
        explanation.prediction, explanation.confidence = best, probabilities(seen.logits, config)[best].item()
        explanation.label = best if label is None else label
        explanation.relevance = patch_map(relevance(model, pixel_values, explanation.label), config, grid).cpu()
    return explanation


def reader_of(config: ViTSimpleConfig, patch: tuple[int, int] | None = None) -> str:
    if patch is not None:
        return f"the patch in row {patch[0]}, column {patch[1]}"
    return "the class token" if config.pooling == "cls" else "the average patch"


def probabilities(logits: torch.Tensor, config: ViTSimpleConfig) -> torch.Tensor:
    """The probability of each label from logits (K,), or the number that a regression predicts."""
    problem = Decision.of(config, {}).problem
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI else logits.softmax(dim=-1)
