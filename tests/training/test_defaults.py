import pytest
import yaml

from tests.conftest import DIGITS
from vit_simple.files import RECORD, read_json
from vit_simple.inference import features
from vit_simple.train import main
from vit_simple.training import defaults
from vit_simple.training.config import UNDECIDED, parse_config
from vit_simple.training.defaults import fine_tuning_options


def test_fine_tuning_takes_fewer_epochs_and_larger_batches_for_more_images():
    chosen = [fine_tuning_options(images, 384) for images in (24, 200, 1_000, 10_000, 1_000_000)]
    epochs = [options["num_train_epochs"] for options in chosen]
    batches = [options["per_device_train_batch_size"] for options in chosen]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] == 50 and epochs[-1] == 5
    assert batches == sorted(batches) and batches[0] == 4 and batches[-1] == 128
    assert all(options["horizontal_flip"] == 0 and options["random_resized_crop"] == 0.6 for options in chosen)
    assert fine_tuning_options(2, 384)["per_device_train_batch_size"] == 1


def test_fine_tuning_rate_grows_with_the_batch_and_falls_with_the_width():
    rate = fine_tuning_options(200, 384)["learning_rate"]
    assert fine_tuning_options(200, 384, batch_size=64)["learning_rate"] == pytest.approx(2 * rate)
    assert fine_tuning_options(200, 384, 4, batch_size=16)["learning_rate"] == pytest.approx(2 * rate)
    assert fine_tuning_options(200, 1536)["learning_rate"] == pytest.approx(rate / 2)
    assert fine_tuning_options(200, 384, batches_per_step=4)["per_device_train_batch_size"] == 4


def test_lora_has_ten_times_the_rate_in_all_layers():
    whole, lora = fine_tuning_options(200, 384), fine_tuning_options(200, 384, lora=True)
    assert lora == whole | {"learning_rate": pytest.approx(10 * whole["learning_rate"]), "layer_decay": 1.0}


def test_defaults_are_left_open_for_pretrained_weights_without_a_recipe_alone(tmp_path):
    (tmp_path / "recipe.yaml").write_text("num_train_epochs: 3\n")
    start = ["--model_name_or_path", "checkpoint", "--dataset_name", "images"]
    assert parse_config(start).undecided == UNDECIDED
    assert "learning_rate" not in parse_config([*start, "--learning_rate", "1e-3"]).undecided
    assert parse_config([str(tmp_path / "recipe.yaml"), *start]).undecided == ()
    assert parse_config(["--dataset_name", "images"]).undecided == ()


def test_chosen_defaults_are_printed_stored_and_read_on_resume(run_folder, tmp_path, capsys, monkeypatch):
    options = ["--dataset_name", DIGITS, "--model_name_or_path", str(run_folder), "--output_dir", str(tmp_path / "run")]
    options += ["--max_train_samples", "200", "--max_eval_samples", "50", "--layer_decay", "0.9", "--save_steps", "50"]
    options += ["--num_train_epochs", "5"]
    main([*options, "--resume_from_checkpoint", "latest"])  # as a script starts a run that it may start again
    said, recipe = capsys.readouterr().out, yaml.safe_load((tmp_path / "run/train_config.yaml").read_text())
    (line,) = [line for line in said.splitlines() if line.startswith("defaults for fine-tuning on 200 images: ")]
    words = line.partition(": ")[2].split()
    assert {name.lstrip("-"): float(value) for name, value in zip(words[::2], words[1::2])} == {
        name: recipe[name] for name in UNDECIDED if name not in ("layer_decay", "num_train_epochs")
    }
    assert recipe["layer_decay"] == 0.9 and recipe["num_train_epochs"] == 5
    assert "before training, a logistic regression" in said and 0 <= read_json(tmp_path / "run" / RECORD)["probe"] <= 1
    monkeypatch.delattr(defaults, "fine_tuning_options")
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    main([*options, "--resume_from_checkpoint", str(checkpoint)])
    said = capsys.readouterr().out
    assert "resuming from" in said and "before training, a" not in said and "defaults for" not in said


def test_run_that_ends_below_the_probe_warns(run_folder, tmp_path, capsys, monkeypatch):
    options = ["--dataset_name", DIGITS, "--model_name_or_path", str(run_folder), "--max_steps", "50"]
    options += ["--max_train_samples", "200", "--max_eval_samples", "50"]
    main([*options, "--learning_rate", "1", "--output_dir", str(tmp_path / "bad")])
    said = capsys.readouterr().out
    assert "warning: the validation accuracy ends at" in said
    (line,) = [line for line in said.splitlines() if line.startswith("defaults for fine-tuning on 200 images: ")]
    assert "--layer_decay" in line and "--num_train_epochs" not in line  # it has no effect beside --max_steps
    monkeypatch.delattr(features, "extract_features")
    main([*options, "--learning_rate", "1", "--probe", "false", "--output_dir", str(tmp_path / "without")])
    assert "logistic" not in capsys.readouterr().out
