import errno
import io
import os
import threading
import weakref
import zipfile

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image

from tests.conftest import data_of, images_of, photographs, processor
from vit_simple.data import decoding, reading
from vit_simple.data.dataloader import LoaderContext
from vit_simple.data.loading import load_image_data
from vit_simple.data.reading import BadImage, read_bytes
from vit_simple.data.streaming import StreamingSplit
from vit_simple.files import RunError

OUTSIDE = "rows may only name files in"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.05, 0.2, 0.5))


@pytest.fixture
def private(tmp_path):
    """An image of this machine, beside the folder of a dataset."""
    (tmp_path / "dataset").mkdir()
    PIL.Image.new("RGB", (9, 9), "red").save(tmp_path / "private.png")
    return tmp_path / "private.png"


def test_row_names_no_file_outside_of_its_dataset(tmp_path, private):
    folder = tmp_path / "dataset"
    (tmp_path / "dataset_2").mkdir()
    (tmp_path / "dataset_2/near.png").write_bytes(private.read_bytes())
    with zipfile.ZipFile(tmp_path / "private.zip", "w") as archive:
        archive.write(private, "private.png")
    paths = [str(private), "../private.png", "a/../../private.png", str(tmp_path / "dataset_2/near.png")]
    paths += [f"file://{private}", f"local://{private}", "http://127.0.0.1:9/x.png", "hf://datasets/user/other/x.png"]
    paths += [
        "hf://datasets/user/own@main/../../other/x.png",
        f"zip://private.png::{tmp_path}/private.zip",
        "/dev/zero",
    ]
    for path in paths:
        with pytest.raises(BadImage, match=OUTSIDE):
            read_bytes({"bytes": None, "path": path}, (str(folder), "hf://datasets/user/own@"))
    with pytest.raises(BadImage, match=OUTSIDE):
        read_bytes({"bytes": None, "path": str(private)}, ())


def test_row_names_files_and_members_of_archives_in_its_dataset(tmp_path, private):
    folder = tmp_path / "dataset"
    (folder / "0.png").write_bytes(private.read_bytes())
    (folder / "link.png").symlink_to(private)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(private, "1.png")
    for path in (
        "0.png",
        str(folder / "0.png"),
        "link.png",
        str(folder / "link.png"),
        f"zip://1.png::{folder}/images.zip",
        "zip://1.png::images.zip",
    ):
        assert read_bytes({"bytes": None, "path": path}, (str(folder),)) == private.read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_private_image_that_a_dataset_names_is_not_shown(tmp_path, private, streaming):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    own = io.BytesIO()
    PIL.Image.new("RGB", (9, 9), "blue").save(own, "PNG")
    images = [{"bytes": own.getvalue(), "path": None}, {"bytes": None, "path": str(private)}]
    images.append({"bytes": None, "path": "../private.png"})
    rows = pa.table({"image": images, "label": [0, 1, 0]}, features.arrow_schema)  # which names the features
    for split in ("train", "test"):
        pq.write_table(rows, tmp_path / f"dataset/{split}.parquet")
    data = load_image_data(str(tmp_path / "dataset"), validation_fraction=0, streaming=streaming)
    split = images_of(data, "test", processor(8), (8, 8), on_bad_image="skip")
    if streaming:
        split = StreamingSplit(data, "test", split.decode, LoaderContext(torch.device("cpu")), "skip")
    (batch,) = split.evaluation(3)
    (sample,) = split.samples(9)
    for pixels in (*batch[0], sample[0]):
        assert not (pixels[0] > 0).any()  # nothing is red
    assert len(split.bad) == 2 and all(OUTSIDE in reason for reason in split.bad.values())


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    for path in ("fifo.png", "."):
        with pytest.raises(BadImage, match=r"expected a regular file|not in the dataset"):
            read_bytes({"bytes": None, "path": path}, (str(tmp_path),))
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    (tmp_path / "large.png").write_bytes(bytes(11))
    with pytest.raises(BadImage, match="expected at most 10 bytes"):
        read_bytes({"bytes": None, "path": "large.png"}, (str(tmp_path),))


ERRORS = [
    *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)),
    TimeoutError("timed out"),
    MemoryError(),
]


