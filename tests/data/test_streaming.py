import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Features, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import classes, processor
from vit_simple.data.dataloader import LoaderContext
from vit_simple.data.decoding import BadImage, Decoder
from vit_simple.data.labels import IGNORED
from vit_simple.data.loading import ImageData
from vit_simple.data.streaming import StreamingSplit, shuffled

SQUASHED = processor(2)
FEATURES = Features({"image": Array3D((1, 2, 2), "uint8"), "label": ClassLabel(names=["a", "b"])})


def stream_of(shards: list[list[int]], workers=0, rank=0, world=1, buffer_size=4, split="train", bad=(), **options):
    """A stream of arrays (1, 2, 2), all of whose values are the row's number; a bad one has no label."""

    def rows(shards):
        for number in itertools.chain(*shards):
            label = None if number in bad else number % 2
            yield {"image": np.full((1, 2, 2), number, dtype=np.uint8), "label": label}

    stream = IterableDataset.from_generator(rows, FEATURES, gen_kwargs={"shards": shards})
    data = ImageData({split: stream}, "image", classes("a", "b"), {split: sum(map(len, shards))}, (1, 2, 2))
    decode = Decoder(SQUASHED, (1, 2, 2), arrays=True)
    process = LoaderContext(torch.device("cpu"), workers, rank, world)
    return StreamingSplit(data, split, decode, process, buffer_size=buffer_size, **options)


def numbers(batches, count=None) -> list[list[int]]:
    return [pixels[:, 0, 0, 0].tolist() for pixels, _ in itertools.islice(batches, count)]


SHARDS = [list(range(0, 7)), list(range(7, 12)), list(range(12, 24)), list(range(24, 30))]


@given(st.lists(st.integers()), st.integers(1, 8), st.integers(0, 99))
def test_a_buffer_changes_the_order_alone(rows, size, seed):
    found = list(shuffled(rows, size, random.Random(seed)))
    assert Counter(found) == Counter(rows)
    for place, row in enumerate(found):  # what comes out has been read
        assert row in rows[: place + size]


def test_a_buffer_holds_no_more_than_its_size():
    read = []
    rows = (read.append(row) or row for row in range(100))
    for place, _ in enumerate(shuffled(rows, 10, random.Random(0))):
        assert len(read) <= place + 11


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_readers_share_each_pass_whatever_their_number_and_the_sizes_of_the_shards(sizes, world, workers):
    numbered = itertools.count()
    shards = [[next(numbered) for _ in range(size)] for size in sizes]
    shared = []
    for rank in range(world):
        stream = stream_of(shards, workers, rank, world)
        for reader in range(workers):
            shared += [np.asarray(value).flat[0] for _, value, _ in stream.undecoded(reader, stream.shards)]
    assert sorted(shared) == list(range(sum(sizes)))


def test_many_small_files_are_dealt_out_in_sets_that_reach_over_all_of_them(monkeypatch):
    monkeypatch.setattr("vit_simple.data.streaming.MOST_SHARDS", 4)
    stream = stream_of([[row] for row in range(30)])  # as in a folder of pictures, class by class
    assert stream.shards == [0, 1, 2, 3]
    rows = [np.asarray(value).flat[0] for _, value, _ in stream.undecoded(0, stream.shards)]
    assert sorted(rows) == list(range(30)) and rows[:8] == list(range(0, 30, 4))
    many = stream_of([[row] for row in range(30)], workers=6)
    assert len(many.shards) == 6


def test_each_pass_has_every_row_once_in_an_order_of_its_own():
    rows = [row for batch in numbers(stream_of(SHARDS).training(6, 1, 0), 10) for row in batch]
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30)) and rows[:30] != rows[30:]
    assert {row // 6 for row in rows[:6]} != {0}  # the first batch is not of the first shard alone
    other = numbers(stream_of(SHARDS, seed=1).training(6, 1, 0), 5)
    assert [row for batch in other for row in batch] != rows[:30]


@pytest.mark.parametrize("workers", [0, 1, 3, 6])
def test_a_stream_goes_on_where_it_was(workers):
    """After 7 batches of 4, of which a step takes 1: the passes of the readers end at different times."""
    whole = numbers(stream_of(SHARDS, workers).training(4, 1, 0), 30)
    first = stream_of(SHARDS, workers)
    batches = first.training(4, 1, 0)
    assert numbers(batches, 7) == whole[:7]
    again = stream_of(SHARDS, workers)
    assert again.load_state_dict(first.state_dict()) is None
    assert numbers(again.training(4, 1, 7), 23) == whole[7:]


def test_another_number_of_readers_is_said_and_begins_a_pass():
    stream = stream_of(SHARDS, workers=3)
    said = stream.load_state_dict({"0": [4, 7], "1": [5, 1]})
    assert said.startswith("the stream had 2 decoding processes and now has 3: it goes on with pass 7")
    assert stream.state_dict() == {"0": [6, 0], "1": [6, 0], "2": [6, 0]}


@pytest.mark.parametrize("workers", [0, 1, 3, 6])
def test_evaluation_sees_every_row_once(workers):
    stream = stream_of(SHARDS, workers, split="test", bad=[5], on_bad_image="skip")
    for _ in range(2):
        pixels, labels = (torch.cat(parts) for parts in zip(*stream.evaluation(8)))
        counted = pixels[labels != IGNORED][:, 0, 0, 0]
        assert sorted(counted.tolist()) == [row for row in range(30) if row != 5] and len(pixels) % 8 == 0
        assert (labels[labels != IGNORED] == counted % 2).all()
    assert list(stream.bad) == ["row 5 of shard 0 of the split 'test'"]


def test_a_bad_row_is_named_or_passed_over():
    with pytest.raises(BadImage, match="got row 1 of shard 1 of the split 'train': label: expected labels"):
        numbers(stream_of(SHARDS, bad=[8]).training(6, 1, 0), 10)
    stream = stream_of(SHARDS, bad=[8], on_bad_image="skip")
    rows = [row for batch in numbers(stream.training(6, 1, 0), 10) for row in batch]
    assert sorted(rows[:29]) == [row for row in range(30) if row != 8] and 8 not in rows
    assert list(stream.bad) == ["row 1 of shard 1 of the split 'train'"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_usable_row_ends(workers):
    with pytest.raises(BadImage, match="got none"):
        numbers(stream_of([[1, 2], [3]], workers, bad=[1, 2, 3], on_bad_image="skip").training(2, 1, 0), 2)
    with pytest.raises(BadImage, match="expected images for each decoding process, got none in 3 passes"):
        numbers(stream_of([[1]], 2).training(2, 1, 0), 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_is_one_readable_line(workers):
    def rows(shards):
        yield {"image": np.zeros((1, 2, 2), dtype=np.uint8), "label": 0}
        raise ConnectionError("the line was cut")

    stream = stream_of(SHARDS, workers)
    stream.rows = IterableDataset.from_generator(rows, stream.rows.features, gen_kwargs={"shards": [0]}).with_format(
        "arrow"
    )
    with pytest.raises(BadImage, match=r"the split 'train' cannot be read on: .*the line was cut"):
        numbers(stream.training(1, 1, 0), 3)
