"""Data of any shape, from a data set to a prediction: kinds of labels, of pictures and of arrays, whole or streamed."""

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

from vit_simple.data.labels import MULTI, SINGLE, Labels, count_labels
from vit_simple.train import criterion, main

NETWORK = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
# With a learning rate of 0.01 or more, some seeds do not learn the tasks below; with this one, each does by far.
RUN = ["--model", NETWORK, "--max_steps", "150", "--per_device_train_batch_size", "16", "--learning_rate", "0.005"]
RUN += ["--horizontal_flip", "0", "--lr_scheduler_type", "linear", "--eval_steps", "75"]
COUNT = 80
STREAM = ["--streaming", "--random_resized_crop", "0"]


def save(folder, images, labels, image=None, label=None) -> str:
    """A data set of parquet files: four fifths are for training, a tenth each for validation and test."""
    features = Features({"image": image or Image(), "label": label})
    rows = Dataset.from_dict({"image": list(images), "label": labels}, features)
    for split, part in (("train", range(64)), ("validation", range(64, 72)), ("test", range(72, COUNT))):
        folder.mkdir(exist_ok=True)
        rows.select(part).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def run(tmp_path, name: str, *options) -> tuple[str, dict]:
    """Trains; returns the folder and what it got in the end."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    main(["--dataset_name", name, *RUN, "--output_dir", str(folder), *options])
    return str(folder), json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def colours(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with or without red, green and blue (N, 8, 8, 3), and what they have (N, 3)."""
    draw = np.random.default_rng(seed)
    present = draw.integers(0, 2, (COUNT, 3))
    noise = draw.integers(0, 50, (COUNT, 8, 8, 3))
    return (present[:, None, None] * 200 + noise).astype(np.uint8), present


# Labels


@pytest.mark.parametrize("form, streaming", [("lists", []), ("vectors", []), ("words", STREAM), ("vectors", STREAM)])
def test_several_labels_train_and_are_predicted_by_a_sigmoid(tmp_path, capsys, form, streaming):
    pictures, present = colours()
    names = ["blue", "green", "red"]
    lists = [[number for number in range(3) if row[number]] for row in present]
    if form == "lists":
        name = save(tmp_path / "set", pictures, lists, label=List(ClassLabel(names=names)))
    elif form == "words":
        words = [[names[number] for number in row] for row in lists]
        name = save(tmp_path / "set", pictures, words, label=List(Value("string")))
    else:
        name, names = save(tmp_path / "set", pictures, present.tolist(), label=List(Value("int8"))), ["0", "1", "2"]
    folder, result = run(tmp_path, name, *streaming, "--ema_decay", "0.5", "--class_weights", "balanced")
    assert result["map"] == 1.0 and result["count"] == 8 and set(result["per_class"]) == set(names)
    assert "average precision of each class" in capsys.readouterr().out
    classify = pipeline("image-classification", model=folder)
    assert classify.model.config.problem_type == MULTI
    answers = classify([PIL.Image.fromarray(picture) for picture in pictures[72:]])
    scores = np.array([[{a["label"]: a["score"] for a in answer}[name] for name in names] for answer in answers])
    assert ((scores > 0) & (scores < 1)).all() and scores.sum(1).max() > 1.5  # each for itself
    for column, there in zip(scores.T, present[72:].T > 0):
        assert column[there].min() > column[~there].max()


