"""Every kind of label, image and array from the dataset to a prediction, streamed or not."""

import io
import json
import re
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, List, Value
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from vit_simple.data.labels import MULTI, REGRESSION, SINGLE, Labels
from vit_simple.data.loading import load_image_data
from vit_simple.files import UserError
from vit_simple.train import main
from vit_simple.training.step import criterion

MODEL = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
# With a learning rate of 0.01 or more, some seeds do not learn the tasks below; with this one, each does by far.
RUN = ["--model", MODEL, "--max_steps", "150", "--per_device_train_batch_size", "16", "--learning_rate", "0.005"]
RUN += ["--horizontal_flip", "0", "--lr_scheduler_type", "linear", "--eval_steps", "75"]
COUNT = 80
STREAM = ["--streaming", "--random_resized_crop", "0"]


def save(folder, images, labels, image=None, label=None) -> str:
    """Writes a dataset of parquet files: 64 rows for training, 8 each for validation and test."""
    features = Features({"image": image or Image(), "label": label})
    rows = Dataset.from_dict({"image": list(images), "label": labels}, features)
    folder.mkdir(exist_ok=True)
    for split, numbers in (("train", range(64)), ("validation", range(64, 72)), ("test", range(72, COUNT))):
        rows.select(numbers).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def run(tmp_path, name: str, *options) -> tuple[str, dict]:
    """Trains; returns the folder and the last line of metrics.jsonl."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    main(["--dataset_name", name, *RUN, "--output_dir", str(folder), *options])
    return str(folder), json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def colors(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 3) with or without red, green and blue, and whether they have them (N, 3)."""
    draw = np.random.default_rng(seed)
    present = draw.integers(0, 2, (COUNT, 3))
    noise = draw.integers(0, 50, (COUNT, 8, 8, 3))
    return (present[:, None, None] * 200 + noise).astype(np.uint8), present


# Labels


@pytest.mark.parametrize("form, streaming", [("lists", []), ("words", STREAM), ("vectors", STREAM)])
def test_multi_label_classifier_trains_and_predicts_with_a_sigmoid(tmp_path, capsys, form, streaming):
    images, present = colors()
    names = ["blue", "green", "red"]
    lists = [[number for number in range(3) if row[number]] for row in present]
    if form == "lists":
        name = save(tmp_path / "set", images, lists, label=List(ClassLabel(names=names)))
    elif form == "words":
        words = [[names[number] for number in row] for row in lists]
        name = save(tmp_path / "set", images, words, label=List(Value("string")))
    else:
        name, names = save(tmp_path / "set", images, present.tolist(), label=List(Value("int8"))), ["0", "1", "2"]
    folder, result = run(tmp_path, name, *streaming, "--ema_decay", "0.5", "--class_weights", "balanced")
    assert result["map"] == 1.0 and result["count"] == 8 and set(result["per_class"]) == set(names)
    assert "average precision of each class" in capsys.readouterr().out
    classify = pipeline("image-classification", model=folder)
    assert classify.model.config.problem_type == MULTI
    answers = classify([PIL.Image.fromarray(image) for image in images[72:]])
    scores = np.array([[{a["label"]: a["score"] for a in answer}[name] for name in names] for answer in answers])
    assert ((scores > 0) & (scores < 1)).all()
    assert scores.sum(1).max() > 1.5  # the classes are independent; ten seeds: 1.97 or more
    for class_scores, is_present in zip(scores.T, present[72:].T > 0):
        assert class_scores[is_present].min() > class_scores[~is_present].max()


@pytest.mark.parametrize("streaming", [False, True])
def test_class_without_name_is_no_number(tmp_path, streaming):
    images = [PIL.Image.new("RGB", (8, 8), (row, 0, 0)) for row in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(names=["10", "20.5"])})
    rows = Dataset.from_dict({"image": images, "label": [0, 1, -1, 0, 1, -1, 0, 1]}, features)
    rows.to_parquet(tmp_path / "train.parquet")
    options = {"problem_type": REGRESSION, "validation_fraction": 0, "streaming": streaming}
    with pytest.raises(UserError, match=r"got nan in row 2 .*\(2 such rows.*--on_missing_label skip"):
        load_image_data(str(tmp_path), **options)
    data = load_image_data(str(tmp_path), on_missing_label="skip", **options)
    assert data.sizes == {"train": 6} and data.labels.mean == pytest.approx(15.25)
    assert [row["label"] for row in data.splits["train"]] == [0, 1, 0, 1, 0, 1]


