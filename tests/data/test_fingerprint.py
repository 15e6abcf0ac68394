import shutil

import numpy as np
from datasets import Array3D, Dataset, Features

from tests.conftest import DIGITS, classes, data_of, photographs
from vit_simple.data.fingerprint import differences, fingerprint, first_bytes, hash_images
from vit_simple.data.loading import ImageData, load_image_data


def changes(one: ImageData, other: ImageData) -> list[str]:
    return differences(fingerprint(one, ""), fingerprint(other, ""))


def test_fingerprint_sees_rows_labels_names_and_images(tmp_path):
    files = photographs(tmp_path)
    before = data_of(files, [0, 1, 0, 1])
    assert changes(before, data_of(files, [0, 1, 0, 1])) == []
    assert "train rows: was 4, is now 3" in changes(before, data_of(files[:3], [0, 1, 0]))
    assert changes(before, data_of(files, [0, 1, 1, 1])) == ["train labels have changed", "test labels have changed"]
    exchanged = data_of(files, [0, 1, 0, 1])
    exchanged.labels = classes("b", "a")
    assert changes(before, exchanged) == ["label names have changed"]
    other = data_of([files[1], *files[1:]], [0, 1, 0, 1])
    assert changes(before, other) == ["train images have changed", "test images have changed"]


def test_fingerprint_does_not_depend_on_where_the_dataset_lies(tmp_path):
    files = photographs(tmp_path)
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(file, tmp_path / "moved") for file in files]
    assert changes(data_of(files, [0, 1, 0, 1]), data_of(moved, [0, 1, 0, 1])) == []


def test_fingerprint_sees_images_that_rows_name_by_relative_paths(tmp_path):
    files = photographs(tmp_path)
    data = data_of(["0.jpg", "1.jpg"], [0, 1])
    data.sources = (str(tmp_path),)
    before = fingerprint(data, "")
    shutil.copy(files[2], files[0])
    assert differences(before, fingerprint(data, "")) == ["train images have changed", "test images have changed"]


def test_missing_image_has_no_bytes():
    assert first_bytes(None, (), 10) == first_bytes({"bytes": None, "path": None}, ("folder",), 10) == b""


def test_hash_of_all_images_sees_every_byte():
    pixels = np.zeros((2, 3, 200, 200), np.uint8)
    columns = Features({"image": Array3D((3, 200, 200), "uint8")})
    before = hash_images(Dataset.from_dict({"image": pixels}, columns), "image", (), sample=False)
    pixels[1, 2, -1, -1] = 1
    assert hash_images(Dataset.from_dict({"image": pixels}, columns), "image", (), sample=False) != before


def test_fingerprint_of_a_stream_sees_its_shards(tmp_path):
    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    data = load_image_data(str(folder), streaming=True)
    before = fingerprint(data, str(folder))
    assert differences(before, fingerprint(data, str(folder))) == []
    shutil.copy(folder / "test-00000-of-00001.parquet", folder / "train-00000-of-00001.parquet")
    now = fingerprint(load_image_data(str(folder), streaming=True), str(folder))
    assert differences(before, now) == ["train rows: was 1437, is now 360", "train shards have changed"]