def test_a_number_is_learned_in_any_unit_and_predicted_as_it_is(tmp_path, capsys):
    draw = np.random.default_rng(0)
    red = draw.integers(0, 230, COUNT)
    colors = np.stack([red, 230 - red, np.full(COUNT, 115)], -1)
    pictures = (colors[:, None, None] + draw.integers(0, 20, (COUNT, 8, 8, 3))).astype(np.uint8)
    prices = 1000 * red + 500_000.0
    name = save(tmp_path / "set", pictures, prices.tolist(), label=Value("float64"))
    folder, result = run(tmp_path, name, "--ema_decay", "0.5", "--max_steps", "200", "--learning_rate", "0.002")
    guess = np.abs(prices[72:] - prices[:64].mean()).mean()  # the error of the mean of the training labels
    assert result["mae"] < guess / 3 and result["r2"] > 0.8 and result["count"] == 8
    assert "R2" in capsys.readouterr().out
    predict = pipeline("image-classification", model=folder, function_to_apply="none")
    errors = [predict(PIL.Image.fromarray(x))[0]["score"] - y for x, y in zip(pictures[72:], prices[72:])]
    assert np.abs(errors).mean() == pytest.approx(result["mae"], rel=1e-3)
    assert predict.model.config.problem_type == "regression" and predict.model.config.id2label == {0: "label"}
    options = ["--dataset_name", name, "--model_name_or_path", folder]
    main([*options, "--eval_only"])
    (row,) = re.findall("^  test +(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert float(row.split()[0]) == pytest.approx(result["mae"], rel=1e-3)
    tuned = tmp_path / "tuned"  # which goes on from there: a step of no length changes nothing
    still = ["--max_steps", "1", "--learning_rate", "0", "--per_device_train_batch_size", "8"]
    main([*options, *still, "--output_dir", str(tuned)])
    again = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["mae"] == pytest.approx(result["mae"], rel=1e-3)


@pytest.mark.parametrize("kind, streaming", [("int64", STREAM), ("string", [])])
def test_integers_with_gaps_and_words_become_classes_that_the_config_names(tmp_path, kind, streaming):
    pictures, present = colours()
    labels = [7 if red else -3 for red in present[:, 0]]
    name = save(tmp_path / "set", pictures, [str(x) for x in labels] if kind == "string" else labels, label=Value(kind))
    folder, result = run(tmp_path, name, *streaming)
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert config.id2label == {0: "-3", 1: "7"} and config.label2id == {"-3": 0, "7": 1}
    assert result["top1"] == 1.0 and set(result["per_class"]) == {"-3", "7"}


def test_what_was_learned_for_other_labels_gets_a_new_head(tmp_path):
    pictures, present = colours()
    classes = save(tmp_path / "classes", pictures, present[:, 0].tolist(), label=ClassLabel(names=["0", "1", "2"]))
    vectors = save(tmp_path / "vectors", pictures, present.tolist(), label=List(Value("int8")))
    folder, _ = run(tmp_path, classes)
    options = ["--model_name_or_path", folder, "--max_steps", "2", "--dataset_name", vectors]
    with pytest.raises(SystemExit, match=r"--eval_only: expected the labels of the checkpoint, .* for single_label"):
        main([*options, "--eval_only"])
    main([*options, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "tuned")])
    assert json.loads((tmp_path / "tuned/config.json").read_text())["problem_type"] == MULTI


@pytest.mark.parametrize(
    "label, options, message",
    [
        (List(Value("int8")), ["--label_smoothing_factor", "0.1"], "expected 0 for multi_label_classification"),
        (Value("float32"), ["--class_weights", "balanced"], "--class_weights: expected none for a regression"),
        (Value("float32"), ["--streaming", "--max_train_samples", "5"], "expected neither beside --streaming"),
    ],
)
def test_options_that_labels_have_no_use_for_are_refused(tmp_path, label, options, message):
    pictures, present = colours()
    labels = present.tolist() if isinstance(label, List) else np.arange(COUNT, dtype=float).tolist()
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, save(tmp_path / "set", pictures, labels, label=label), *options)


def test_balanced_classes_weigh_the_same_in_the_loss():
    labels = Labels("label", "class", ["a", "b"], {0: 0, 1: 1}, rows=4, counts=[3, 1])
    logits, targets = torch.randn(4, 2), F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()
    each = F.cross_entropy(logits, targets, reduction="none")
    expected = (each[:3].mean() + each[3]) / 2
    assert labels.problem_type == SINGLE and criterion(labels, labels.weights())(logits, targets) == pytest.approx(
        expected.item()
    )
    assert criterion(labels, None)(logits, targets) == pytest.approx(each.mean().item())


