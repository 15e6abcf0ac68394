"""From the rows of a data set to batches of `uint8` pixels and their targets, kept decoded or decoded anew.

`B` batch, `C` channels, `H W` pixels, `K` classes. Every random choice is a function of (seed, epoch, row), so that any
step can be repeated by any number of workers.
"""

import contextlib
import itertools
import math
import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from .decoding import BadImage, Decoder, open_image, raise_bad_image
from .labels import BadLabel
from .loading import ImageData

CACHE_BYTES = 4 * 2**30  # the largest split that is kept decoded
DECODE_BATCH = 256  # images decoded at a time for that
MANY = 4096  # images that are worth the start of processes


def seed_for(*key) -> int:
    """A seed that is a pure function of its key, as (seed, step, rank): a step that is repeated draws the same."""
    return random.Random(repr(key)).getrandbits(63)


def fits_in_cache(count: int, shape: tuple[int, int, int]) -> bool:
    """Whether so many images (C, H, W) may be kept decoded."""
    return count * math.prod(shape) <= CACHE_BYTES


def have_equal_sizes(rows: Dataset, column: str) -> bool:
    """Whether all images have one size; reads headers, up to the first that differs. Bad images are not counted."""
    first = None
    for batch in rows.select_columns([column]).iter(DECODE_BATCH):
        for value in batch[column]:
            with contextlib.suppress(BadImage), raise_bad_image():
                size = open_image(value).size
                first = first or size
                if size != first:
                    return False
    return True


def column_values(table: pa.Table, column: str) -> list:
    """The values of a column: arrays as arrays, all else as Python's own."""
    chunk = table.column(column).combine_chunks()
    if isinstance(chunk.type, pa.ExtensionType):
        arrays = chunk.to_numpy(zero_copy_only=False)
        return [array if there else None for array, there in zip(arrays, chunk.is_valid().to_pylist())]
    return chunk.to_pylist()