def test_regression_trains_and_predicts_in_the_units_of_the_labels(tmp_path, capsys):
    draw = np.random.default_rng(0)
    red = draw.integers(0, 230, COUNT)
    colors = np.stack([red, 230 - red, np.full(COUNT, 115)], -1)
    images = (colors[:, None, None] + draw.integers(0, 20, (COUNT, 8, 8, 3))).astype(np.uint8)
    prices = 1000 * red + 500_000.0
    name = save(tmp_path / "set", images, prices.tolist(), label=Value("float64"))
    folder, result = run(tmp_path, name, "--ema_decay", "0.5", "--max_steps", "200", "--learning_rate", "0.002")
    guess = np.abs(prices[72:] - prices[:64].mean()).mean()  # the error of the mean of the training labels
    # Ten seeds: 0.02 to 0.12 of the guess, and an R2 of 0.98 or more.
    assert result["mae"] < guess / 3 and result["r2"] > 0.8 and result["count"] == 8
    assert "R2" in capsys.readouterr().out
    predict = pipeline("image-classification", model=folder, function_to_apply="none")
    errors = [predict(PIL.Image.fromarray(x))[0]["score"] - y for x, y in zip(images[72:], prices[72:])]
    assert np.abs(errors).mean() == pytest.approx(result["mae"], rel=1e-3)
    assert predict.model.config.problem_type == "regression" and predict.model.config.id2label == {0: "label"}
    options = ["--dataset_name", name, "--model_name_or_path", folder]
    main([*options, "--eval_only"])
    (row,) = re.findall("^  test +(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert float(row.split()[0]) == pytest.approx(result["mae"], rel=1e-3)
    tuned = tmp_path / "tuned"
    no_change = ["--max_steps", "1", "--learning_rate", "0", "--per_device_train_batch_size", "8"]
    main([*options, *no_change, "--output_dir", str(tuned)])
    tuned_result = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert tuned_result["mae"] == pytest.approx(result["mae"], rel=1e-3)


@pytest.mark.parametrize("kind, streaming", [("int64", STREAM), ("string", [])])
def test_integers_and_strings_become_classes_named_in_the_config(tmp_path, kind, streaming):
    images, present = colors()
    labels = [7 if red else -3 for red in present[:, 0]]
    name = save(tmp_path / "set", images, [str(x) for x in labels] if kind == "string" else labels, label=Value(kind))
    folder, result = run(tmp_path, name, *streaming)
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert config.id2label == {0: "-3", 1: "7"} and config.label2id == {"-3": 0, "7": 1}
    assert result["top1"] == 1.0 and set(result["per_class"]) == {"-3", "7"}  # ten seeds: by 0.99 of the probability


def test_fine_tuning_for_other_labels_replaces_the_head(tmp_path):
    images, present = colors()
    classes = save(tmp_path / "classes", images, present[:, 0].tolist(), label=ClassLabel(names=["0", "1", "2"]))
    vectors = save(tmp_path / "vectors", images, present.tolist(), label=List(Value("int8")))
    folder, _ = run(tmp_path, classes)
    options = ["--model_name_or_path", folder, "--max_steps", "2", "--dataset_name", vectors]
    with pytest.raises(SystemExit, match=r"--eval_only: expected the labels of the checkpoint, .* for single_label"):
        main([*options, "--eval_only"])
    main([*options, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "tuned")])
    assert json.loads((tmp_path / "tuned/config.json").read_text())["problem_type"] == MULTI