# Pictures


def every_kind_of_picture(folder) -> dict[str, str]:
    """Files of a dark and a light class in each split; file -> class."""
    found = {}
    for split in ("train", "test"):
        for name, shade in (("dark", 30), ("light", 220)):
            path = folder / split / name
            path.mkdir(parents=True)
            grey = PIL.Image.new("L", (20, 14), shade)
            clear = PIL.Image.new("RGBA", (16, 16), (shade, shade, shade, 255))
            sixteen = PIL.Image.fromarray(np.full((9, 12), shade * 256, dtype=np.uint16))
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            grey.save(path / "grey.png")
            grey.convert("P").save(path / "palette.png", transparency=0)
            clear.save(path / "rgba.png")
            PIL.Image.new("CMYK", (18, 18), (0, 0, 0, 255 - shade)).save(path / "cmyk.jpg")
            sixteen.save(path / "sixteen.png")
            sixteen.save(path / "sixteen.tiff")
            grey.convert("RGB").save(path / "turned.jpg", exif=exif)
            grey.save(path / "animated.gif", save_all=True, append_images=[PIL.Image.new("L", (20, 14), 255 - shade)])
            grey.resize((3000, 2)).save(path / "long.png")
            grey.resize((1, 40)).save(path / "one.png")
            grey.resize((1, 1)).save(path / "dot.png")
            found |= {str(file): name for file in path.iterdir()}
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["--random_resized_crop", "0"],
        ["--random_resized_crop", "0.3"],
        ["--random_resized_crop", "0.3", "--streaming", "--shuffle_buffer_size", "8"],
    ],
)
def test_every_kind_of_picture_trains_is_evaluated_and_predicted(tmp_path, capsys, options):
    found = every_kind_of_picture(tmp_path / "pictures")
    folder, result = run(tmp_path, str(tmp_path / "pictures"), "--train_val_split", "0", *options)
    assert (result["correct"], result["count"]) == (22, 22)
    main(["--eval_only", "--model_name_or_path", folder, "--dataset_name", str(tmp_path / "pictures")])
    assert "22 of 22 right" in capsys.readouterr().out
    classify = pipeline("image-classification", model=folder)
    clipped = {file for file in found if "sixteen" in file and "dark" in file}  # by the pipeline, at 255
    for file, name in found.items():
        assert (classify(file)[0]["label"] == name) == (file not in clipped), file


# Arrays


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_arrays_of_any_channels_train_and_are_predicted(tmp_path, channels):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, COUNT)
    arrays = draw.integers(0, 150, (COUNT, channels, 8, 8), dtype=np.uint8)
    arrays[:, -1] += (100 * labels[:, None, None]).astype(np.uint8)
    feature = Array2D((8, 8), "uint8") if channels == 1 else Array3D((channels, 8, 8), "uint8")
    rows = arrays[:, 0] if channels == 1 else arrays
    name = save(tmp_path / "set", rows, labels.tolist(), image=feature, label=ClassLabel(names=["dim", "bright"]))
    for options in ([], ["--streaming"]) if channels == 6 else ([],):
        folder, result = run(tmp_path, name, "--crop_padding", "1", "--random_erasing", "0.2", *options)
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        assert model.config.num_channels == channels
        pixels = processor(list(arrays[72:]), input_data_format="channels_first", return_tensors="pt").pixel_values
        right = (model(pixels).logits.argmax(-1).numpy() == labels[72:]).sum()
        assert right == result["correct"] >= 7


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_missing_array_is_a_bad_image(tmp_path, streaming):
    arrays = [np.zeros((4, 8, 8), dtype=np.uint8)] * (COUNT - 1) + [None]
    feature, label = Array3D((4, 8, 8), "uint8"), ClassLabel(names=["a", "b"])
    name = save(tmp_path / "set", arrays, [0, 1] * 40, image=feature, label=label)
    with pytest.raises(SystemExit, match=r"expected an image, got row 7 .*of the split 'test': there is none"):
        run(tmp_path, name, "--max_steps", "1", *streaming)


