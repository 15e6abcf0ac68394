import errno
import io
import os
import tarfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, load_dataset
from datasets.exceptions import DatasetGenerationError

from tests.conftest import DIGITS
from vit_simple.data.loading import load_image_data, raise_user_error
from vit_simple.files import UserError

IMAGES = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(40)]


def save(folder, labels, names=("a", "b"), split="train", **columns):
    """A local dataset of parquet files."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(names)), **dict.fromkeys(columns, Image())})
    rows = {"image": IMAGES[: len(labels)], "label": labels, **columns}
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(name, fraction=0.25, **options):
    return load_image_data(name, validation_fraction=fraction, **options)


def test_validation_split_is_stratified_and_test_split_stays_whole():
    data = load(DIGITS, fraction=0.1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert data.labels.class_names == [str(digit) for digit in range(10)]
    counts = np.bincount(data.splits["validation"]["label"])
    assert counts.min() >= 14 and counts.max() <= 15


def test_validation_split_is_a_function_of_the_seed():
    first, second, other = (load(DIGITS, seed=seed).splits["validation"]["label"][:] for seed in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_validation_split_of_the_dataset_is_used_as_it_is(tmp_path, name):
    for split, labels in (("train", [0, 1] * 4), (name, [1, 0])):
        file = save(tmp_path / "files", labels, split=split) + f"/{split}-00000-of-00001.parquet"
        load_dataset("parquet", data_files=file, split="train").save_to_disk(tmp_path / "set" / split)
    (tmp_path / "set/dataset_dict.json").write_text(f'{{"splits": ["train", "{name}"]}}')
    data = load(str(tmp_path / "set"))
    assert len(data.splits["train"]) == 8 and data.splits["validation"]["label"][:] == [1, 0]


def test_image_folder_is_loaded_with_its_class_names(tmp_path):
    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (8 + number, 8), 50).save(path)
    assert load(str(tmp_path)).labels.class_names == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["class", "classes"])
def test_splits_that_number_the_classes_differently_are_refused(tmp_path, kind):
    splits, picture = DatasetDict(), PIL.Image.new("L", (8, 8))
    for split, classes in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        feature, labels = ClassLabel(names=classes), [0, 1] * 4
        if kind == "classes":
            feature, labels = List(feature), [[label] for label in labels]
        columns = Features({"image": Image(), "label": feature})
        splits[split] = Dataset.from_dict({"image": [picture] * 8, "label": labels}, columns)
        splits[split].to_parquet(tmp_path / f"parquet/{split}.parquet")
    splits.save_to_disk(tmp_path / "saved")
    for name, *places in (
        ("parquet", "train.parquet", "test.parquet"),
        ("saved", "the split 'train'", "the split 'test'"),
    ):
        with pytest.raises(UserError, match="class 0 is 'cat' in .*{} and 'dog' in .*{}; write all".format(*places)):
            load(str(tmp_path / name))


def test_dataset_is_loaded_from_folder_file_and_save_to_disk(tmp_path):
    rows = load_dataset(save(tmp_path / "parquet", [0, 1] * 4), split="train")
    DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows")
    for name in ("parquet", "parquet/train-00000-of-00001.parquet", "rows", "rows/data-00000-of-00001.arrow"):
        assert len(load(str(tmp_path / name), fraction=0).splits["train"]) == 8
    before = sorted(tmp_path.rglob("*"))
    data = load(str(tmp_path / "splits"), fraction=0.25, max_train_samples=4)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "validation": 2, "test": 2}
    assert sorted(tmp_path.rglob("*")) == before, "something was written into the dataset"


def test_max_samples_draws_subsets_by_seed():
    small, other = (load(DIGITS, max_train_samples=50, max_eval_samples=20, seed=seed).splits for seed in (0, 1))
    assert {split: len(rows) for split, rows in small.items()} == {"train": 50, "validation": 20, "test": 20}
    assert small["train"]["label"][:] != other["train"]["label"][:] and len(set(small["train"]["label"])) == 10
    assert len(load(DIGITS, max_train_samples=10**6).splits["train"]) == 1077


def test_validation_fraction_zero_holds_nothing_out():
    assert {split: len(rows) for split, rows in load(DIGITS, fraction=0).splits.items()} == {"train": 1437, "test": 360}


@pytest.mark.parametrize(
    "path, content, reason",
    [
        ("nowhere", None, "Couldn't find any data file"),
        ("empty/README.md", b"", "The directory .* doesn't contain any data files"),
        ("broken/train.parquet", b"not parquet", "Parquet magic bytes not found"),
        ("broken.arrow", b"not arrow" * 50, "Not an Arrow file"),
        ("broken.tar", b"not tar" * 500, "ReadError: "),
        ("card/README.md", b"---\nconfigs: [\n---\n", "ParserError: "),
        ("script/script.py", b"", "RuntimeError: Dataset scripts are no longer supported"),
        ("dataset_dict.json", b"{", "Expecting property name"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_load_names_dataset_that_is_missing_or_damaged(tmp_path, path, content, reason, streaming):
    name = tmp_path / path
    if content is not None:
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(content)
        name = name if name.suffix in (".arrow", ".tar") else name.parent
    reason = "written by save_to_disk" if streaming and path == "dataset_dict.json" else f"cannot be loaded: {reason}"
    with pytest.raises(UserError, match=reason) as error:
        load(str(name), streaming=streaming)
    assert str(name) in str(error.value) and "\n" not in str(error.value)


def test_load_names_unknown_configuration(tmp_path):
    with pytest.raises(UserError, match=r"BuilderConfig 'no' not found. Available: .'default'."):
        load(save(tmp_path / "set", [0, 1] * 4), config_name="no")


@pytest.mark.parametrize(
    "error, converted",
    [
        (pa.ArrowInvalid("bad"), UserError),
        (tarfile.ReadError("bad"), UserError),
        (FileNotFoundError("bad"), UserError),
        (ConnectionError("bad"), ConnectionError),
        (OSError(errno.ENOSPC, "bad"), OSError),
        (TypeError("bad"), TypeError),
    ],
)
def test_raise_user_error_passes_machine_errors_and_bugs(error, converted):
    with pytest.raises(converted, match="bad"), raise_user_error("cannot be loaded"):
        raise error
    with pytest.raises(converted, match="bad"), raise_user_error("cannot be loaded"):
        raise DatasetGenerationError from error


def test_columns_that_are_missing_or_ambiguous_are_named(tmp_path):
    folder = save(tmp_path / "set", [0, 1] * 4, thumbnail=IMAGES[:8])
    columns = r"got the columns image \(Image\), label \(ClassLabel\), thumbnail \(Image\)"
    with pytest.raises(UserError, match=f"--image_column_name: expected one Image column, {columns}"):
        load(folder)
    with pytest.raises(UserError, match=f"--image_column_name: expected images in the column 'img', {columns}"):
        load(folder, image_column="img")
    with pytest.raises(UserError, match="--label_column_name: expected labels in the column 'thumbnail'"):
        load(folder, image_column="image", label_column="thumbnail")
    assert load(folder, image_column="thumbnail").image_column == "thumbnail"


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([], ["a", "b"], 'cannot be loaded: Instruction "train" corresponds to no data'),
        ([0, 1, None, 1], ["a", "b"], r"expected labels from 0 to 1, got None in row 2 of the split 'train' \(1 such"),
        ([0, 1, -1, -1], ["a", "b"], r"expected labels from 0 to 1, got -1 in row 2 of the split 'train' \(2 such"),
        ([1, 1, 1, 1], ["a", "b"], "expected several classes in the split 'train', got only 'b': one class cannot be"),
        ([0, 0, 0, 0], ["a"], "expected several classes in the split 'train', got only 'a'"),
        ([0, 1], ["a", "b"], "--train_val_split: expected at least two images of each class, .* 2 of 2 classes have"),
    ],
)
def test_labels_that_cannot_be_learned_raise(tmp_path, labels, names, message):
    with pytest.raises(UserError, match=message):
        load(save(tmp_path / "set", labels, names))


def test_label_out_of_range_is_found_in_any_split(tmp_path):
    save(tmp_path / "set", [0, 1] * 4)
    folder = save(tmp_path / "set", [0, 2], names=["a", "b", "c"], split="test")
    message = "expected labels from 0 to 1, got 2 in row 1 of the split 'test'"
    with pytest.raises(UserError, match=message):
        load(folder)
    folder = save(tmp_path / "set", [None, 2], names=["a", "b", "c"], split="test")
    with pytest.raises(UserError, match=message):
        load(folder, on_missing_label="skip")


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_test_labels_leave_the_test_split_out(tmp_path, hidden):
    save(tmp_path / "set", [0, 1] * 4)
    data = load(save(tmp_path / "set", [hidden, hidden], split="test"))
    assert "test" not in data.splits
    assert "the split 'test' is not used, because none of its rows has a label" in data.report
    with pytest.raises(UserError, match=f"got {hidden} in row 1 of the split 'test'"):
        load(save(tmp_path / "set", [0, hidden], split="test"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_split_whose_rows_are_all_left_out_is_not_used(tmp_path, split, streaming):
    save(tmp_path / "set", [0, 1] * 4)
    folder = save(tmp_path / "set", [None, None], split=split)
    data = load(folder, on_missing_label="skip", streaming=streaming)
    assert f"the split {split!r} is not used, because it has no rows" in data.report
    assert data.sizes == ({"train": 8} if streaming else {"train": 6, "validation": 2})


def test_damaged_shard_of_a_stream_is_named(tmp_path):
    folder = save(tmp_path / "set", [0, 1] * 4)
    (tmp_path / "set/train-00001-of-00002.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"--dataset_name: .*train-00001-of-00002\.parquet cannot be read: "):
        load(folder, streaming=True)


def saved(folder, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_split_without_labels_is_reported_if_it_is_test_and_refused_otherwise(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    train = Dataset.from_dict({"image": IMAGES[:8], "label": [0, 1] * 4}, features)
    bare = train.remove_columns("label")
    data = load(saved(tmp_path / "one", train=train, test=bare))
    assert "the split 'test' is not used, because it has no column 'label'" in data.report
    assert list(data.splits) == ["train", "validation"]
    with pytest.raises(UserError, match="expected the column 'label' in the split 'validation', too, got the columns"):
        load(saved(tmp_path / "two", train=train, validation=bare))


def test_stream_without_training_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected rows in the split 'train', got none"):
        load(save(tmp_path / "set", []), streaming=True)


def test_splits_that_are_not_used_are_named(tmp_path):
    rows = Dataset.from_dict({"image": IMAGES[:8], "label": list("abababab")}).cast_column("image", Image())
    data = load(saved(tmp_path / "set", train=rows, val=rows, dev=rows, holdout=rows))
    assert data.report[0].startswith("not used: the splits 'dev', 'holdout'; only train, test and validation")


def test_sample_of_one_class_names_the_option_that_drew_it():
    with pytest.raises(UserError, match="--max_train_samples: 1 random images are all of one class; use more"):
        load(DIGITS, max_train_samples=1)


def test_train_split_is_required(tmp_path):
    with pytest.raises(UserError, match=r"expected a 'train' split in .*, got test"):
        load(save(tmp_path / "set", [0, 1], split="test"))


@pytest.mark.parametrize("hidden", [False, True])
def test_stream_reads_all_labels_only_if_the_card_lacks_them_or_classes_are_counted(tmp_path, hidden):
    folder = save(tmp_path / "set", [0, 1] * 4)
    save(tmp_path / "set", [-1] * 8 if hidden else [0, 1] * 4, split="test")
    reads = []

    def on_main_process(function):
        reads.append(function)
        return function()

    def stream(**options):
        return load(folder, streaming=True, on_main_process=on_main_process, **options)

    without_card = stream()
    assert len(reads) == 1 and without_card.labels.class_counts == [4, 4]
    card = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
    card += "      class_label:\n        names:\n          '0': no\n          '1': red\n  splits:\n"
    card += "".join(f"  - name: {split}\n    num_bytes: 9999\n    num_examples: 8\n" for split in ("train", "test"))
    (tmp_path / "set/README.md").write_text(card + "---\n")
    with_card = stream()
    assert len(reads) == 1 and with_card.labels.class_counts is None
    assert with_card.labels.class_names == ["False", "red"]  # in YAML an unquoted no is False
    assert with_card.sizes == without_card.sizes == ({"train": 8} if hidden else {"train": 8, "test": 8})
    assert list(with_card.splits) == list(with_card.sizes)
    assert stream(count_classes=True).labels.class_counts == [4, 4] and len(reads) == 2


def test_validation_fraction_must_leave_images_to_train_on(tmp_path):
    rows = Dataset.from_dict({"image": IMAGES[:4], "price": [0.5, 1.5, 2.5, 4.0]}).cast_column("image", Image())
    rows.save_to_disk(tmp_path / "prices")
    with pytest.raises(UserError, match=r"--train_val_split: 0\.9 would hold out all of the 4 images"):
        load(str(tmp_path / "prices"), fraction=0.9)
    assert load(str(tmp_path / "prices"), fraction=0.5).sizes == {"train": 2, "validation": 2}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "damage, message",
    [
        ("label", "the .cls files of a tar must hold numbers"),
        ("cut in an image", "unexpected end of data"),
        ("cut after an image", "got None in row 6 .* they have no label, perhaps because a file is cut off"),
    ],
)
def test_damaged_tar_is_refused_with_the_reason(tmp_path, streaming, damage, message):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for row in range(7):
            label = b"x" if damage == "label" else str(row % 2).encode()
            for name, content in ((f"{row}.png", bytes(3000)), (f"{row}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                if name == "6.png":
                    end = archive.offset
    if damage.startswith("cut"):
        os.truncate(path, end - 2000 if damage == "cut in an image" else end)
    with pytest.raises(UserError, match=message):
        load_image_data(str(path), validation_fraction=0, streaming=streaming)
