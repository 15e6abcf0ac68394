"""Batches of uint8 pixels and targets, from images cached in memory or decoded in every epoch.

`B` batch, `C` channels, `H W` pixels, `K` classes. Every random choice is a function of (seed, epoch, row), so that any
step can be repeated with any number of workers.
"""

import contextlib
import itertools
import math
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..files import RunError, UserError
from .decoding import Decoder, PixelBatch, is_deep, open_image, raise_bad_image, upright_size
from .labels import BadLabel
from .loading import ImageData
from .reading import MACHINE_ERRORS, WAITS, BadImage, read_bytes
from .splitting import spread

MAX_CACHE_BYTES = 4 * 2**30
READ_BATCH_SIZE = 16  # rows whose encoded images are in memory at a time
BIT_DEPTH_ROWS = 64  # images that tell whether a dataset has more than 8 bits


def seed_for(*key) -> int:
    """A seed that is a pure function of its key, for example (seed, step, rank): a repeated step draws the same."""
    return random.Random(repr(key)).getrandbits(63)


def fits_in_cache(count: int, shape: tuple[int, int, int]) -> bool:
    """Whether `count` images of shape (C, H, W) may be cached."""
    return count * math.prod(shape) <= MAX_CACHE_BYTES


def headers(data: ImageData, limit: int | None = None) -> Iterator[PIL.Image.Image]:
    """The training images without the bad ones; only their headers are decoded.

    Args:
        limit: as many of them at equal distances, or the first of a stream.
    """
    rows = data.splits["train"].select_columns([data.image_column])
    if limit is not None:
        rows = rows.select(spread(len(rows), limit)) if isinstance(rows, Dataset) else rows.take(limit)
    for batch in rows.iter(READ_BATCH_SIZE):
        for value in batch[data.image_column]:
            with contextlib.suppress(BadImage):
                encoded = read_bytes(value, data.sources)
                with raise_bad_image():
                    image = open_image(encoded)
                yield image


def have_equal_sizes(data: ImageData) -> bool:
    """Whether all training images have the same size when they stand upright. Bad images are ignored."""
    sizes = set()
    for image in headers(data):
        with contextlib.suppress(BadImage), raise_bad_image():  # Pillow decodes a PNG to find its Exif data
            sizes.add(image.size if image.format == "PNG" else upright_size(image))
        if len(sizes) > 1:
            return False
    return True


def find_bit_depth(data: ImageData) -> int | None:
    """The bit depth of the gray images with more than 8 bits, None if some training images show none.

    It is the smallest even number of bits, at least 10, that holds all their values: a 16-bit PNG often holds the 12
    bits of a camera, and their upper 8 bits would be nearly black.
    """
    if data.array_shape is not None:
        return None
    highest = None
    for image in headers(data, BIT_DEPTH_ROWS):
        if is_deep(image):
            with contextlib.suppress(BadImage), raise_bad_image():
                highest = max(highest or 0, int(np.asarray(image).max()))
    if highest is None:
        return None
    return min(max(10, 2 * math.ceil(highest.bit_length() / 2)), 16)


def column_values(table: pa.Table, column: str) -> list:
    """The values of a column: arrays as NumPy arrays, everything else as Python objects."""
    chunk = table.column(column).combine_chunks()
    if isinstance(chunk.type, pa.ExtensionType):
        arrays = chunk.to_numpy(zero_copy_only=False)
        return [array if is_valid else None for array, is_valid in zip(arrays, chunk.is_valid().to_pylist())]
    return chunk.to_pylist()


