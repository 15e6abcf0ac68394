"""A data set that fits neither in memory nor on the disk: read from one end to the other, again and again.

`B` batch, `C` channels, `H W` pixels, `K` classes. Every random choice is a function of (seed, epoch, reader), so that
any step can be repeated by the same number of readers.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .dataloader import ImageSplit
from .decoding import BadImage

READ_BATCH = 64  # rows read at a time
MOST_SHARDS, ROWS_PER_SHARD = 1024, 4096  # more shards than the first only if they have as many rows as the second
IDLE_PASSES = 3  # a reader may get an empty shard in one of them


class StreamingSplit(ImageSplit):
    """Rows that are read from one end to the other, by as many readers as there are decoding processes in all.

    Each pass over the data draws an order of the shards by (seed, epoch), of which the readers take turns to get one;
    of those that do not go round, each reads all and keeps its share of the rows. What a reader has read goes through a
    buffer, which shuffles it by (seed, epoch, reader).

    Args:
        buffer_size: the undecoded rows in it.
    """

    def __init__(self, *given, buffer_size: int = 1000, **options):
        super().__init__(*given, **options)
        self.buffer_size = buffer_size
        self.parts = {}  # shard -> its rows
        self.positions = {}  # reader of this process -> (epoch, rows that it has taken of it)

    @property
    def readers(self) -> int:
        """Of this process; without a decoding process it reads by itself."""
        return max(self.context.num_workers, 1)

    @property
    def shards(self) -> list[int]:
        """The units that are dealt out: the files or, where these are many and small, sets of files."""
        readers = self.context.world_size * self.readers
        most = max(MOST_SHARDS, readers, self.size // ROWS_PER_SHARD)
        return list(range(min(self.rows.num_shards, most)))

    def undecoded(self, reader: int, shards: list[int]) -> Iterator[tuple]:
        """The share of a reader of this process in the shards: (shard, row), image and label."""
        reader, readers = self.context.rank * self.readers + reader, self.context.world_size * self.readers
        dealt = len(shards) - len(shards) % readers
        for place, shard in enumerate(shards):
            if place < dealt and place % readers != reader:
                continue
            first, stride = (0, 1) if place < dealt else (reader, readers)
            if shard not in self.parts:  # among very many files each takes seconds to be found
                self.parts[shard] = self.rows.shard(num_shards=len(shards), index=shard, contiguous=False)
            start = 0
            for columns in self.parts[shard].iter(READ_BATCH):
                values, labels = columns[self.data.image_column], columns[self.data.labels.column]
                for row in range((first - start) % stride, len(labels), stride):
                    value = values[row]
                    if isinstance(value, list):  # an array, which takes ten times as much memory in this form
                        value = np.asarray(value, dtype=np.uint8)
                    yield (shard, start + row), value, labels[row]
                start += len(labels)

    def read_pass(self, reader: int, epoch: int) -> Iterator[tuple]:
        """What `undecoded` gives in one pass, shuffled."""
        shards = self.shards
        random.Random(repr((self.seed, "shards", epoch))).shuffle(shards)
        draw = random.Random(repr((self.seed, "buffer", epoch, self.context.rank * self.readers + reader)))
        return shuffled(self.undecoded(reader, shards), self.buffer_size, draw)

    def sample_rows(self, count: int) -> Iterator[tuple]:
        """Place, undecoded image and label of the first rows of a pass."""
        return itertools.islice(self.read_pass(0, 0), count)

    def training_batches(self, batch_size: int, turn: int, worker: int) -> Iterator[tuple]:
        """Batches without end, the reader that made each and where it is then; a bad image is passed over."""
        reader = (worker + turn) % self.readers
        first_epoch, done = self.positions.get(reader, (0, 0))
        images, targets, bad, idle = [], [], {}, 0
        for epoch in itertools.count(first_epoch):
            idle += 1
            rows = enumerate(self.read_pass(reader, epoch), 1)
            for taken, ((shard, row), value, label) in itertools.islice(rows, done, None):
                image, target = self.read_row((shard, row), f"row {row} of shard {shard}", epoch, value, label, bad)
                if image is not None or self.on_bad_image == "error":
                    images.append(image)
                    targets.append(target)
                    idle = 0
                if len(images) == batch_size or (bad and self.on_bad_image == "error"):
                    yield *self.batch(images, targets, bad), reader, (epoch, taken)
                    images, targets, bad = [], [], {}
            done = 0
            if idle == IDLE_PASSES:
                raise BadImage(f"expected images for each decoding process, got none in {idle} passes for one of them")

    def training(self, batch_size: int, accumulation: int, first_step: int) -> Iterator:
        """On the device: uint8 pixels (B, C, H, W) and targets, from a step on, without end."""
        read = functools.partial(self.training_batches, batch_size, first_step * accumulation)
        for pixels, targets, bad, reader, place in self.read(read):
            self.record_bad(bad)
            self.positions[reader] = place
            yield self.to_device(pixels, targets)

    def evaluation_batches(self, batch_size: int, worker: int) -> Iterator[tuple]:
        """Full batches of one pass; padding and bad images do not count."""
        rows = self.undecoded(worker, self.shards)
        while part := list(itertools.islice(rows, batch_size)):
            images, targets, bad = [None] * batch_size, [None] * batch_size, {}
            for slot, ((shard, row), value, label) in enumerate(part):
                name = f"row {row} of shard {shard}"
                images[slot], targets[slot] = self.read_row((shard, row), name, 0, value, label, bad)
            yield self.batch(images, targets, bad)

    def evaluation(self, batch_size: int) -> Iterator:
        """As `training`, but one pass; as many batches in every process."""
        batches = self.read(functools.partial(self.evaluation_batches, batch_size))
        while self.context.any_process((batch := next(batches, None)) is not None):
            if batch is None:
                batch = self.batch([None] * batch_size, [None] * batch_size, {})
            pixels, targets, bad = batch
            self.record_bad(bad)
            yield self.to_device(pixels, targets)

    def read(self, read: Callable[[int], Iterator]) -> Iterator:
        """What the readers make, in turn. Raises BadImage where one of them came to an untimely end."""
        for batch in self.load(self.context.num_workers, dataset=Reader(read), batch_size=None):
            if isinstance(batch, str):
                raise BadImage(f"--dataset_name: the split {self.split!r} cannot be read on: {batch}")
            yield batch

    def state_dict(self) -> dict[str, list[int]]:
        """Where the readers of this process are, for `go_on`."""
        return {str(reader): list(self.positions.get(reader, (0, 0))) for reader in range(self.readers)}

    def load_state_dict(self, state: dict[str, list[int]]) -> str | None:
        """Puts the readers where they were. Another number of readers begins a pass that none of them has begun.

        Returns:
            What there is to say about that, if anything.
        """
        self.positions = {int(reader): tuple(place) for reader, place in state.items()}
        if len(state) == self.readers:
            return None
        epoch = 1 + max(epoch for epoch, _ in self.positions.values())
        self.positions = {reader: (epoch, 0) for reader in range(self.readers)}
        return (
            f"the stream had {len(state)} decoding processes and now has {self.readers}: "
            f"it goes on with pass {epoch + 1} over the data, not where it was"
        )


class Reader(IterableDataset):
    """One of the decoding processes of a stream; an error leaves it as a string."""

    def __init__(self, read: Callable[[int], Iterator]):
        self.read = read

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        try:
            yield from self.read(0 if worker is None else worker.id)
        except Exception as error:  # the Hub, the file system and every format have errors of their own
            yield str(error) if isinstance(error, BadImage) else f"{type(error).__name__}: {error}"


def shuffled(rows: Iterable, size: int, draw: random.Random) -> Iterator:
    """The same rows, each of them exchanged with one of the last `size`."""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            slot = draw.randrange(size)
            yield buffer[slot]
            buffer[slot] = row
    draw.shuffle(buffer)
    yield from buffer
