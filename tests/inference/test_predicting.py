"""The table of predictions has a pipeline's probabilities, and the same bytes after any stop."""

import contextlib
import csv
import errno
import json
import os
import shutil

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from transformers import pipeline

from tests.conftest import photographs, tiny
from vit_simple import predict
from vit_simple.data import reading
from vit_simple.data.processors import stock_processor
from vit_simple.inference import images as images_module
from vit_simple.inference.images import find_images
from vit_simple.inference.predicting import Predictions, Predictor, open_predictor
from vit_simple.inference.tables import Table

NAMES = ["cat", "dog", "tench, Tinca", "3", "4"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with the checkpoint `model` and images in `photos`."""
    monkeypatch.chdir(tmp_path)
    save_model("model")
    (tmp_path / "photos/a").mkdir(parents=True)
    photographs(tmp_path / "photos")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 40, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"photos/a/{number}.png")
    return tmp_path


def save_model(folder: str, record: dict | None = None, **fields):
    model = tiny(**{"num_labels": len(NAMES), **fields})
    model.config.id2label = dict(enumerate(NAMES[: model.config.num_labels]))
    model.save_pretrained(folder)
    with open(f"{folder}/preprocessor_config.json", "w") as file:
        json.dump(stock_processor((16, 16), 18), file)
    if record is not None:
        with open(f"{folder}/provenance.json", "w") as file:
            json.dump(record, file)


def run(*arguments: str, output: str = "out.csv") -> list[dict]:
    """The rows that the command wrote."""
    predict.main([*arguments, "--output", output])
    if output.endswith(".parquet"):
        return pq.read_table(output).to_pylist()
    with open(output, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("fields", "function"),
    [
        ({"problem_type": "single_label_classification"}, None),
        ({}, None),
        ({"problem_type": "multi_label_classification"}, None),
        ({"num_labels": 1}, None),
        ({"problem_type": "regression", "num_labels": 1}, "none"),  # needed up to transformers 5.22
    ],
)
def test_predictions_are_those_of_a_pipeline(work, fields, function):
    save_model("other", **fields)
    rows = run("other", "photos", "--batch_size", "4")
    answers = pipeline("image-classification", "other")([row["path"] for row in rows], function_to_apply=function)
    assert len(rows) == 9
    for row, answer in zip(rows, answers):
        if fields.get("problem_type") == "regression":
            assert float(row["value"]) == pytest.approx(answer[0]["score"], abs=1e-5)
            continue
        for end, expected in zip(("", "_2", "_3", "_4", "_5"), answer):
            assert row[f"label{end}"] == expected["label"]
            assert float(row[f"probability{end}"]) == pytest.approx(expected["score"], abs=1e-5)


def test_predictions_of_a_dataset_are_those_of_its_files(work, capsys):
    rows = run("model", "photos/0.jpg", "photos/1.jpg")
    features = datasets.Features({"picture": datasets.Image()})
    data = datasets.Dataset.from_dict({"picture": ["photos/0.jpg", "photos/1.jpg", None]}, features)
    datasets.DatasetDict({"new": data}).save_to_disk("data")
    found = run("model", "data", "--split", "new", output="data.parquet")
    assert "row 2: the image is missing" in capsys.readouterr().out
    assert [row["row"] for row in found] == [0, 1, 2] and found[2]["error"] == "the image is missing"
    for row, expected in zip(found, rows):
        assert (row["label"], str(row["probability"])) == (expected["label"], expected["probability"])


# Decisions


def test_decision_follows_the_thresholds_of_the_record(work):
    fields = {"problem_type": "multi_label_classification"}
    save_model("plain", **fields)
    for row in run("plain", "photos", output="plain.csv"):
        labels = {row[f"label{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4", "_5")}
        assert row["decision"].split("; ") == [name for name in NAMES if labels[name] >= 0.5]
    high = dict.fromkeys(NAMES, 2.0)
    for number, (thresholds, decision) in enumerate([(high | {"dog": 0.0}, "dog"), (high, "none of these")]):
        save_model("other", {"thresholds": thresholds}, **fields)
        assert {row["decision"] for row in run("other", "photos", output=f"{number}.csv")} == {decision}


def test_decision_below_keep_score_is_none_of_these(work):
    rows = run("model", "photos")
    assert all(row["decision"] == row["label"] for row in rows)
    scores = sorted(float(row["probability"]) for row in rows)
    save_model("other", {"keep_score": (scores[3] + scores[4]) / 2})
    kept = [row["decision"] != "none of these" for row in run("other", "photos", output="kept.csv")]
    assert kept == [float(row["probability"]) > scores[3] for row in rows]


def test_sort_puts_uncertain_images_first_and_bad_ones_last(work):
    (work / "photos/0_bad.png").write_bytes(b"no image")
    rows = run("model", "photos", "--sort", "uncertain")
    margins = [float(row["probability"]) - float(row["probability_2"]) for row in rows[:-1]]
    assert margins == sorted(margins) and rows[-1]["path"] == "photos/0_bad.png"
    assert rows[-1]["error"] and not rows[-1]["label"]


# Files


def test_paths_of_every_kind_come_back(work, capsys):
    names = ["new\nline.jpg", 'comma, "quote".jpg', "ü 日本.jpg", os.fsdecode(b"\xff.jpg"), "UPPER.JPG"]
    (work / "names").mkdir()
    for name in names:
        shutil.copy("photos/0.jpg", work / "names" / name)
    (work / "names/.hidden.jpg").write_bytes(b"")
    (work / "names/notes.txt").write_bytes(b"")
    (work / "names/phone.heic").write_bytes(b"")
    rows = run("model", "names", "photos/1.jpg", "./photos/1.jpg", "names/UPPER.JPG")
    expected = sorted(f"names/{name}" for name in [*names[:3], "\\xff.jpg", "UPPER.JPG"])
    assert sorted(row["path"] for row in rows) == sorted([*expected, "photos/1.jpg"])
    assert "left out 1 files that are not read as images: 1 .heic" in capsys.readouterr().out


def test_bad_images_are_listed_and_not_fatal(work, capsys):
    shutil.rmtree("photos")
    (work / "photos").mkdir()
    (work / "photos/empty.jpg").write_bytes(b"")
    (work / "photos/text.png").write_text("no image")
    os.mkfifo("photos/pipe.png")
    os.symlink("nowhere", "photos/link.png")
    with pytest.raises(SystemExit) as end:
        run("model", "photos", output="all.csv")
    assert end.value.code == 1 and "none of the images can be used" in capsys.readouterr().err.splitlines()[-1]
    PIL.Image.new("RGB", (20, 20)).save("photos/good.png")
    rows = run("model", "photos")
    assert sum(bool(row["error"]) and not row["decision"] for row in rows) == 4 and len(rows) == 5
    printed = capsys.readouterr().out.splitlines()
    assert "photos/empty.jpg: empty" in printed and printed[-1].startswith("5 images, of which 4 cannot be used")
    run("model", "photos/good.png", output="one.csv")
    assert capsys.readouterr().out.splitlines()[-1] == "1 image: one.csv"


def test_large_folders_are_listed_once(work, monkeypatch):
    walks = []
    monkeypatch.setattr(images_module, "files_in", lambda folder: walks.append(folder) or FILES)
    FILES = [images_module.Path(f"{number}.jpg") for number in range(1000)]
    assert len(find_images(["photos"])) == 1000 and len(walks) == 1


# Stops


def test_table_has_the_same_bytes_after_stops(work, monkeypatch, capsys):
    """Ctrl-C after the first batch, a disk that is full in the middle of the second, and a kill in the third."""
    options = ["model", "photos", "--batch_size", "2", "--sort", "uncertain"]
    run(*options, output="whole.csv")
    batch = Predictor.batch

    def interrupted(self, rows):
        if rows.start == 2:
            raise KeyboardInterrupt
        return batch(self, rows)

    def full(self, message):
        self.file.write(message.serialize()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, stop, line in ((Predictor, interrupted, "stopped by SIGINT"), (Table, full, "No space left on device")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(name, "batch" if name is Predictor else "write", stop)
            run(*options)
        assert line in (printed := capsys.readouterr().err) and "the same command continues" in printed
        assert not (work / "out.csv").exists()
    with open("out.csv.part", "ab") as file:
        file.write(b"\xff\xff\xff\xff\x10")
    run(*options)
    assert "continues after 2 of 9 images" in capsys.readouterr().out
    assert (work / "out.csv").read_bytes() == (work / "whole.csv").read_bytes()
    assert not list(work.glob("*.part"))


@pytest.mark.parametrize("changed", ["model", "list of images", "batch size"])
def test_unfinished_table_of_something_else_is_refused(work, monkeypatch, capsys, changed):
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Table, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("model", "photos")
    if changed == "model":
        save_model("model", layer_norm_eps=1e-3)
    if changed == "list of images":
        os.remove("photos/0.jpg")
    with pytest.raises(SystemExit):
        run("model", "photos", *(["--batch_size", "3"] if changed == "batch size" else []))
    assert f"out.csv.part was begun with another {changed}: delete it" in capsys.readouterr().err


def test_table_has_one_writer(work, capsys):
    images = find_images(["photos"])
    first = Predictions(open_predictor("model", images), work / "out.csv")
    with pytest.raises(SystemExit):
        run("model", "photos")
    assert "another process is writing out.csv" in capsys.readouterr().err
    assert len(first.run()) == 9


@pytest.mark.parametrize(
    ("arguments", "output", "message"),
    [
        (["model", "photos"], "out.txt", "expected a file name that ends in .csv or .parquet"),
        (["model", "photos"], "missing/out.csv", "there is no folder missing"),
        (["model", "photos"], "photos/0.csv", "exists already; delete it or choose another name"),
        (["model", "absent.jpg"], "out.csv", "there is no file or folder absent.jpg"),
        (["model", "empty"], "out.csv", "expected images in empty, got none; left out 1 files"),
        (["model", "photos", "--split", "test"], "out.csv", "--split: expected one of train, got test"),
        (["model", "empty", "--split", "train"], "out.csv", "'empty' cannot be loaded"),
        (["model", "photos", "--image_column_name", "x"], "out.csv", "need --split"),
        (["model", "photos", "--batch_size", "0"], "out.csv", "expected at least 1, got 0"),
        (["photos", "photos"], "out.csv", "the model photos cannot be read"),
        (["headless", "photos"], "out.csv", "expected a model with a head"),
        (["wrong_size", "photos"], "out.csv", "makes images of (24, 24) pixels for this model, got (16, 16)"),
        (["number", "photos", "--sort", "uncertain"], "out.csv", "expected a model that predicts labels"),
        (["renamed", "photos"], "out.csv", "expected a threshold of each label of the model, got none of 'dog'"),
    ],
)
def test_mistakes_end_with_one_line(work, capsys, arguments, output, message):
    (work / "empty").mkdir()
    (work / "empty/phone.heic").write_bytes(b"")
    (work / "photos/0.csv").write_text("labels that somebody made")
    if arguments[0] == "number":
        save_model("number", problem_type="regression", num_labels=1)
    if arguments[0] == "renamed":
        thresholds = {name.replace("dog", "hound"): 0.3 for name in NAMES}
        save_model("renamed", {"thresholds": thresholds}, problem_type="multi_label_classification")
    if arguments[0] == "wrong_size":
        save_model("wrong_size", image_size=24)
    if arguments[0] == "headless":
        save_model("headless")
        config = json.loads((work / "headless/config.json").read_text()) | {"architectures": ["ViTSimpleModel"]}
        (work / "headless/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        run(*arguments, output=output)
    printed = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and message in printed and "continues" not in printed
    assert (work / "photos/0.csv").read_text() == "labels that somebody made"


def test_lost_disk_ends_the_run_instead_of_listing_bad_images(work, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WAITS", ())
    monkeypatch.setattr(predict, "find_images", lambda names: (find_images(names), shutil.rmtree("photos"))[0])
    with pytest.raises(SystemExit) as end:
        run("model", "photos")
    assert end.value.code == 1 and "is gone; the same command continues" in capsys.readouterr().err
