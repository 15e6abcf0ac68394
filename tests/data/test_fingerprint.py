import shutil

from tests.conftest import DIGITS, classes, data_of, photographs
from vit_simple.data.fingerprint import differences, fingerprint
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


def test_fingerprint_of_a_stream_sees_its_shards(tmp_path):
    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    data = load_image_data(str(folder), streaming=True)
    before = fingerprint(data, str(folder))
    assert differences(before, fingerprint(data, str(folder))) == []
    shutil.copy(folder / "test-00000-of-00001.parquet", folder / "train-00000-of-00001.parquet")
    now = fingerprint(load_image_data(str(folder), streaming=True), str(folder))
    assert differences(before, now) == ["train rows: was 1437, is now 360", "train shards have changed"]
