"""What people bring: folders and tables that need an answer before, not after, the training."""

import json

import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value

from vit_simple.data.dataloader import have_equal_sizes
from vit_simple.data.decoding import load_rgb
from vit_simple.data.labels import REGRESSION, SINGLE
from vit_simple.data.loading import load_image_data, local_path
from vit_simple.files import UserError, read_json
from vit_simple.train import main
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import load_data


def image(kind: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(kind).integers(0, 80, (12, 12, 3)).astype(np.uint8)
    pixels[..., kind % 3] += 120
    return PIL.Image.fromarray(pixels)


def write(folder, *files: str, content: PIL.Image.Image | None = None) -> str:
    """Writes images into a folder; the extension of a file does not matter to Pillow's reader."""
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (image(number) if content is None else content).save(folder / file, "PNG")
    return str(folder)


def classes(*names: str, count: int = 12, split: str = "train") -> list[str]:
    return [f"{split}/{name}/{number}.png" for number in range(count) for name in names]


def table(folder, labels: list, kind: str, split: str = "train") -> str:
    features = Features({"image": Image(), "label": Value(kind)})
    rows = Dataset.from_dict({"image": [image(row) for row in range(len(labels))], "label": labels}, features)
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def train(folder, tmp_path, *options: str) -> str:
    """Trains for a step; returns the model card."""
    model = "{image_size: 12, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    output = str(tmp_path / "run")
    main(["--dataset_name", folder, "--model", model, "--max_steps", "1", "--output_dir", output, *options])
    return (tmp_path / "run/README.md").read_text()


# Few images


def test_batch_size_follows_the_number_of_images(tmp_path, capsys):
    folder = write(tmp_path / "few", *classes("cat", "dog"))
    train(folder, tmp_path)
    printed = capsys.readouterr()
    assert "the batch size is 5, so that the 21 training images" in printed.out
    assert "21 training images are few for a model that starts from scratch" in printed.out
    assert "--model_name_or_path CHECKPOINT" in printed.out
    assert "Downloading" not in printed.err and "Generating" not in printed.err
    assert "per_device_train_batch_size: 5\n" in (tmp_path / "run/train_config.yaml").read_text()
    with pytest.raises(SystemExit, match=r"--per_device_train_batch_size: expected at most 21, .* got 128"):
        train(folder, tmp_path, "--per_device_train_batch_size", "128")


def test_evaluation_needs_other_images_than_those_for_training(tmp_path):
    folder = write(tmp_path / "few", *classes("cat", "dog"))
    train(folder, tmp_path)
    with pytest.raises(SystemExit, match="--eval_only: expected a validation or test split with labels, got only"):
        main(
            [
                "--eval_only",
                "--model_name_or_path",
                str(tmp_path / "run"),
                "--dataset_name",
                folder,
                "--train_val_split=0",
            ]
        )


def test_validation_split_gets_an_image_for_each_class(tmp_path):
    data = load_image_data(write(tmp_path, *classes(*"abcdefghij", count=3)))
    assert data.sizes == {"train": 20, "validation": 10} and len(set(data.splits["validation"]["label"])) == 10
    assert "10 images are held out for validation instead of 3" in data.report[0]


def test_only_image_of_a_class_is_not_held_out(tmp_path):
    data = load_image_data(write(tmp_path, *classes("cat", "dog"), "train/emu/0.png"))
    assert 2 in data.splits["train"]["label"] and 2 not in data.splits["validation"]["label"]
    assert data.report == ["not held out for validation, because it is the only image of its class: 'emu'"]


# Folders without classes


@pytest.mark.parametrize(
    "files, message",
    [
        (classes("cat"), r"expected several classes, got only 'cat'.*add a folder .* such as train/not_cat"),
        (
            [*classes("cat", "dog"), "train/cat/2021/n.png"],
            r"such as train/cat/0.png, got 1 elsewhere.*cat/2021/n",
        ),
        (
            [*classes("cat", "dog"), "test/1.png", "test/2.png"],
            r"such as train/cat/0.png, got 2 elsewhere.*test/1.png",
        ),
        (["train/1.png", "train/2.png"], "expected images in one folder for each class, such as .*, got train/1.png"),
        (["1.png", "2.png"], "expected images in one folder for each class, such as .*, got 1.png"),
        ([*classes("a", split="train"), *classes("b", split="test")], "got images without labels or of only one class"),
    ],
)
def test_folder_whose_classes_cannot_be_learned_is_explained(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        load_image_data(write(tmp_path, *files))


def test_folder_with_more_texts_than_images_is_explained(tmp_path):
    folder = write(tmp_path, *classes("cat", "dog", count=2))
    for number in range(9):
        (tmp_path / f"train/cat/{number}.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(UserError, match=r"expected a folder with mostly images, got 9 \.txt files and 4 images"):
        load_image_data(folder)


def test_folders_named_by_numbers_are_classes_or_numbers(tmp_path):
    folder = write(tmp_path, *classes("3", "20", "100", count=5))
    assert load_image_data(folder).labels.class_names == ["100", "20", "3"]
    labels = load_image_data(folder, problem_type=REGRESSION, validation_fraction=0).labels
    assert labels.mean == pytest.approx(41) and labels.target(2) == pytest.approx([(3 - labels.mean) / labels.std])
    with pytest.raises(UserError, match=r"--problem_type regression: the classes in 'label' are not numbers: .*'cat'"):
        load_image_data(write(tmp_path / "words", *classes("cat", "7")), problem_type=REGRESSION)


def test_class_without_training_images_is_named(tmp_path):
    files = [*classes("cat", "dog"), *classes("cat", "emu", split="validation", count=2)]
    data = load_image_data(write(tmp_path, *files))
    assert data.report == ["no training image has the class 'emu': the model cannot learn to predict it"]


# Files


def test_files_that_are_not_read_as_images_are_counted_and_named(tmp_path):
    files = ["train/cat/a.avif", "train/dog/b.mpo", "train/dog/c.HEIC", "train/dog/d.heic", "train/.hidden/e.avif"]
    folder = write(tmp_path, *classes("cat", "dog"), *files)
    (tmp_path / "notes.txt").write_text("mine")
    (line,) = load_image_data(folder).report
    assert line.startswith("left out 4 files that are not read as images: 2 .heic (train/dog/c.HEIC), ")
    assert "1 .avif (train/cat/a.avif)" in line and line.endswith("a .mpo file only needs the name .jpg")
    with pytest.raises(UserError, match=r"cannot be loaded: .*; left out 1 files .* 1 \.avif \(train/cat/a\.avif\)"):
        load_image_data(write(tmp_path / "only", "train/cat/a.avif"))


@pytest.mark.parametrize(
    "files, line",
    [
        (
            [*classes("cat/in", "cat/out", "dog/in", "dog/out")],
            "the innermost folder is the class, such as 'in' of train/dog/in/0.png: the names of the folders above it "
            "are not used",
        ),
        ([*classes("cat", "dog"), "train/fox/"], "without images, and so no classes: train/fox"),
        (
            [*classes("cat", "dog"), "train/cat/1.jpg.json", "train/dog/1.jpg.2"],
            "read 2 files such as train/cat/1.jpg.json as images, because of the .jpg in their names: remove them if "
            "they are none",
        ),
        (
            [
                f"{name}/{name}_{split}_{number}.png"
                for name in "ab"
                for split in ("train", "test")
                for number in range(9)
            ],
            "the names of the files decide their splits, such as a/a_test_0.png",
        ),
        (
            [*classes("cat", "dog"), "more/cat/1.png"],
            "left out 1 of 25 images, which are in no folder of a split, or broken links",
        ),
        (
            [*classes("cat", " Cat")],
            "the classes ' Cat' and 'cat' differ only in spaces or capitals: are they one class?",
        ),
    ],
)
def test_folders_that_may_mean_something_else_are_reported(tmp_path, files, line):
    for name in filter(lambda name: name.endswith("/"), files):
        (tmp_path / name).mkdir(parents=True)
    assert line in load_image_data(write(tmp_path, *(name for name in files if not name.endswith("/")))).report


def test_splits_and_classes_with_the_names_of_each_other_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rename the folder 'Test' to 'test', 'Train' to 'train'$"):
        load_image_data(
            write(tmp_path / "a", *classes("cat", "dog", split="Train"), *classes("cat", "dog", split="Test"))
        )
    with pytest.raises(UserError, match="expected classes without the name of a split, got 'train': rename"):
        load_image_data(write(tmp_path / "b", "car/1.png", "train/2.png"))
    with pytest.raises(UserError, match=r"expected a 'train' split in .*, got test; a class cannot have the name of a"):
        load_image_data(write(tmp_path / "c", "control/1.png", "test/2.png"))


def test_images_without_a_row_of_metadata_are_counted(tmp_path):
    folder = write(tmp_path, *(f"{number}.png" for number in range(24)))
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(22))
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + rows)
    assert "left out 2 of 24 images, which the metadata file does not name" in load_image_data(folder).report


def test_folders_beside_metadata_are_said_to_be_no_classes(tmp_path):
    files = classes("cat", "dog")
    write(tmp_path, *files)
    rows = "".join(f"{file.removeprefix('train/')},{number % 2}\n" for number, file in enumerate(files))
    (tmp_path / "train/metadata.csv").write_text("file_name,photographer\n" + rows)
    report = load_image_data(str(tmp_path)).report
    assert "the metadata file has the labels: the names of folders, such as 'cat', are not used" in report


def test_folder_with_the_name_of_a_format_is_read_itself(tmp_path, monkeypatch):
    write(tmp_path / "imagefolder", *classes("cat", "dog"))
    write(tmp_path / "pets", *classes("fox", "hen"))
    monkeypatch.chdir(tmp_path)
    assert load_image_data("imagefolder").labels.class_names == ["cat", "dog"]


def test_folders_of_the_package_are_not_taken_for_a_missing_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("data/digits").is_dir() and not local_path("data").exists()


@pytest.mark.parametrize(
    "file, options, message",
    [
        ("labels.csv", {}, "expected a folder or a .parquet, .arrow, .tar file, got .*labels.csv'; unpack an archive"),
        ("a.parquet", {"revision": "main"}, "--dataset_revision is for datasets on the Hub"),
        ("a.parquet", {"config_name": "plain"}, "--dataset_config_name: .*a.parquet' has no configurations"),
    ],
)
def test_files_that_need_another_form_or_no_option_are_refused(tmp_path, file, options, message):
    (tmp_path / file).write_text("")
    with pytest.raises(UserError, match=message):
        load_image_data(str(tmp_path / file), **options)


def test_classes_whose_folders_are_not_read_are_named(tmp_path):
    folder = write(tmp_path, *classes("cat", "dog", ".a", "__b", "c\nd"), "train/.empty/notes.txt")
    assert load_image_data(folder).report == [
        "left out 36 images in folders whose names begin with . or __ or have a line break, which are not read: "
        r"'.a', '__b', 'c\nd'; rename them if they are classes"
    ]


# Tables


def test_floats_are_numbers_or_classes(tmp_path):
    folder = table(tmp_path / "floats", [float(row % 2) for row in range(40)], "float64")
    numbers = load_image_data(folder)
    assert numbers.labels.problem_type == REGRESSION and numbers.labels.class_names == ["label"]
    assert numbers.report == [
        "the labels in 'label' are 2 different numbers (float64), so the model learns a regression; if they are "
        "classes, use --problem_type single_label_classification"
    ]
    for streaming in (False, True):
        labels = load_image_data(folder, problem_type=SINGLE, streaming=streaming).labels
        assert (labels.problem_type, labels.class_names, labels.target(1.0)) == (SINGLE, ["0", "1"], 1)


def test_integers_are_classes_or_numbers(tmp_path):
    folder = table(tmp_path / "ages", [20, 30, 40, 50] * 5, "int64")
    assert "each of them a class; if the model shall predict the number, use --problem_type regression" in str(
        load_image_data(folder).report
    )
    for streaming in (False, True):
        labels = load_image_data(folder, problem_type=REGRESSION, streaming=streaming, validation_fraction=0).labels
        assert (labels.problem_type, labels.mean, labels.target(35)) == (REGRESSION, 35, [0])
    words = table(tmp_path / "words", ["a", "b"] * 4, "string")
    with pytest.raises(UserError, match=r"expected single_label_classification for label \(string\), got regression"):
        load_image_data(words, problem_type=REGRESSION)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind, missing", [("string", None), ("string", " "), ("int64", None), ("float64", float("nan"))]
)
def test_rows_without_label_are_named_or_left_out(tmp_path, kind, missing, streaming):
    labels = [("abc" if kind == "string" else range(3))[row % 3] for row in range(40)]
    labels[5] = labels[8] = missing
    folder = table(tmp_path / "missing", labels, kind)
    with pytest.raises(UserError, match=r"in row 5 .*\(2 such rows.*--on_missing_label skip leaves out the rows"):
        load_image_data(folder, streaming=streaming)
    data = load_image_data(folder, on_missing_label="skip", streaming=streaming, validation_fraction=0)
    assert data.report[0] == "left out 2 of 40 rows of the split 'train', which have no label"
    kept = [row["label"] for row in data.splits["train"]]
    assert data.sizes["train"] == len(kept) == 38 and None not in kept and " " not in kept
    with pytest.raises(UserError, match="expected labels in the split 'train', got none in its 4 rows"):
        load_image_data(table(tmp_path / "none", [missing] * 4, kind), on_missing_label="skip", streaming=streaming)


