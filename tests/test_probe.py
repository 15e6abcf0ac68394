import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from tests.conftest import DIGITS
from vit_simple import probe
from vit_simple.files import read_metrics
from vit_simple.inference import features
from vit_simple.probe import main
from vit_simple.training.report import print_probe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")


def test_probe_saves_a_checkpoint_that_predicts_what_it_says(run_folder, tmp_path, capsys):
    folder = tmp_path / "probe"
    main([str(run_folder), "--dataset_name", DIGITS, "--max_train_samples", "300", "--output_dir", str(folder)])
    said = capsys.readouterr().out
    scores = {name: int(n) for name, n in re.findall(r"^(k-NN, k = \d+|logistic regression) +(\d+) of 360", said, re.M)}
    assert len(scores) == 3 and min(scores.values()) > 72  # twice as good as chance
    test = load_dataset(DIGITS, split="test")
    answers = pipeline("image-classification", model=str(folder), top_k=1)(list(test["image"]))
    right = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test["label"]))
    (row,) = read_metrics(folder)
    assert (row["split"], row["correct"]) == ("test", right) and scores["logistic regression"] == right
    before, after = (load_file(path / "model.safetensors") for path in (run_folder, folder))
    assert {name for name in after if not after[name].equal(before[name])} == {"head.weight", "head.bias"}
    card = (folder / "README.md").read_text()
    assert "method: logistic regression" in card and f"({right} correct)" in card


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--streaming", "true"], "--streaming is an option of train.py"),
        (["--sede", "1"], "'--sede' is not known, did you mean 'seed'?"),
        (["--output_dir", "."], "expected a new or empty folder"),
        (["--label_column_name", "size"], "the labels are regression; .* --problem_type single_label_classification"),
        (["--train_val_split", "0"], "--train_val_split: expected a fraction above 0"),
    ],
)
def test_probe_refuses_what_it_cannot_measure(options, reason, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"image": [Image.new("RGB", (8, 8), (20 * n,) * 3) for n in range(8)], "size": [n / 2 for n in range(8)]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows | {"label": list("abababab")}).to_parquet("data/train-00000-of-00001.parquet")
    label = [] if "--label_column_name" in options else ["--label_column_name", "label"]
    with pytest.raises(SystemExit, match=reason):
        main([str(run_folder), "--dataset_name", "data", *label, *options])


def test_probe_refuses_several_processes(run_folder, monkeypatch):
    monkeypatch.setattr(probe, "build_accelerator", lambda _: SimpleNamespace(num_processes=2))
    with pytest.raises(SystemExit, match="runs in one process, got 2"):
        main([str(run_folder), "--dataset_name", DIGITS])


def test_probe_holds_out_images_if_there_is_only_one_split(run_folder, tmp_path, capsys):
    load_dataset(DIGITS, split="test").to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    main([str(run_folder), "--dataset_name", str(tmp_path / "data")])
    assert "288 train and 72 validation images" in capsys.readouterr().out


def test_probe_reads_floats_as_classes_leaves_out_rows_without_one_and_says_both(run_folder, tmp_path, capsys):
    rows = {
        "image": [Image.new("RGB", (8, 8), (20 * n,) * 3) for n in range(12)],
        "label": [*[0.0, 1.0] * 5, None, None],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    options = ["--problem_type", "single_label_classification", "--on_missing_label", "skip"]
    main([str(run_folder), "--dataset_name", str(tmp_path), *options, "--train_val_split", "0.4"])
    said = capsys.readouterr().out
    assert "left out 2 of 12 rows" in said and "6 train and 4 validation images" in said
    assert f"vit_simple {run_folder.name}: " in said and "head dropped" in said
    assert re.findall(r"^k-NN, k = (\d+)", said, re.M) == ["6"]


def test_quick_probe_says_that_it_looks_at_a_sample(capsys):
    assert print_probe(0, 6, 144) == 0
    assert (
        "gets 0 of 6 validation images (0.0%) right; these 6 are a random sample of the 144" in capsys.readouterr().out
    )
    assert print_probe(3, 6, 6) == 0.5 and "sample" not in capsys.readouterr().out