@pytest.mark.parametrize(
    "feature, options, message",
    [
        (
            Array3D((4, 8, 8), "float32"),
            [],
            r"expected uint8 arrays of a .*, got float32 of shape \(4, 8, 8\)",
        ),
        (Array3D((4, 8, 8), "uint8"), ["--randaugment_num_ops", "1"], "expected 0 for images of 4 channels"),
        (Array3D((4, 8, 8), "uint8"), ["--crop_pct", "0.9"], "--crop_pct: expected none for arrays"),
        (Array3D((4, 12, 8), "uint8"), [], r"--image_size: expected \(12, 8\), the size of the arrays, got \(8, 8\)"),
        (Array3D((4, 8, 8), "uint8"), ["--model", "{num_channels: 3}"], "expected num_channels 4, as the arrays have"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, feature, options, message):
    arrays = np.zeros((COUNT, *feature.shape), dtype=feature.dtype)
    name = save(tmp_path / "set", arrays, [0, 1] * 40, image=feature, label=ClassLabel(names=["a", "b"]))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, name, *options)


# Streams


def shards(folder, pictures, labels) -> tuple[str, str]:
    """The same rows in four parquet files and in four tar files for each split."""
    features = Features({"image": Image(), "label": ClassLabel(names=["0", "1"])})
    for split in ("train", "test"):
        for shard in range(4):
            rows = range(shard, COUNT, 4)
            part = {"image": [pictures[row] for row in rows], "label": [int(labels[row]) for row in rows]}
            part = Dataset.from_dict(part, features)
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


def test_shards_of_parquet_and_of_webdataset_train_alike(tmp_path, capsys):
    pictures, present = colours()
    weights = []
    for name in shards(tmp_path / "shards", pictures, present[:, 0]):
        options = ["--streaming", "--random_resized_crop", "0.3", "--shuffle_buffer_size", "10", "--ema_decay", "0.9"]
        folder, result = run(tmp_path, name, "--max_steps", "20", "--dataloader_num_workers", "3", *options)
        printed = capsys.readouterr().out
        assert "80 train, 80 test images, 2 classes" in printed and "a stream is not split" in printed
        assert result["count"] == 80 and result["epoch"] == 4
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("secret", [False, True])
def test_a_stream_of_classes_and_size_that_the_card_tells_is_not_read_beforehand(tmp_path, monkeypatch, secret):
    pictures, present = colours()
    name, _ = shards(tmp_path / "shards", pictures, present[:, 0])
    card = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
    card += "      class_label:\n        names:\n          '0': no\n          '1': red\n  splits:\n"
    card += "".join(f"  - name: {split}\n    num_bytes: 9999\n    num_examples: 80\n" for split in ("train", "test"))
    (tmp_path / "shards/parquet/README.md").write_text(card + "---\n")
    if secret:
        for file in (tmp_path / "shards/parquet").glob("test*"):
            rows = Dataset.from_parquet(str(file))
            rows.map(lambda row: {"label": -1}).cast(rows.features).to_parquet(file)
    read = []
    monkeypatch.setattr("vit_simple.data.loading.LABEL_BATCH", 5)
    monkeypatch.setattr(
        "vit_simple.data.loading.count_labels", lambda values, kind: read.append(count_labels(values, kind)) or read[-1]
    )
    folder, result = run(tmp_path, name, *STREAM, "--max_steps", "2")
    assert [part.rows for part in read] == [80]  # to see whether the test split is secret
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == {0: "False", 1: "red"}
    assert (result["split"], result.get("count")) == (("train", None) if secret else ("test", 80))
    run(tmp_path, name, *STREAM, "--max_steps", "2", "--class_weights", "balanced")
    assert [part.rows for part in read] == [80, 80, 80]


def test_what_save_to_disk_wrote_is_not_streamed(tmp_path):
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "set")
    with pytest.raises(SystemExit, match=r"--streaming: expected none for '.*/set', which save_to_disk wrote"):
        run(tmp_path, str(tmp_path / "set"), "--streaming")
