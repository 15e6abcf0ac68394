"""The devices of a run, its processes and their workers."""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from ..data.dataloader import LoaderContext
from ..files import UserError
from .config import TrainConfig

WORKER_BYTES = 100 * 2**20  # that a worker process takes at least, beside what it shares with the others


def require_memory(needed: int, options: str):
    """Raises UserError if the machine does not have the memory that options need at least."""
    total = psutil.virtual_memory().total
    if needed > total:
        raise UserError(
            f"{options}: at least {needed / 2**30:,.0f} GiB of memory are needed, this machine has "
            f"{total / 2**30:,.0f} GiB"
        )


def mixed_precision_of(config: TrainConfig) -> str:
    """The precision of the options or of `accelerate launch`."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The devices and the group of processes.

    Raises:
        UserError: the tracker is not installed, or the launcher asks for a precision or a group of processes that
            cannot work, or FSDP for an option that it does not support.
    """
    if mixed_precision_of(config) not in ("no", "bf16"):
        raise UserError(
            f"--mixed_precision: expected no or bf16, got {mixed_precision_of(config)} from accelerate launch"
        )
    if config.report_to and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"--report_to: expected {config.report_to} to be installed: pip install {config.report_to}")
    alone = os.environ.get("ACCELERATE_USE_CPU") == "True" and "WORLD_SIZE" not in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts processes that cannot communicate; use torchrun for several CPU processes"
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise torchrun makes no group of processes on a CPU
        mixed_precision="no",  # train.py uses autocast itself, only in the training step
        log_with=config.report_to,
        project_dir=".",  # some trackers need a folder now; train.py sets the run's folder later
        # The other processes wait while one prepares a large dataset.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        for name, used in (
            ("optim muon", config.optim == "muon"),
            ("ema_decay", config.ema_decay is not None),
            ("lora_rank", config.lora_rank is not None),
            ("eval_only", config.eval_only),
        ):
            if used:
                raise UserError(f"--{name} cannot be combined with FSDP, which splits every parameter")
    return accelerator


def on_main_process(accelerator: Accelerator, make: Callable):
    """Calls `make` in the main process and returns its result in every process."""
    return broadcast_object_list([make() if accelerator.is_main_process else None])[0]


kept_groups: list = []  # until Python exits


def end_together(accelerator: Accelerator):
    """Ends the run in every process at once."""
    accelerator.wait_for_everyone()
    # Otherwise DDP's reducer can be the last owner of the group: it then waits for gloo's thread and keeps the lock of
    # Python's interpreter, for which that thread waits.
    kept_groups.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def build_loader_context(config: TrainConfig, accelerator: Accelerator) -> LoaderContext:
    """This process and its workers.

    By default, one worker per core fills the cache before training. During training there is one per core on a GPU and
    none on a CPU (one when streaming).

    Raises:
        UserError: the workers do not fit into memory.
    """
    workers = cache_workers = config.dataloader_num_workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cache_workers = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16)
        workers = int(config.streaming) if accelerator.device.type == "cpu" else cache_workers
    require_memory(cache_workers * WORKER_BYTES, f"--dataloader_num_workers {cache_workers}")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return LoaderContext(accelerator.device, workers, rank, world_size, cache_workers)
