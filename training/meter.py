"""The running loss of a training, its speed, and the time it waits for data."""

import contextlib
import time
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from ..files import RunError
from .optim import EMA

NEVER = torch.iinfo(torch.int64).max


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Whether all values are finite, shape (), without waiting for the device; under FSDP, those of this process."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return torch.stack([tensor.isfinite().all() for tensor in local]).all()


class Meter:
    """Sums since the last line of the log. They stay on the device, so that no step waits for it.

    Args:
        model, ema: whose weights are checked.

    Attributes:
        loss_sum: the sum of the losses of this process, shape (1,).
        first_bad_step: the first step, counted from 1, whose loss or gradient was not finite; shape (1,).
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, ema: EMA):
        self.accelerator, self.model, self.ema = accelerator, model, ema
        self.loss_sum = torch.zeros(1, device=accelerator.device)
        self.first_bad_step = torch.full((1,), NEVER, device=accelerator.device)
        self.reset()

    def reset(self):
        self.loss_sum.zero_()
        self.batches, self.start = 0, time.perf_counter()
        self.seconds_waiting = self.seconds_paused = 0.0

    def add(self, loss: torch.Tensor):
        self.loss_sum += loss
        self.batches += 1

    def note_gradient_norm(self, gradient_norm: torch.Tensor, step: int):
        is_finite = (self.loss_sum + gradient_norm).isfinite()
        self.first_bad_step = torch.where(is_finite, self.first_bad_step, self.first_bad_step.clamp(max=step))

    def raise_if_not_finite(self, saved_step: int | None = None):
        """Waits for the device. Called by every process.

        Args:
            saved_step: check the weights, too, which are those after this step.

        Raises:
            RunError: the loss or the gradient of a step, or a weight, was not finite in some process.
        """
        step = self.accelerator.gather(self.first_bad_step).min().item()
        if step < NEVER:
            raise RunError(f"the loss or the gradient of step {step} is not finite: try a lower learning rate")
        if saved_step is not None:
            is_finite = are_finite([*self.model.parameters(), *self.ema.averages.values()])
            if not self.accelerator.gather(is_finite.view(1)).all():
                raise RunError(f"the weights after step {saved_step} are not finite: try a lower learning rate")

    @contextlib.contextmanager
    def waiting(self):
        """Time in this context counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.seconds_waiting += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Time in this context does not count as training."""
        start = time.perf_counter()
        yield
        self.seconds_paused += time.perf_counter() - start

    def summary(self, steps: int, images_per_batch: int) -> dict[str, float]:
        """The mean loss of the last `steps` steps, images per second, and the fraction of time spent waiting for data.

        Resets the meter. Called by every process; `images_per_batch` counts the images of all of them.
        """
        loss = self.accelerator.reduce(self.loss_sum / steps, "mean").item()
        seconds = time.perf_counter() - self.start - self.seconds_paused
        speed, data_wait = self.batches * images_per_batch / seconds, self.seconds_waiting / seconds
        self.reset()
        return {"loss": loss, "images_per_second": round(speed, 1), "data_wait": round(data_wait, 4)}