# Images of which a pipeline sees other pixels


@pytest.mark.parametrize("cached", [True, False])
def test_images_that_a_pipeline_sees_otherwise_are_counted_with_the_code_that_helps(tmp_path, capsys, cached):
    files = classes("cat", "dog", count=4)
    folder = write(tmp_path / "images", *files)
    draw = np.random.default_rng(0)
    deep = PIL.Image.fromarray(draw.integers(0, 4096, (12, 12)).astype(np.uint16))
    clear = PIL.Image.fromarray(draw.integers(0, 256, (12, 12, 4)).astype(np.uint8))
    opaque = image().convert("RGBA")
    for file, content in zip(files, (deep, deep, clear, opaque)):
        content.save(tmp_path / "images" / file)
    options = ["--train_val_split", "0", "--per_device_train_batch_size", "8"]
    options += ["--random_resized_crop", "0" if cached else "0.9"]
    card = train(folder, tmp_path, *options)
    printed = capsys.readouterr().out
    assert "gray images of 12 bits are scaled to 8 bits" in printed
    assert "other pixels of 2 images (more than 8 bits), 1 images (transparent); to give it" in printed
    record = read_json(tmp_path / "run/provenance.json")
    assert (
        record["changed_images"] == {"more than 8 bits": 2, "transparent": 1} and record["dataset"]["bit_depth"] == 12
    )
    record["dataset"]["bit_depth"] = 14
    (tmp_path / "run/provenance.json").write_text(json.dumps(record))
    evaluation = TrainConfig(dataset_name=folder, model_name_or_path=str(tmp_path / "run"), eval_only=True)
    assert load_data(evaluation, Accelerator()).bit_depth == 14  # that of the checkpoint, as in predict.py
    code = card.partition("```python\nimport numpy as np\n")[2].partition("```")[0]
    helpful = {name: line for line in code.splitlines() for name in (">> 4", "alpha_composite") if name in line}
    for content, line in ((deep, helpful[">> 4"]), (clear, helpful["alpha_composite"])):
        names = {"image": content, "Image": PIL.Image, "np": np}
        exec(line, names)
        assert np.array_equal(names["image"].convert("RGB"), load_rgb(content.copy(), bit_depth=12))


