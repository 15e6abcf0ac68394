"""How far the probabilities of a classifier can be trusted, and what is fitted on the validation split to use them.

`B` batch, `K` classes, `N` images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

BINS = 15  # of the expected calibration error
MIN_IMAGES = 100  # of the validation split; with fewer, nothing is fitted
TEMPERATURES = (0.1, 10.0)  # the lowest and the highest
KEPT_FRACTION = 0.95  # of the validation images, by `keep_score`
MAX_LOGITS = 2**28  # that one process keeps for a fit, 1 GiB


@dataclass
class Fitted:
    """What was fitted on the validation split, for the probabilities of the exported weights; None: not fitted.

    Args:
        temperature: the divisor of the logits with the lowest negative log likelihood (Guo et al., 2017,
            arXiv:1706.04599, section 4.2), for the targets of `KeptLogits.slope`.
        calibrated: whether the head of the exported weights is divided by it.
        thresholds: several classes per image: class name -> the lowest probability at which it is predicted.
        keep_score: one class per image: 95% of the images have a highest probability of at least this.
    """

    temperature: float | None = None
    calibrated: bool = False
    thresholds: dict[str, float] | None = None
    keep_score: float | None = None

    @property
    def divisor(self) -> float:
        """What the logits of the trained weights are divided by to get those of the exported weights."""
        return self.temperature if self.calibrated else 1.0

    @property
    def values(self) -> dict[str, float]:
        """The numbers for metrics.jsonl."""
        numbers = {"temperature": self.temperature, "keep_score": self.keep_score}
        return {name: number for name, number in numbers.items() if number is not None}


def divide_head(weights: dict[str, torch.Tensor], divisor: float) -> dict[str, torch.Tensor]:
    """The weights of a model whose logits are divided by a number."""
    return weights | {name: weights[name] / divisor for name in ("head.weight", "head.bias")}


# How far the probabilities can be trusted


class ReliabilitySums:
    """Sums over batches of logits (B, K) and targets, see `Reliability`."""

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.bins = torch.zeros(3, BINS + 1, dtype=dtype, device=device)  # the last bin does not count
        self.losses = torch.zeros(2, dtype=dtype, device=device)  # log and squared

    def update(self, logits: torch.Tensor, targets: torch.Tensor):
        if targets.ndim == 1:
            probabilities, counts = logits.softmax(dim=-1), targets >= 0  # (B, K), (B,)
            confidence, hits = probabilities.amax(dim=-1), logits.argmax(dim=-1) == targets
            one_hot = F.one_hot(targets.clamp(min=0), logits.shape[1])
            log_losses = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
            squares = (probabilities - one_hot).square().sum(dim=-1)
        else:
            targets = targets.to(logits.dtype)
            confidence, counts, hits = logits.sigmoid(), ~targets.isnan(), targets > 0  # (B, K)
            log_losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            squares = (confidence - targets).square()
        numbers = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin 0 is [0, 1/15], bin 1 is (1/15, 2/15]
        slots = torch.where(counts, numbers, BINS).flatten()
        terms = torch.stack([counts.to(confidence), confidence, hits.to(confidence)]).flatten(1).to(self.bins.dtype)
        self.bins.scatter_add_(1, slots.expand(3, -1), terms)
        self.losses += torch.stack(
            [torch.where(counts, losses, 0).to(self.bins.dtype).sum() for losses in (log_losses, squares)]
        )

    def compute(self, accelerator: Accelerator) -> tuple[dict[str, float], torch.Tensor]:
        bins, losses = (accelerator.reduce(sums, "sum").cpu() for sums in (self.bins, self.losses))
        count, confidence, hits = bins = bins[:, :-1]
        error = (hits - confidence).abs().sum() / count.sum()
        log_loss, square = (losses / count.sum()).tolist()
        values = {"expected_calibration_error": error.item(), "negative_log_likelihood": log_loss}
        return {**values, "brier_score": square}, bins


class Reliability:
    """Compares probabilities with what happens, before and, if there is a temperature, after a division by it.

    One class per image: the probability of the predicted class, with how often it is right. Several classes: each
    probability, with how often the image has the class. Padding is left out.
    """

    def __init__(self, device: torch.device, fitted: Fitted):
        divisors = {"before": 1.0, "after": fitted.temperature}
        self.divisors = {name: divisor for name, divisor in divisors.items() if divisor is not None}
        self.sums = {name: ReliabilitySums(device) for name in self.divisors}
        self.exported = "after" if fitted.calibrated else "before"

    def update(self, logits: torch.Tensor, targets: torch.Tensor):
        """Adds logits (B, K) of the trained weights, with classes (B,) or zeros and ones (B, K)."""
        for name, divisor in self.divisors.items():
            self.sums[name].update(logits / divisor, targets)

    def compute(self, accelerator: Accelerator) -> tuple[dict, dict[str, torch.Tensor]]:
        """The metrics of the exported weights and, under `calibration`, of both; and their bins.

        Bins are (3, BINS): in each, the number of predictions, the sum of their probabilities, and how many came true.
        """
        found = {name: sums.compute(accelerator) for name, sums in self.sums.items()}
        values: dict = dict(found[self.exported][0])
        if "after" in found:
            values["calibration"] = {name: numbers for name, (numbers, _) in found.items()}
        return values, {name: bins for name, (_, bins) in found.items()}


# What is fitted on the validation split


class KeptLogits:
    """The logits and targets of the images of one process, in main memory.

    Of more than MAX_LOGITS numbers, every second image is dropped, as often as needed.
    """

    def __init__(self):
        self.batches, self.stride = [], 1

    def update(self, logits: torch.Tensor, targets: torch.Tensor):
        logits, targets = logits.cpu(), targets.cpu()
        is_image = targets >= 0 if targets.ndim == 1 else ~targets[:, 0].isnan()
        self.batches.append((logits[is_image][:: self.stride], targets[is_image][:: self.stride]))
        if sum(logits.numel() for logits, _ in self.batches) > MAX_LOGITS:
            self.batches = [tuple(part[::2].clone() for part in batch) for batch in self.batches]
            self.stride *= 2

    def slope(self, temperature: float, count: int) -> float:
        """The derivative of the negative log likelihood by 1 / temperature: (probability - target) * logit, summed.

        Targets are not 1 and 0, but allow for one wrong label among count + 2 images, as those of Platt (1999,
        "Probabilistic Outputs for Support Vector Machines", section 2.2). If the model gets all images right, the best
        temperature would otherwise be 0.
        """
        total, smoothing = 0.0, 1 / (count + 2)
        for logits, targets in self.batches:
            logits = logits.double()
            if targets.ndim == 1:
                classes = logits.shape[1]
                probabilities, targets = (logits / temperature).softmax(dim=-1), F.one_hot(targets, classes)
                others = smoothing / max(classes - 1, 1)
            else:
                probabilities, others = (logits / temperature).sigmoid(), smoothing
            targets = torch.where(targets > 0, 1 - smoothing, others)
            total += ((probabilities - targets) * logits).sum().item()
        return total

    def fit(self, class_names: list[str], count: int, calibrate: bool) -> Fitted:
        """Fits to the logits of all processes. Called by every process.

        Args:
            count: the number of images.
            calibrate: divide the exported head by the temperature, if one is found.
        """
        if count < MIN_IMAGES:
            return Fitted()
        temperature = fit_temperature(lambda value: sum(gather_object([self.slope(value, count)])))
        fitted = Fitted(temperature, calibrate and temperature is not None)
        logits = [logits / fitted.divisor for logits, _ in self.batches]
        if self.batches[0][1].ndim == 1:
            scores = torch.cat([batch.softmax(dim=-1).amax(dim=-1) for batch in logits]).numpy()  # (N,)
            scores = np.concatenate(gather_object([scores]))
            fitted.keep_score = float(np.quantile(scores, 1 - KEPT_FRACTION, method="lower"))
        else:
            scores, targets = torch.cat(logits).sigmoid().numpy(), torch.cat([part for _, part in self.batches]).numpy()
            scores, targets = (np.concatenate(gather_object([part])) for part in (scores, targets))  # (N, K)
            fitted.thresholds = dict(zip(class_names, map(best_threshold, scores.T, targets.T > 0)))
        return fitted


def fit_temperature(slope: Callable[[float], float]) -> float | None:
    """The temperature at which the slope, which falls as it rises, is 0, by bisection; None outside of TEMPERATURES.

    That is the case if the model is no better than chance.
    """
    low, high = TEMPERATURES
    if not slope(low) > 0 > slope(high):
        return None
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def best_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """The probability from which on a class is predicted with the highest F1: 0.5 for a class without images.

    It lies halfway between two scores, so that rounding changes no decision.
    """
    if not positive.any():
        return 0.5
    from sklearn.metrics import precision_recall_curve  # not at the top: see `inference.features.logistic_regression`

    precision, recall, thresholds = precision_recall_curve(positive, scores.astype(np.float64))
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(f1[:-1].argmax())
    return float((thresholds[best] + (thresholds[best - 1] if best else 0.0)) / 2)
