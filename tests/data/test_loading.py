import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from tests.conftest import DIGITS
from vit_simple.data.loading import load_image_data

PICTURES = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(40)]


def save(folder, labels, names=("a", "b"), split="train", **columns):
    """A local data set of parquet files."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(names)), **dict.fromkeys(columns, Image())})
    rows = {"image": PICTURES[: len(labels)], "label": labels, **columns}
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(name, fraction=0.25, **options):
    return load_image_data(name, validation_fraction=fraction, **options)


def test_digits_are_split_by_class_and_the_test_split_stays_whole():
    data = load(DIGITS, fraction=0.1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert data.labels.class_names == [str(digit) for digit in range(10)]
    counts = np.bincount(data.splits["validation"]["label"])
    assert counts.min() >= 14 and counts.max() <= 15


def test_the_validation_part_is_a_function_of_the_seed():
    first, again, other = (load(DIGITS, seed=seed).splits["validation"]["label"][:] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_validation_split_of_the_data_is_used_as_it_is(tmp_path, name):
    for split, labels in (("train", [0, 1] * 4), (name, [1, 0])):
        file = save(tmp_path / "files", labels, split=split) + f"/{split}-00000-of-00001.parquet"
        load_dataset("parquet", data_files=file, split="train").save_to_disk(tmp_path / "set" / split)
    (tmp_path / "set/dataset_dict.json").write_text(f'{{"splits": ["train", "{name}"]}}')
    data = load(str(tmp_path / "set"))
    assert len(data.splits["train"]) == 8 and data.splits["validation"]["label"][:] == [1, 0]


def test_a_folder_of_pictures_is_a_data_set(tmp_path):
    from PIL import Image as Pillow

    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Pillow.new("L", (8 + number, 8), 50).save(path)
    assert load(str(tmp_path)).labels.class_names == ["cat", "dog"]


def test_every_form_of_a_data_set_is_loaded(tmp_path):
    rows = load_dataset(save(tmp_path / "parquet", [0, 1] * 4), split="train")
    DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows")
    for name in ("parquet", "parquet/train-00000-of-00001.parquet", "rows", "rows/data-00000-of-00001.arrow"):
        assert len(load(str(tmp_path / name), fraction=0).splits["train"]) == 8
    before = sorted(tmp_path.rglob("*"))
    data = load(str(tmp_path / "splits"), fraction=0.25, max_train_samples=4)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "validation": 2, "test": 2}
    assert sorted(tmp_path.rglob("*")) == before, "something was written into the data"


def test_a_part_of_a_data_set_is_drawn_by_seed():
    small, other = (load(DIGITS, max_train_samples=50, max_eval_samples=20, seed=seed).splits for seed in (0, 1))
    assert {split: len(rows) for split, rows in small.items()} == {"train": 50, "validation": 20, "test": 20}
    assert small["train"]["label"][:] != other["train"]["label"][:] and len(set(small["train"]["label"])) == 10
    assert len(load(DIGITS, max_train_samples=10**6).splits["train"]) == 1077


def test_no_validation_split_is_made_where_none_is_wanted():
    assert {split: len(rows) for split, rows in load(DIGITS, fraction=0).splits.items()} == {"train": 1437, "test": 360}


def test_a_data_set_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_name: '.*nowhere' cannot be loaded: "):
        load(str(tmp_path / "nowhere"))


def test_columns_that_do_not_fit_are_named_with_those_there_are(tmp_path):
    folder = save(tmp_path / "set", [0, 1] * 4, thumbnail=PICTURES[:8])
    columns = r"got the columns image \(Image\), label \(ClassLabel\), thumbnail \(Image\)"
    with pytest.raises(ValueError, match=f"--image_column_name: expected one Image column, {columns}"):
        load(folder)
    with pytest.raises(ValueError, match=f"--image_column_name: expected images in the column 'img', {columns}"):
        load(folder, image_column="img")
    with pytest.raises(ValueError, match="--label_column_name: expected labels in the column 'thumbnail'"):
        load(folder, image_column="image", label_column="thumbnail")
    assert load(folder, image_column="thumbnail").image_column == "thumbnail"


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([], ["a", "b"], 'cannot be loaded: Instruction "train" corresponds to no data'),
        ([0, 1, None, 1], ["a", "b"], r"expected labels from 0 to 1, got None in row 2 of the split 'train' \(1 such"),
        ([0, 1, -1, -1], ["a", "b"], r"expected labels from 0 to 1, got -1 in row 2 of the split 'train' \(2 such"),
        ([1, 1, 1, 1], ["a", "b"], "expected several classes in the split 'train', got 1 only"),
        ([0, 0, 0, 0], ["a"], r"expected at least two classes in 'label', got \['a'\]"),
        ([0, 0, 0, 1], ["a", "b"], "--train_val_split: 0.25 does not suit .*: the class 'b' has one image alone"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path, labels, names, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "set", labels, names))


def test_a_label_beyond_the_classes_is_found_in_any_split(tmp_path):
    save(tmp_path / "set", [0, 1] * 4)
    folder = save(tmp_path / "set", [0, 2], names=["a", "b", "c"], split="test")
    with pytest.raises(ValueError, match="expected labels from 0 to 1, got 2 in row 1 of the split 'test'"):
        load(folder)


@pytest.mark.parametrize("secret", [-1, None])
def test_a_test_split_whose_labels_are_secret_is_left_out(tmp_path, secret):
    save(tmp_path / "set", [0, 1] * 4)
    assert "test" not in load(save(tmp_path / "set", [secret, secret], split="test")).splits
    with pytest.raises(ValueError, match=f"got {secret} in row 1 of the split 'test'"):
        load(save(tmp_path / "set", [0, secret], split="test"))


def test_a_data_set_without_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a 'train' split in .*, got test"):
        load(save(tmp_path / "set", [0, 1], split="test"))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    rows = Dataset.from_dict({"image": PICTURES[:4], "price": [0.5, 1.5, 2.5, 4.0]}).cast_column("image", Image())
    rows.save_to_disk(tmp_path / "prices")
    with pytest.raises(ValueError, match=r"0.9 does not suit .*: all of the 4 images would be held out"):
        load(str(tmp_path / "prices"), fraction=0.9)
    assert load(str(tmp_path / "prices"), fraction=0.5).sizes == {"train": 2, "validation": 2}