@pytest.mark.parametrize(
    "label, options, message",
    [
        (List(Value("int8")), ["--label_smoothing_factor", "0.1"], "needs one class per image"),
        (Value("float32"), ["--class_weights", "balanced"], "--class_weights needs classes"),
        (Value("float32"), ["--streaming", "--max_train_samples", "5"], "cannot be combined with --streaming"),
    ],
)
def test_options_that_do_not_suit_the_labels_raise(tmp_path, label, options, message):
    images, present = colors()
    labels = present.tolist() if isinstance(label, List) else np.arange(COUNT, dtype=float).tolist()
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, save(tmp_path / "set", images, labels, label=label), *options)


def test_balanced_class_weights_average_the_loss_over_classes():
    labels = Labels("label", "class", ["a", "b"], {0: 0, 1: 1}, num_rows=4, class_counts=[3, 1])
    logits, targets = torch.randn(4, 2), F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    balanced = (losses[:3].mean() + losses[3]) / 2
    assert labels.problem_type == SINGLE
    assert criterion(labels, labels.weights())(logits, targets) == pytest.approx(balanced.item())
    assert criterion(labels, None)(logits, targets) == pytest.approx(losses.mean().item())


# Images


def every_kind_of_image(folder) -> dict[str, str]:
    """Writes files of a dark and a light class for each split; file -> class."""
    class_of = {}
    for split in ("train", "test"):
        for name, shade in (("dark", 30), ("light", 220)):
            path = folder / split / name
            path.mkdir(parents=True)
            gray = PIL.Image.new("L", (20, 14), shade)
            opaque = PIL.Image.new("RGBA", (16, 16), (shade, shade, shade, 255))
            sixteen = PIL.Image.fromarray(np.full((9, 12), shade * 256, dtype=np.uint16))
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            gray.save(path / "gray.png")
            gray.convert("P").save(path / "palette.png", transparency=0)
            opaque.save(path / "rgba.png")
            PIL.Image.new("CMYK", (18, 18), (0, 0, 0, 255 - shade)).save(path / "cmyk.jpg")
            sixteen.save(path / "sixteen.png")
            sixteen.save(path / "sixteen.tiff")
            gray.convert("RGB").save(path / "turned.jpg", exif=exif)
            gray.save(path / "animated.gif", save_all=True, append_images=[PIL.Image.new("L", (20, 14), 255 - shade)])
            gray.resize((3000, 2)).save(path / "long.png")
            gray.resize((1, 40)).save(path / "one.png")
            gray.resize((1, 1)).save(path / "dot.png")
            class_of |= {str(file): name for file in path.iterdir()}
    return class_of


@pytest.mark.parametrize(
    "options",
    [
        ["--random_resized_crop", "0"],
        ["--random_resized_crop", "0.3"],
        ["--random_resized_crop", "0.3", "--streaming", "--shuffle_buffer_size", "8"],
    ],
)
def test_every_kind_of_image_trains_is_evaluated_and_predicted(tmp_path, capsys, options):
    class_of = every_kind_of_image(tmp_path / "images")
    folder, result = run(tmp_path, str(tmp_path / "images"), "--train_val_split", "0", *options)
    assert (result["correct"], result["count"]) == (22, 22)  # ten seeds: a loss of at most 0.003
    main(["--eval_only", "--model_name_or_path", folder, "--dataset_name", str(tmp_path / "images")])
    assert "22 of 22 correct" in capsys.readouterr().out
    classify = pipeline("image-classification", model=folder)
    clipped = {file for file in class_of if "sixteen" in file and "dark" in file}  # pipelines clip 16 bits at 255
    for file, name in class_of.items():
        assert (classify(file)[0]["label"] == name) == (file not in clipped), file


# Arrays


