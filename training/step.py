"""What a training step computes, and what keeps it from waiting: compiled pieces, and batches made ahead."""

import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..configuration_vit_simple import pair
from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit, seed_for
from ..data.labels import MULTI, REGRESSION, SINGLE, Labels
from ..data.loading import ImageData
from ..data.streaming import StreamingSplit
from ..files import UserError
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .config import TrainConfig

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def criterion(
    labels: Labels, class_weights: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean loss of logits (B, K) and targets (B, K)."""
    if labels.problem_type == MULTI:
        return functools.partial(F.binary_cross_entropy_with_logits, pos_weight=class_weights)
    if labels.problem_type == REGRESSION:
        return F.mse_loss
    return functools.partial(F.cross_entropy, weight=class_weights)


def can_train_on_features(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether the options let a frozen backbone see the same images in each epoch."""
    alone = accelerator.distributed_type != DistributedType.FSDP and not config.torch_compile
    return config.freeze_backbone and config.has_fixed_images and alone and not (config.streaming or config.eval_only)


def probes(config: TrainConfig, data: ImageData, accelerator: Accelerator) -> bool:
    """Whether a new run begins by measuring the pretrained weights that it starts from."""
    suits = data.labels.problem_type == SINGLE and "validation" in data.splits and not config.streaming
    is_pretrained = config.model_name_or_path is not None
    return config.probe and suits and is_pretrained and accelerator.distributed_type != DistributedType.FSDP


def compile_blocks(model: ViTSimpleForImageClassification):
    """Compiles the blocks, which share one program for training and one for evaluation.

    The whole model as one program takes several times as long to compile. Blocks that drop paths at different rates
    have a program each, of which there may be more than the compiler's default limit.

    Raises:
        UserError: there is no C++ compiler, which torch.compile needs on any device.
    """
    if "CXX" not in os.environ and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UserError("--torch_compile needs a C++ compiler such as g++ on the PATH: install one")
    limit = 4 * len(model.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in model.blocks:
        block.compile()


def can_capture(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether `capture` suits a run."""
    one = accelerator.num_processes == 1 and config.gradient_accumulation_steps == 1
    return config.torch_compile and accelerator.device.type == "cuda" and one and not config.gradient_checkpointing


def capture(model: ViTSimpleForImageClassification, batch_size: int, in_bf16: bool) -> float:
    """Compiles and records the forward and the backward pass on a GPU, so that a step launches each as a whole.

    For training batches of one size, one batch in a step and one process. Evaluation is not recorded. Returns the
    seconds that it took.
    """
    started = time.perf_counter()
    config, device = model.config, model.head.weight.device
    height, width = pair(config.image_size)
    pixels = torch.zeros(batch_size, config.num_channels, height, width, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16, cache_enabled=False):
        torch.cuda.make_graphed_callables(model.train(), (pixels,), allow_unused_input=True)
    return time.perf_counter() - started


def augmented_batches(
    rows: MapStyleSplit | StreamingSplit,
    augment: Augment,
    config: TrainConfig,
    first_step: int,
    waiting: Callable[[], AbstractContextManager],
) -> Batches:
    """Augmented training batches from a step on, without end: images (B, C, H, W) and targets (B, K) on the device.

    The seed of a batch decides its augmentation and what the model draws after it. On a GPU a batch is made on a stream
    of its own while the batch before is computed, which then draws after the next seed; but not from a stream of rows,
    whose place is that of the last batch.

    Args:
        waiting: a context that measures the time spent waiting for rows.
    """
    accumulation = config.gradient_accumulation_steps
    batches = rows.training(config.per_device_train_batch_size, accumulation, first_step)

    def augmented() -> Batches:
        for number in itertools.count(first_step * accumulation):
            with waiting():
                pixels, labels = next(batches)
            torch.manual_seed(seed_for(config.seed, *divmod(number, accumulation), rows.context.rank))
            yield augment(pixels, labels)

    device = rows.context.device
    return prefetched(augmented(), device) if device.type == "cuda" and not config.streaming else augmented()


def prefetched(batches: Batches, device: torch.device) -> Batches:
    """The same batches, one ahead, each made on a stream of its own."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.stream(side):
            return next(batches)

    ready = make()
    while True:
        main.wait_stream(side)
        for tensor in ready:
            tensor.record_stream(main)
        current, ready = ready, make()
        yield current