@pytest.mark.parametrize("where", ["read", "decode"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_the_machine_is_not_a_bad_image(tmp_path, monkeypatch, where, error, num_workers):
    if where == "decode" and isinstance(error, TimeoutError):
        pytest.skip("nothing waits while an image is decoded")
    data = data_of(photographs(tmp_path), [0, 1, 0, 1])
    expected = next(images_of(data, "train", processor(16), (16, 16)).batches([(0, [0, 1, 2, 3])]))[0]
    module, name = (reading, "read_file") if where == "read" else (decoding, "load_rgb")
    function, calls = getattr(module, name), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) <= failures:
            raise error
        return function(*arguments)

    monkeypatch.setattr(module, name, fail)
    failures = 3
    split = images_of(data, "train", processor(16), (16, 16), on_bad_image="skip")
    split.context.num_workers = num_workers
    assert torch.equal(next(split.batches([(0, [0, 1, 2, 3])]))[0], expected) and not split.bad
    failures = 10**9
    with pytest.raises(RunError, match=r"^row 2 of the split 'train' .*jpg. cannot be read, after 4 attempts: "):
        next(split.batches([(0, [2, 3])]))
    assert not split.bad


@pytest.mark.parametrize("renamed", [".", "train", "train/a"])
def test_folder_that_is_away_for_a_moment_loses_no_image(tmp_path, renamed):
    dataset = tmp_path / "images"
    for name in "ab":
        (dataset / "train" / name).mkdir(parents=True)
        photographs(dataset / "train" / name)
    data = load_image_data(str(dataset), validation_fraction=0)
    split = images_of(data, "train", processor(16), (16, 16), on_bad_image="skip")
    folder = dataset / renamed
    folder.rename(tmp_path / "away")
    threading.Timer(0.2, (tmp_path / "away").rename, [folder]).start()
    next(split.batches([(0, list(range(8)))]))
    assert not split.bad


def test_missing_files_are_bad_images_and_cost_no_more_than_one_wait(tmp_path, monkeypatch):
    (tmp_path / "there.png").touch()
    waits = []
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    for path in [f"{number}.png" for number in range(50)] + [f"nowhere/{number}.png" for number in range(50)]:
        with pytest.raises(BadImage, match="there is no file"):
            read_bytes({"bytes": None, "path": path}, (str(tmp_path),))
    assert waits == list(reading.WAITS)


def test_dataset_that_is_gone_ends_the_run(tmp_path):
    (tmp_path / "images").mkdir()
    split = images_of(data_of(photographs(tmp_path / "images"), [0, 1, 0, 1]), "train", processor(16), (16, 16))
    (tmp_path / "images").rename(tmp_path / "away")
    (tmp_path / "images").mkdir()  # as the folder of a disk that is not mounted
    with pytest.raises(RunError, match=r"the dataset's folder .*images is gone"):
        next(split.batches([(0, [0, 1])]))


@pytest.mark.parametrize("streaming", [False, True])
def test_large_images_are_not_kept_at_their_full_size(tmp_path, monkeypatch, streaming):
    for number in range(8):
        path = tmp_path / "images/train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (50, 50), (number * 30, 0, 0)).save(path)
    data = load_image_data(str(tmp_path / "images"), validation_fraction=0, streaming=streaming)
    split = images_of(data, "train", processor(16), (16, 16))
    if streaming:
        split = StreamingSplit(data, "train", split.decode, LoaderContext(torch.device("cpu")))
    load_rgb, decoded, alive = decoding.load_rgb, [], []

    def count(image, *rest):
        alive.append(sum(reference() is not None for reference in decoded))
        image = load_rgb(image, *rest)
        decoded.append(weakref.ref(image))
        return image

    assert decoding.MAX_FULL_BYTES <= 32 * 2**20
    monkeypatch.setattr(decoding, "MAX_FULL_BYTES", 1000)
    monkeypatch.setattr(decoding, "load_rgb", count)
    (batch,) = split.evaluation(8)
    assert len(alive) == 8 and max(alive) <= 1
    assert sorted(batch[0][:, 0, 0, 0].tolist()) == [number * 30 for number in range(8)]


@pytest.mark.parametrize("cropped", [False, True])
def test_pixels_do_not_depend_on_what_is_resized_together(tmp_path, monkeypatch, cropped):
    data = data_of(photographs(tmp_path), [0, 1, 0, 1])
    split = images_of(data, "train", processor(16, cropped), (16, 16))
    together = next(split.batches([(0, [0, 1, 2, 3])]))[0]
    monkeypatch.setattr(decoding, "MAX_FULL_BYTES", 0)
    assert torch.equal(next(split.batches([(0, [0, 1, 2, 3])]))[0], together)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_batch_is_not_larger_than_its_split(tmp_path, streaming):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        photographs(tmp_path / "train" / name)
    data = load_image_data(str(tmp_path), validation_fraction=0, streaming=streaming)
    split = images_of(data, "train", processor(16), (16, 16))
    if streaming:
        split = StreamingSplit(data, "train", split.decode, LoaderContext(torch.device("cpu")))
    assert [len(pixels) for pixels, _ in split.evaluation(200_000)] == [8]
