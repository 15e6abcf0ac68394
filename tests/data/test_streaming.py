import itertools
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Array3D, ClassLabel, Features, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import classes, processor
from vit_simple.data.dataloader import LoaderContext
from vit_simple.data.decoding import Decoder
from vit_simple.data.labels import IGNORED
from vit_simple.data.loading import ImageData
from vit_simple.data.reading import BadImage
from vit_simple.data.streaming import StreamingSplit, shuffled
from vit_simple.files import UserError

SQUASHED = processor(2)
FEATURES = Features({"image": Array3D((1, 2, 2), "uint8"), "label": ClassLabel(names=["a", "b"])})


def stream_of(shards: list[list[int]], workers=0, rank=0, world_size=1, split="train", bad=(), error=None, **options):
    """A stream of arrays (1, 2, 2) filled with the row's number; bad rows have no label, and `error` is raised last."""

    def rows(shards):
        for number in itertools.chain(*shards):
            label = None if number in bad else number % 2
            yield {"image": np.full((1, 2, 2), number, dtype=np.uint8), "label": label}
        if error:
            raise error

    stream = IterableDataset.from_generator(rows, FEATURES, gen_kwargs={"shards": shards})
    data = ImageData({split: stream}, "image", classes("a", "b"), {split: sum(map(len, shards))}, (1, 2, 2))
    decode = Decoder(SQUASHED, (1, 2, 2), arrays=True)
    context = LoaderContext(torch.device("cpu"), workers, rank, world_size)
    return StreamingSplit(data, split, decode, context, **{"buffer_size": 4, **options})


def numbers(batches, count=None) -> list[list[int]]:
    return [pixels[:, 0, 0, 0].tolist() for pixels, _ in itertools.islice(batches, count)]


SHARDS = [list(range(0, 7)), list(range(7, 12)), list(range(12, 24)), list(range(24, 30))]


@given(st.lists(st.integers()), st.integers(1, 8), st.integers(0, 99))
def test_shuffled_changes_nothing_but_the_order(rows, buffer_size, seed):
    order = list(shuffled(rows, buffer_size, random.Random(seed)))
    assert Counter(order) == Counter(rows)
    for position, row in enumerate(order):
        assert row in rows[: position + buffer_size]


def test_shuffled_reads_no_more_rows_ahead_than_its_buffer_holds():
    rows = iter(range(100))
    for position, _ in enumerate(shuffled(rows, 10, random.Random(0))):
        assert 100 - rows.__length_hint__() <= position + 11


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_readers_share_all_rows_for_any_number_of_readers_and_sizes_of_shards(sizes, world_size, workers):
    numbered = itertools.count()
    shards = [[next(numbered) for _ in range(size)] for size in sizes]
    rows = []
    for rank in range(world_size):
        stream = stream_of(shards, workers, rank, world_size)
        for reader in range(workers):
            rows += [np.asarray(image).flat[0] for _, image, _ in stream.undecoded(reader, stream.shards)]
    assert sorted(rows) == list(range(sum(sizes)))


def test_shards_of_many_small_files_are_sets_spread_over_all_files():
    files = [[row] for row in range(30)]  # as in a folder of images, class by class
    stream = stream_of(files, max_shards=4)
    assert stream.shards == [0, 1, 2, 3]
    rows = [np.asarray(image).flat[0] for _, image, _ in stream.undecoded(0, stream.shards)]
    assert sorted(rows) == list(range(30)) and rows[:8] == list(range(0, 30, 4))
    assert len(stream_of(files, workers=6, max_shards=4).shards) == 6


def test_epoch_of_a_stream_has_every_row_once_in_its_own_order():
    rows = [row for batch in numbers(stream_of(SHARDS).training(6, 1, 0), 10) for row in batch]
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30)) and rows[:30] != rows[30:]
    assert {row // 6 for row in rows[:6]} != {0}  # the first batch is not of the first shard alone
    other = numbers(stream_of(SHARDS, seed=1).training(6, 1, 0), 5)
    assert [row for batch in other for row in batch] != rows[:30]


@pytest.mark.parametrize("workers", [0, 1, 3, 6])
def test_stream_resumes_exactly_with_the_same_number_of_workers(workers):
    """After 7 batches of 4 rows, when the readers are in different epochs."""
    whole = numbers(stream_of(SHARDS, workers).training(4, 1, 0), 30)
    first = stream_of(SHARDS, workers)
    batches = first.training(4, 1, 0)
    assert numbers(batches, 7) == whole[:7]
    resumed = stream_of(SHARDS, workers)
    assert resumed.load_state_dict(first.state_dict()) is None
    assert numbers(resumed.training(4, 1, 7), 23) == whole[7:]


def test_stream_starts_an_epoch_and_says_so_if_the_number_of_workers_changed():
    stream = stream_of(SHARDS, workers=3)
    message = stream.load_state_dict({"0": [4, 7], "1": [5, 1]})
    assert message.startswith("the stream was read by 2 workers and is now read by 3: epoch 7 of the data starts")
    assert stream.state_dict() == {"0": [6, 0], "1": [6, 0], "2": [6, 0]}


@pytest.mark.parametrize("workers", [0, 1, 3, 6])
def test_evaluation_of_a_stream_has_every_row_once(workers):
    stream = stream_of(SHARDS, workers, split="test", bad=[5], on_bad_image="skip")
    for _ in range(2):
        pixels, labels = (torch.cat(batches) for batches in zip(*stream.evaluation(8)))
        counted = pixels[labels != IGNORED][:, 0, 0, 0]
        assert sorted(counted.tolist()) == [row for row in range(30) if row != 5] and len(pixels) % 8 == 0
        assert (labels[labels != IGNORED] == counted % 2).all()
    assert list(stream.bad) == ["row 5 of shard 0 of the split 'test'"]


def test_bad_row_of_a_stream_is_named_or_skipped():
    with pytest.raises(BadImage, match="row 1 of shard 1 of the split 'train' cannot be used: label: expected labels"):
        numbers(stream_of(SHARDS, bad=[8]).training(6, 1, 0), 10)
    stream = stream_of(SHARDS, bad=[8], on_bad_image="skip")
    rows = [row for batch in numbers(stream.training(6, 1, 0), 10) for row in batch]
    assert sorted(rows[:29]) == [row for row in range(30) if row != 8] and 8 not in rows
    assert list(stream.bad) == ["row 1 of shard 1 of the split 'train'"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_without_a_usable_row_raises(workers):
    message = "a worker found no image that can be used in 3 epochs of the split 'train'"
    with pytest.raises(BadImage, match=message):
        numbers(stream_of([[1, 2], [3]], workers, bad=[1, 2, 3], on_bad_image="skip").training(2, 1, 0), 2)
    with pytest.raises(BadImage, match=message):
        numbers(stream_of([[1]], 2).training(2, 1, 0), 2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error, raised, message",
    [
        (pa.ArrowInvalid("damaged"), UserError, "^--dataset_name: the split 'train' cannot be read: damaged$"),
        (ConnectionError("cut off"), ConnectionError, "^cut off$"),
        (OSError(28, "no space"), OSError, "no space$"),
        (TypeError("a bug"), TypeError, "a bug"),
    ],
)
def test_stream_raises_the_same_error_from_a_worker(workers, error, raised, message):
    with pytest.raises(raised, match=message) as caught:
        numbers(stream_of([[1, 2]], workers, error=error).training(1, 1, 0))
    assert caught.type is raised
    if raised is TypeError and workers:
        assert "in rows" in str(caught.value)  # the traceback of the worker
