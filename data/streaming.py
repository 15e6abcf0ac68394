"""Batches from a stream, for datasets that fit neither into memory nor on the disk: shards are read once in each epoch.

`B` batch, `C` channels, `H W` pixels, `K` classes. A reader is a worker process, or the training process itself if it
has no workers. Every random choice is a function of (seed, epoch, reader), so that any step can be repeated with the
same number of readers.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..files import RunError, UserError
from .dataloader import READ_BATCH_SIZE, ImageSplit, RowNotes
from .decoding import PixelBatch
from .loading import raise_user_error
from .reading import MACHINE_ERRORS, BadImage

ROWS_PER_SHARD = 4096  # there are more than `max_shards` only if each has at least this many rows
MAX_IDLE_EPOCHS = 3  # a reader may get an empty shard in one of them


class StreamingSplit(ImageSplit):
    """A split that is read from start to end by the readers of all processes.

    In each epoch the shards are shuffled by (seed, epoch) and dealt to the readers. If the shards
    cannot be dealt evenly, all readers read the rest, and each keeps its share of the rows. A reader shuffles its rows
    in a buffer by (seed, epoch, reader).

    Args:
        buffer_size: undecoded rows in the buffer.
        max_shards: more, smaller files are read as this many sets of files.
    """

    def __init__(self, *arguments, buffer_size: int = 1000, max_shards: int = 1024, **options):
        super().__init__(*arguments, **options)
        self.buffer_size, self.max_shards = buffer_size, max_shards
        self.shard_rows = {}  # shard -> its rows
        self.positions = {}  # reader of this process -> (epoch, rows read of it)

    @property
    def num_readers(self) -> int:
        """Of this process."""
        return max(self.context.num_workers, 1)

    @property
    def shards(self) -> list[int]:
        """The numbers of the shards: files or, if there are many small ones, sets of files."""
        readers = self.context.world_size * self.num_readers
        most = max(self.max_shards, readers, self.size // ROWS_PER_SHARD)
        return list(range(min(self.rows.num_shards, most)))

    def row_name(self, row: tuple[int, int]) -> str:
        shard, number = row
        return f"row {number} of shard {shard} of the split {self.split!r}"

    def read_shard(self, shard: int, num_shards: int) -> Iterator[dict[str, list]]:
        """The rows of a shard, undecoded, in batches."""
        if shard not in self.shard_rows:  # finding its files takes seconds if there are very many
            self.shard_rows[shard] = self.rows.shard(num_shards=num_shards, index=shard, contiguous=False)
        with raise_user_error(f"--dataset_name: the split {self.split!r} cannot be read"):
            yield from self.shard_rows[shard].iter(READ_BATCH_SIZE)

    def undecoded(self, reader: int, shards: list[int]) -> Iterator[tuple]:
        """The rows of one reader of this process: (shard, row), image and label."""
        reader, readers = self.context.rank * self.num_readers + reader, self.context.world_size * self.num_readers
        num_dealt = len(shards) - len(shards) % readers
        for position, shard in enumerate(shards):
            is_dealt = position < num_dealt
            if is_dealt and position % readers != reader:
                continue
            first, stride = (0, 1) if is_dealt else (reader, readers)
            start = 0
            for columns in self.read_shard(shard, len(shards)):
                images, labels = columns[self.data.image_column], columns[self.data.labels.column]
                for row in range((first - start) % stride, len(labels), stride):
                    image = images[row]
                    if isinstance(image, list):  # of an array, which takes a tenth of the memory
                        image = np.asarray(image, dtype=np.uint8)
                    yield (shard, start + row), image, labels[row]
                start += len(labels)

    def read_epoch(self, reader: int, epoch: int) -> Iterator[tuple]:
        """`undecoded` rows of one epoch, shuffled."""
        shards = self.shards
        random.Random(repr((self.seed, "shards", epoch))).shuffle(shards)
        rng = random.Random(repr((self.seed, "buffer", epoch, self.context.rank * self.num_readers + reader)))
        return shuffled(self.undecoded(reader, shards), self.buffer_size, rng)

    def sample_rows(self, count: int) -> Iterator[tuple]:
        """(shard, row), undecoded image and label of the first rows of the first epoch."""
        return itertools.islice(self.read_epoch(0, 0), count)

    def training_batches(self, batch_size: int, first_batch: int, worker: int) -> Iterator[tuple]:
        """Endless batches of one reader: pixels, targets, notes, the reader and its position after the batch.

        The DataLoader takes batches from its workers in turn, so a resumed run deals the readers to other workers.
        """
        reader = (worker + first_batch) % self.num_readers
        first_epoch, num_read = self.positions.get(reader, (0, 0))
        images, targets, notes, idle_epochs = PixelBatch(self.decode), [], RowNotes(), 0
        for epoch in itertools.count(first_epoch):
            idle_epochs += 1
            rows = enumerate(self.read_epoch(reader, epoch), 1)
            for position, ((shard, row), undecoded, label) in itertools.islice(rows, num_read, None):
                image, target = self.read_row((shard, row), epoch, undecoded, label, notes)
                if image is not None or self.on_bad_image == "error":
                    images.append(image)
                    targets.append(target)
                    idle_epochs = 0
                if len(targets) == batch_size or (notes.bad and self.on_bad_image == "error"):
                    yield *self.batch(images, targets, notes), reader, (epoch, position)
                    images, targets, notes = PixelBatch(self.decode), [], RowNotes()
            num_read = 0
            if idle_epochs == MAX_IDLE_EPOCHS:
                raise BadImage(
                    f"--dataloader_num_workers: a worker found no image that can be used in {idle_epochs} epochs "
                    f"of the split {self.split!r}; use fewer workers or look at the images"
                )

    def training(self, batch_size: int, accumulation: int, first_step: int) -> Iterator:
        """Endless uint8 pixels (B, C, H, W) and targets (B,) or (B, K) on the device, starting at a step."""
        read = functools.partial(self.training_batches, batch_size, first_step * accumulation)
        for pixels, targets, notes, reader, position in self.read_in_workers(read):
            self.record(notes)
            self.positions[reader] = position
            yield self.to_device(pixels, targets)

    def evaluation_batches(self, batch_size: int, worker: int) -> Iterator[tuple]:
        """Full batches of one reader's rows, in order: pixels, targets and notes.

        The targets of padding and bad images are ignored ones.
        """
        rows = self.undecoded(worker, self.shards)
        while chunk := list(itertools.islice(rows, batch_size)):
            images, targets, notes = PixelBatch(self.decode), [], RowNotes()
            for (shard, row), undecoded, label in chunk:
                image, target = self.read_row((shard, row), 0, undecoded, label, notes)
                images.append(image)
                targets.append(target)
            yield self.batch(images, targets, notes, batch_size)

    def evaluation(self, batch_size: int) -> Iterator:
        """As `training`, but every row once, and equally many batches in each process."""
        batch_size = min(batch_size, self.size)
        batches = self.read_in_workers(functools.partial(self.evaluation_batches, batch_size))
        while self.context.any_process((batch := next(batches, None)) is not None):
            if batch is None:
                batch = self.batch(PixelBatch(self.decode), [], RowNotes(), batch_size)
            pixels, targets, notes = batch
            self.record(notes)
            yield self.to_device(pixels, targets)

    def read_in_workers(self, read: Callable[[int], Iterator]) -> Iterator:
        """The batches that `read(worker)` makes in each worker, in turn."""
        for batch in self.load(self.context.num_workers, dataset=Reader(read), batch_size=None):
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, list[int]]:
        """The positions of the readers of this process: (epoch, rows read of it)."""
        return {str(reader): list(self.positions.get(reader, (0, 0))) for reader in range(self.num_readers)}

    def load_state_dict(self, state: dict[str, list[int]]) -> str | None:
        """Restores the positions. If the number of readers has changed, a new epoch starts.

        Returns:
            A message about that change, if there is one.
        """
        self.positions = {int(reader): tuple(position) for reader, position in state.items()}
        if len(state) == self.num_readers:
            return None
        epoch = 1 + max(epoch for epoch, _ in self.positions.values())
        self.positions = {reader: (epoch, 0) for reader in range(self.num_readers)}
        return (
            f"the stream was read by {len(state)} workers and is now read by {self.num_readers}: "
            f"epoch {epoch + 1} of the data starts, so that the run is not exactly the same as without a stop"
        )


class Reader(IterableDataset):
    """The batches of one worker. A mistake of the user, or an error of the network or the disk, is its last batch.

    torch would raise it again with the worker's traceback as its message, while these are shown in one line. A bug is
    raised by torch, with the traceback.
    """

    def __init__(self, read: Callable[[int], Iterator]):
        self.read = read

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        try:
            yield from self.read(0 if worker is None else worker.id)
        except (UserError, RunError, *MACHINE_ERRORS) as error:
            yield error


def shuffled(rows: Iterable, buffer_size: int, rng: random.Random) -> Iterator:
    """The same rows, shuffled by a buffer: each new row replaces a random one, which comes out."""
    buffer = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
        else:
            slot = rng.randrange(buffer_size)
            yield buffer[slot]
            buffer[slot] = row
    rng.shuffle(buffer)
    yield from buffer