@dataclass
class LoaderContext:
    """The process that trains, and its workers.

    Args:
        device: where batches go.
        num_workers: worker processes that decode during training; 0: the process itself decodes.
        rank, world_size: of the training processes.
        cache_workers: worker processes that fill the cache before training.
    """

    device: torch.device
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    cache_workers: int = 0

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes must call it."""
        if self.world_size == 1:
            return flag
        flag = torch.tensor([flag], dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


@dataclass
class RowNotes:
    """What was found in the rows of a batch: name of the row -> finding.

    Args:
        bad: why the row cannot be used.
        changed: why a pipeline sees other pixels of its image, see `load_rgb`.
    """

    bad: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


class ImageSplit:
    """One split as batches of pixels and targets; the base of MapStyleSplit and StreamingSplit.

    Args:
        data, split: the dataset and the name of the split.
        decode: makes pixels from an undecoded image.
        context: the process and its workers.
        on_bad_image: "error" or "skip".
        seed: determines the order.
    """

    sample_rows: Callable[[int], Iterator[tuple]]  # number, undecoded image and label of rows that the seed selects
    row_name: Callable[..., str]  # of a row number, for messages

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
        self.bad = {}  # name of a row that was skipped -> reason
        self.changed = {}  # name of a row that has other pixels in a pipeline -> reason

    def read_row(self, row: int | tuple, epoch: int, image, label, notes: RowNotes) -> tuple:
        """The decoded image and the target of a row; (None, None) and an entry in `notes` if one of them is bad.

        Raises:
            RunError: the machine failed to read the image several times.
        """
        path = f" ({image['path']})" if isinstance(image, dict) and image["path"] else ""
        name = f"{self.row_name(row)}{path}"
        changes: set[str] = set()
        try:
            decoded, target = self.decode(image, epoch, row, changes), self.data.labels.target(label)
        except (BadImage, BadLabel) as error:
            notes.bad[name] = str(error)
            return None, None
        except MACHINE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise RunError(f"{name} cannot be read, after {len(WAITS) + 1} attempts: {reason}") from error
        if changes:
            notes.changed[name] = " and ".join(sorted(changes))
        return decoded, target

    def batch(self, images: PixelBatch, targets: list, notes: RowNotes, size: int = 0) -> tuple:
        """Pixels (B, C, H, W), targets (B,) or (B, K), and `notes`; targets that are None become ignored ones.

        A smaller batch than `size` is padded with black images.
        """
        for _ in range(size - len(targets)):
            images.append(None)
            targets.append(None)
        labels = self.data.labels.ignored_targets(len(targets))
        for slot, target in enumerate(targets):
            if target is not None:
                labels[slot] = torch.as_tensor(target)
        return images.pixels(), labels, notes

    def record(self, notes: RowNotes):
        """Adds rows to those that were skipped, or that have other pixels in a pipeline.

        Raises:
            BadImage: bad rows may not be skipped, or the split has no others.
        """
        if notes.bad and self.on_bad_image == "error":
            row, reason = next(iter(notes.bad.items()))
            raise BadImage(f"{row} cannot be used: {reason}; use --on_bad_image skip to ignore such rows")
        self.changed.update(notes.changed)
        self.bad.update(notes.bad)
        if len(self.bad) == self.size:
            raise BadImage(f"every row of the split {self.split!r} is bad: it has no image that can be used")

    def samples(self, count: int) -> list[tuple]:
        """Pixels (C, H, W) and target of up to `count` rows without the bad ones."""
        decoded = (self.read_row(row, 0, image, label, RowNotes()) for row, image, label in self.sample_rows(count))
        return [(self.decode.stack([image])[0], target) for image, target in decoded if image is not None]

    def load(self, num_workers: int, **options) -> Iterator:
        """The batches of a DataLoader whose workers ignore signals.

        Raises:
            RunError: a worker died while it handed over a batch; torch raises RuntimeError if it dies at another time.
        """
        pin = self.context.device.type == "cuda"
        options |= {"num_workers": num_workers, "worker_init_fn": ignore_signals}
        try:
            yield from DataLoader(collate_fn=identity, pin_memory=pin, **options)
        except ConnectionError as error:
            if error.errno is None:  # raised in a worker, by what it reads
                raise
            raise RunError(f"a DataLoader worker was killed, perhaps because memory ran out: {error}") from error

    def to_device(self, *tensors: torch.Tensor) -> tuple:
        return tuple(tensor.to(self.context.device, non_blocking=True) for tensor in tensors)


class MapStyleSplit(ImageSplit, torch.utils.data.Dataset):
    """A split whose rows are read in any order, and may be cached.

    A batch is requested by a key (epoch, row numbers). The row -1 is padding: its target is ignored. So is that of a
    bad image in evaluation; in training it is replaced by the next row.
    """

    cached: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # pixels (N, C, H, W) and targets (N + 1, ...) of all rows and of padding
    )

    def row_name(self, row: int) -> str:
        """Names the row in the dataset that was given: rows may have been left out, held out or drawn since."""
        split, numbers = self.data.origins.get(self.split, (self.split, None))
        return f"row {row if numbers is None else numbers[row]} of the split {split!r}"

    def read(self, rows: list[int]) -> Iterator[tuple]:
        """The undecoded image and the label of each row."""
        arrow = self.rows.with_format("arrow")
        for start in range(0, len(rows), READ_BATCH_SIZE):
            table = arrow[rows[start : start + READ_BATCH_SIZE]]
            yield from zip(column_values(table, self.data.image_column), column_values(table, self.data.labels.column))

    def sample_rows(self, count: int) -> Iterator[tuple]:
        """Number, undecoded image and label of random rows, drawn by seed."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "some"))
        rows = torch.randperm(self.size, generator=generator)[:count].tolist()
        return ((row, image, label) for row, (image, label) in zip(rows, self.read(rows)))

    def __getitems__(self, key: tuple[int, list[int]]) -> tuple | Exception:
        """A batch and its notes, or an error, whose message torch would bury in the traceback of a worker."""
        try:
            return self.read_batch(*key)
        except (UserError, RunError, MemoryError) as error:
            return error

    def read_batch(self, epoch: int, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, RowNotes]:
        replace = self.split == "train" and self.on_bad_image == "skip"
        images, targets, notes = PixelBatch(self.decode), [], RowNotes()
        for row, (undecoded, label) in zip(rows, self.read([max(row, 0) for row in rows])):
            image = target = None
            if row >= 0:
                image, target = self.read_row(row, epoch, undecoded, label, notes)
                while image is None and replace and len(notes.bad) < self.size:
                    row = (row + 1) % self.size
                    ((undecoded, label),) = self.read([row])
                    image, target = self.read_row(row, epoch, undecoded, label, notes)
            images.append(image)
            targets.append(target)
        return self.batch(images, targets, notes)

    def decoded(self, keys: Iterable, num_workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.load(num_workers, dataset=self, batch_sampler=keys):
            if isinstance(batch, Exception):
                raise batch
            pixels, targets, notes = batch
            self.record(notes)
            yield pixels, targets

    def cache(self, quiet: bool = False, batch_size: int = 256, min_size_for_workers: int = 4096):
        """Decodes the whole split once and keeps it on the device; starting workers does not pay for small splits."""
        pixels = torch.empty(self.size, *self.decode.shape, dtype=torch.uint8)
        targets = self.data.labels.ignored_targets(self.size + 1)  # the last one is the target of padding
        starts = range(0, self.size, batch_size)
        keys = [(0, list(range(start, min(start + batch_size, self.size)))) for start in starts]
        progress = tqdm(total=self.size, desc=f"decoding {self.split}", unit="image", leave=False, disable=quiet)
        num_workers = self.context.cache_workers if self.size >= min_size_for_workers else 0
        for start, (batch, batch_targets) in zip(starts, self.decoded(keys, num_workers)):
            pixels[start : start + len(batch)], targets[start : start + len(batch)] = batch, batch_targets
            progress.update(len(batch))
        progress.close()
        self.cached = pixels.to(self.context.device), targets.to(self.context.device)

    def batches(self, keys: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """uint8 pixels (B, C, H, W) and targets (B,) or (B, K) on the device, for each key."""
        if self.cached is None:
            for batch in self.decoded(keys, self.context.num_workers):
                yield self.to_device(*batch)
        else:
            for _, rows in keys:
                (rows,) = self.to_device(torch.tensor(rows))
                pixels, targets = self.cached
                yield pixels[rows], targets[rows]

    def training(self, batch_size: int, accumulation: int, first_step: int) -> Iterator:
        """Endless `batches`, starting at a step."""
        rank, world_size = self.context.rank, self.context.world_size
        keys = training_keys(self.size, batch_size, accumulation, rank, world_size, self.seed, first_step)
        return self.batches(keys)

    def evaluation(self, batch_size: int) -> Iterator:
        """`batches` of every row once, equally many in each process, and no larger than the split."""
        batch_size = min(batch_size, math.ceil(self.size / self.context.world_size))
        return self.batches(evaluation_keys(self.size, batch_size, self.context.rank, self.context.world_size))


def identity(batch):
    return batch


def ignore_signals(worker: int):
    """Lets a worker survive Ctrl-C and SIGTERM, since the training process still needs batches to finish its step.

    SIGTERM may also come from the DataLoader, to end a worker that hangs: it ends after 10 seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # SIGALRM ends the worker


def training_keys(
    size: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int, first_step: int
) -> Iterator[tuple[int, list[int]]]:
    """Endless keys of one process, starting at a step.

    Each epoch has its own order. Rows that do not fill a step (batch_size * accumulation * world_size) are left out.
    A step has the same rows with any number of processes: each takes every world_size-th batch.
    """
    batches_per_epoch = size // (batch_size * accumulation * world_size) * accumulation
    shuffled_epoch, order = None, None
    for number in itertools.count(first_step * accumulation):
        epoch, position = divmod(number, batches_per_epoch)
        if epoch != shuffled_epoch:
            generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
            shuffled_epoch, order = epoch, torch.randperm(size, generator=generator)
        first = (position * world_size + rank) * batch_size
        yield epoch, order[first : first + batch_size].tolist()


def evaluation_keys(size: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, list[int]]]:
    """The keys of one process for all rows: full batches, equally many in each process, padded with -1."""
    steps = math.ceil(size / (batch_size * world_size))
    rows = [row if row < size else -1 for row in range(steps * batch_size * world_size)]
    starts = range(rank * batch_size, len(rows), batch_size * world_size)
    return [(0, rows[start : start + batch_size]) for start in starts]