def test_gray_values_beyond_the_bit_depth_are_refused():
    pixels = PIL.Image.fromarray(np.array([[0, 5000]], np.uint16))
    assert np.asarray(load_rgb(pixels.copy(), bit_depth=14))[0, 1, 0] == 5000 >> 6
    with pytest.raises(UserError, match="of 12 bits, got values up to 5000; use --bit_depth 14 or more"):
        load_rgb(pixels, bit_depth=12)


def test_photographs_of_both_orientations_have_different_sizes(tmp_path):
    photograph, sideways = PIL.Image.new("RGB", (16, 12)), PIL.Image.Exif()
    sideways[PIL.ExifTags.Base.Orientation] = 6
    for number in range(24):
        file = tmp_path / f"train/{'ab'[number % 2]}/{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph.save(file, exif=sideways if number > 20 else b"")
    data = load_image_data(str(tmp_path), validation_fraction=0)
    assert not have_equal_sizes(data)
    data.splits["train"] = data.splits["train"].select(range(8))
    assert have_equal_sizes(data)


# Names


@pytest.mark.parametrize("names", [("$5_$10", "price_$low_$high"), ("猫", "犬")])
def test_class_names_of_any_script_train(tmp_path, names, capsys):
    train(write(tmp_path / "images", *classes(*names, count=4)), tmp_path, "--per_device_train_batch_size", "4")
    assert "was left out" not in capsys.readouterr().err
    assert (tmp_path / "run/confusion.png").exists()