@dataclass
class LoaderContext:
    """The process that reads: one of `world`, with so many decoding processes beside the training, and before it."""

    device: torch.device
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    cache_workers: int = 0

    def any_process(self, mine: bool) -> bool:
        """Whether it is so in any process; they all ask."""
        if self.world_size == 1:
            return mine
        flag = torch.tensor([mine], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class ImageSplit:
    """One split as pixels and targets: `Images` reads it in any order, `Stream` (stream.py) from one end to the other.

    Args:
        data, split: the rows.
        decode: from a row to pixels.
        context: the process that reads, and its workers.
        on_bad_image: "error" or "skip".
        seed: decides the order.
    """

    def __init__(
        self,
        data: ImageData,
        split: str,
        decode: Decoder,
        context: LoaderContext,
        on_bad_image: str = "error",
        seed: int = 0,
    ):
        self.data, self.split, self.decode, self.context = data, split, decode, context
        self.on_bad_image, self.seed = on_bad_image, seed
        self.rows = data.splits[split]
        self.size = data.sizes[split]
        self.bad = {}  # which row -> why, of what was skipped so far

    def read_row(self, row: int | tuple, name: str, epoch: int, value, label, bad: dict[str, str]) -> tuple:
        """The image and the target of a row; None and None where it is bad, which `bad` then says."""
        try:
            return self.decode(value, epoch, row), self.data.labels.target(label)
        except (BadImage, BadLabel) as error:
            path = f" ({value['path']})" if isinstance(value, dict) and value["path"] else ""
            bad[f"{name} of the split {self.split!r}{path}"] = str(error)
            return None, None

    def batch(self, images: list, targets: list, bad: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Pixels (B, C, H, W), targets (B, ...) and what was bad; a target that is None does not count."""
        labels = self.data.labels.ignored_targets(len(images))
        for slot, target in enumerate(targets):
            if target is not None:
                labels[slot] = torch.as_tensor(target)
        return self.decode.stack(images), labels, bad

    def record_bad(self, bad: dict[str, str]):
        """Takes down what was skipped.

        Raises:
            BadImage: nothing may be skipped, or nothing would be left.
        """
        if bad and self.on_bad_image == "error":
            row, reason = next(iter(bad.items()))
            raise BadImage(f"--on_bad_image: expected an image, got {row}: {reason}; skip passes over it")
        self.bad.update(bad)
        if len(self.bad) == self.size:
            raise BadImage(f"--on_bad_image: expected an image to be left in the split {self.split!r}, got none")

    def samples(self, count: int) -> list[tuple]:
        """Image, for `decode.stack`, and target of at most so many rows, to look at; bad ones are left out."""
        read = (self.read_row(row, "", 0, value, label, {}) for row, value, label in self.sample_rows(count))
        return [(image, target) for image, target in read if image is not None]

    def load(self, workers: int, **loading) -> Iterator:
        """What so many decoding processes make."""
        pin = self.context.device.type == "cuda"
        options = {"num_workers": workers, "worker_init_fn": ignore_signals}
        return iter(DataLoader(collate_fn=identity, pin_memory=pin, **options, **loading))

    def to_device(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.context.device, non_blocking=True) for tensor in tensors)


class MapStyleSplit(ImageSplit, torch.utils.data.Dataset):
    """Rows that are read by number, or kept decoded.

    A key is (epoch, rows); the row -1 is padding, which does not count. Nor does a bad image in an evaluation; in
    training the next row takes its place.
    """

    cached = None  # pixels and targets of the whole split, and of padding

    def at(self, rows: list[int]) -> Iterator[tuple]:
        """The undecoded image and the label of each row."""
        table = self.rows.with_format("arrow")[rows]
        return zip(column_values(table, self.data.image_column), column_values(table, self.data.labels.column))

    def sample_rows(self, count: int) -> Iterator[tuple]:
        """Number, undecoded image and label of rows that the seed draws."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "some"))
        rows = torch.randperm(self.size, generator=generator)[:count].tolist()
        return ((row, *read) for row, read in zip(rows, self.at(rows)))

    def __getitems__(self, key: tuple[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
        epoch, rows = key
        replace = self.split == "train" and self.on_bad_image == "skip"
        images, targets, bad = [], [], {}
        for row, (value, label) in zip(rows, self.at([max(row, 0) for row in rows])):
            image = target = None
            if row >= 0:
                image, target = self.read_row(row, f"row {row}", epoch, value, label, bad)
                while image is None and replace and len(bad) < self.size:
                    row = (row + 1) % self.size
                    ((value, label),) = self.at([row])
                    image, target = self.read_row(row, f"row {row}", epoch, value, label, bad)
            images.append(image)
            targets.append(target)
        return self.batch(images, targets, bad)

    def decoded(self, keys: Iterable, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pixels, targets, bad in self.load(workers, dataset=self, batch_sampler=keys):
            self.record_bad(bad)
            yield pixels, targets

    def cache(self, quiet: bool):
        """Decodes the whole split once, onto the device, before the training."""
        pixels = torch.empty(self.size, *self.decode.shape, dtype=torch.uint8)
        targets = self.data.labels.ignored_targets(self.size + 1)  # the last is that of padding
        starts = range(0, self.size, DECODE_BATCH)
        keys = [(0, list(range(start, min(start + DECODE_BATCH, self.size)))) for start in starts]
        progress = tqdm(total=self.size, desc=f"decoding {self.split}", unit="image", leave=False, disable=quiet)
        workers = self.context.cache_workers if self.size >= MANY else 0
        for start, (batch, batch_targets) in zip(starts, self.decoded(keys, workers)):
            pixels[start : start + len(batch)], targets[start : start + len(batch)] = batch, batch_targets
            progress.update(len(batch))
        progress.close()
        self.cached = pixels.to(self.context.device), targets.to(self.context.device)

    def batches(self, keys: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """On the device: uint8 pixels (B, C, H, W) and targets (B,) or (B, K) for each key."""
        if self.cached is None:
            for batch in self.decoded(keys, self.context.num_workers):
                yield self.to_device(*batch)
        else:
            for _, rows in keys:
                (rows,) = self.to_device(torch.tensor(rows))
                yield self.cached[0][rows], self.cached[1][rows]

    def training(self, batch_size: int, accumulation: int, first_step: int) -> Iterator:
        """`batches` from a step on, without end."""
        shares = (self.context.rank, self.context.world_size)
        return self.batches(training_keys(self.size, batch_size, accumulation, *shares, self.seed, first_step))

    def evaluation(self, batch_size: int) -> Iterator:
        """`batches` of one pass, as many in every process."""
        return self.batches(evaluation_keys(self.size, batch_size, self.context.rank, self.context.world_size))


def identity(batch):
    return batch


def ignore_signals(worker: int):
    """Ctrl-C and SIGTERM may reach the whole group of processes while the parent still needs the batches of its step.

    SIGTERM may also be the parent's own, for a worker that does not end: it then ends a little later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # seconds; SIGALRM ends it


def training_keys(count: int, batch_size: int, accumulation: int, rank: int, world: int, seed: int, first_step: int):
    """The keys of one process, for every batch from a step on, without end.

    Each epoch has an order of its own; what does not fill a step (batch_size * accumulation * world) is left out.
    Processes take turns, so that a step has the same rows with any number of them.
    """
    per_epoch = count // (batch_size * accumulation * world) * accumulation
    order_epoch, order = None, None
    for number in itertools.count(first_step * accumulation):
        epoch, position = divmod(number, per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
            order_epoch, order = epoch, torch.randperm(count, generator=generator)
        first = (position * world + rank) * batch_size
        yield epoch, order[first : first + batch_size].tolist()


def evaluation_keys(count: int, batch_size: int, rank: int, world: int) -> list[tuple[int, list[int]]]:
    """The keys of one process for one pass over all rows: full batches, as many for each process, padded with -1."""
    steps = math.ceil(count / (batch_size * world))
    rows = [row if row < count else -1 for row in range(steps * batch_size * world)]
    starts = range(rank * batch_size, len(rows), batch_size * world)
    return [(0, rows[start : start + batch_size]) for start in starts]