@pytest.mark.parametrize("channels, streaming", [(1, []), (4, []), (6, ["--streaming"])])
def test_arrays_of_any_number_of_channels_train_and_are_predicted(tmp_path, channels, streaming):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, COUNT)
    arrays = draw.integers(0, 150, (COUNT, channels, 8, 8), dtype=np.uint8)
    arrays[:, -1] += (100 * labels[:, None, None]).astype(np.uint8)
    feature = Array2D((8, 8), "uint8") if channels == 1 else Array3D((channels, 8, 8), "uint8")
    rows = arrays[:, 0] if channels == 1 else arrays
    name = save(tmp_path / "set", rows, labels.tolist(), image=feature, label=ClassLabel(names=["dim", "bright"]))
    folder, result = run(tmp_path, name, "--crop_padding", "1", "--random_erasing", "0.2", *streaming)
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert model.config.num_channels == channels
    pixels = processor(list(arrays[72:]), input_data_format="channels_first", return_tensors="pt").pixel_values
    correct = (model(pixels).logits.argmax(-1).numpy() == labels[72:]).sum()
    assert correct == result["correct"] >= 7  # ten seeds: 8, with a loss of at most 0.01


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_missing_array_is_a_bad_image(tmp_path, streaming):
    arrays = [np.zeros((4, 8, 8), dtype=np.uint8)] * (COUNT - 1) + [None]
    feature, label = Array3D((4, 8, 8), "uint8"), ClassLabel(names=["a", "b"])
    name = save(tmp_path / "set", arrays, [0, 1] * 40, image=feature, label=label)
    with pytest.raises(SystemExit, match=r"row 7 .*of the split 'test' cannot be used: "):
        run(tmp_path, name, "--max_steps", "1", *streaming)


@pytest.mark.parametrize(
    "feature, options, message",
    [
        (
            Array3D((4, 8, 8), "float32"),
            [],
            r"expected uint8 arrays of a .*, got float32 of shape \(4, 8, 8\)",
        ),
        (
            Array3D((4, 8, 8), "uint8"),
            ["--randaugment_num_ops", "1"],
            "--randaugment_num_ops needs RGB images, got 4 channels",
        ),
        (Array3D((4, 8, 8), "uint8"), ["--crop_pct", "0.9"], "--crop_pct .*cannot be combined with arrays"),
        (Array3D((4, 12, 8), "uint8"), [], r"--image_size: expected \(12, 8\), the size of the arrays, got \(8, 8\)"),
        (Array3D((4, 8, 8), "uint8"), ["--model", "{num_channels: 3}"], "expected num_channels 4, as in the arrays"),
    ],
)
def test_arrays_that_do_not_fit_raise(tmp_path, feature, options, message):
    arrays = np.zeros((COUNT, *feature.shape), dtype=feature.dtype)
    name = save(tmp_path / "set", arrays, [0, 1] * 40, image=feature, label=ClassLabel(names=["a", "b"]))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, name, *options)


# Streams


def shards(folder, images, labels) -> tuple[str, str]:
    """Writes the same rows into four parquet files and four tar files for each split."""
    features = Features({"image": Image(), "label": ClassLabel(names=["0", "1"])})
    for split in ("train", "test"):
        for shard in range(4):
            rows = range(shard, COUNT, 4)
            columns = {"image": [images[row] for row in rows], "label": [int(labels[row]) for row in rows]}
            part = Dataset.from_dict(columns, features)
            for kind in ("parquet", "tar"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            part.to_parquet(folder / f"parquet/{split}-{shard:05d}-of-00004.parquet")
            with tarfile.open(folder / f"tar/{split}-{shard:05d}.tar", "w") as tar:
                for number, row in enumerate(part.cast_column("image", Image(decode=False))):
                    for ending, data in (("png", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                        info = tarfile.TarInfo(f"{number:03d}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return str(folder / "parquet"), str(folder / "tar")


def test_streams_of_parquet_and_webdataset_train_the_same_weights(tmp_path, capsys):
    images, present = colors()
    weights = []
    for name in shards(tmp_path / "shards", images, present[:, 0]):
        options = ["--streaming", "--random_resized_crop", "0.3", "--shuffle_buffer_size", "10", "--ema_decay", "0.9"]
        folder, result = run(tmp_path, name, "--max_steps", "20", "--dataloader_num_workers", "3", *options)
        printed = capsys.readouterr().out
        assert "80 train, 80 test images, 2 classes" in printed and "a stream cannot be split" in printed
        assert result["count"] == 80 and result["epoch"] == 4
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_streaming_a_save_to_disk_folder_raises(tmp_path):
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "set")
    with pytest.raises(SystemExit, match=r"--streaming cannot be used with '.*/set', which was written by"):
        run(tmp_path, str(tmp_path / "set"), "--streaming")
