"""One pass over a split."""

import torch
from accelerate import Accelerator

from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit
from ..data.labels import REGRESSION
from ..data.streaming import StreamingSplit
from .calibration import Fitted, KeptLogits
from .checkpoint import Splits
from .metrics import METRICS_OF, Evaluation


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    split: MapStyleSplit | StreamingSplit,
    augment: Augment,
    accelerator: Accelerator,
    batch_size: int,
    use_bf16: bool,
    calibrate: bool,
    *,
    fits: bool = False,
    fitted: Fitted | None = None,
) -> Evaluation:
    """One pass over a split, in float32 or bfloat16. Called by every process.

    Args:
        calibrate: see `KeptLogits.fit`.
        fits: fit temperature and thresholds to this split.
        fitted: what was fitted to the validation split; the result is then that of the exported weights.
    """
    model.eval()
    labels = split.data.labels
    metrics = METRICS_OF[labels.problem_type](labels, accelerator.device, fitted or Fitted())
    kept = KeptLogits() if fits and labels.problem_type != REGRESSION else None
    for pixels, targets in split.evaluation(batch_size):
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=use_bf16):
            logits = model(augment.normalize(pixels)).logits.float()
        metrics.update(logits, targets, pixels)
        if kept is not None:
            kept.update(logits, targets)
    model.train()
    result = metrics.compute(accelerator)
    if kept is not None:
        result.fitted = kept.fit(labels.class_names, result.values["count"], calibrate)
    if result.fitted is not None:
        result.values |= result.fitted.values
    return result


def evaluate_splits(model: torch.nn.Module, splits: Splits, *options) -> dict[str, Evaluation]:
    """The results of the validation and the test split, as far as they exist; see `evaluate` for the options."""
    results: dict[str, Evaluation] = {}
    if "validation" in splits:
        results["validation"] = evaluate(model, splits["validation"], *options, fits=True)
    if "test" in splits:
        fitted = results["validation"].fitted if results else None
        results["test"] = evaluate(model, splits["test"], *options, fitted=fitted)
    return results
