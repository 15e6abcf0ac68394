"""What keeps a training step from waiting: compiled pieces, and batches that are augmented while others compute."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from ..data.augment import Augment
from ..modeling_vit_simple import ViTSimpleForImageClassification


def compile_blocks(network: ViTSimpleForImageClassification):
    """Compiles the blocks, which share one program for training and one for evaluation.

    The whole model as one program runs no faster and takes many times as long to compile. Blocks that drop paths at
    different rates have a program each, of which there may be more than the compiler's default limit.
    """
    limit = 4 * len(network.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in network.blocks:
        block.compile()


def augmented_batches(
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    augment: Augment,
    seeds: Iterator[int],
    waiting: Callable[[], AbstractContextManager],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Augments each batch, with its seed for these draws and for those of the step that follows.

    Args:
        batches: uint8 pixels (B, C, H, W) and labels, on the device.
        waiting: a context that measures the time spent waiting for `batches`.
    """
    for seed in seeds:
        with waiting():
            pixels, labels = next(batches)
        torch.manual_seed(seed)
        yield augment(pixels, labels)


def prefetched(batches: Iterator[tuple[torch.Tensor, ...]], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same batches, each made on a stream of its own while the step before computes; on a GPU."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)

    def make() -> tuple[torch.Tensor, ...]:
        with torch.cuda.stream(side):
            return next(batches)

    ready = make()
    while True:
        main.wait_stream(side)
        for tensor in ready:
            tensor.record_stream(main)
        current, ready = ready, make()
        yield current
