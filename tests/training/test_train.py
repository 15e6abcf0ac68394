import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from vit_simple import train
from vit_simple.data.dataloader import MapStyleSplit
from vit_simple.files import ROOT, read_metrics
from vit_simple.train import main

SHORT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "256"]


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A run


def test_run_folder_is_complete(run_folder):
    assert files(run_folder) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "modeling_vit_simple.py",
        "configuration_vit_simple.py",
        "metrics.jsonl",
        "train_config.yaml",
        "curves.png",
        "confusion.png",
        "reliability.png",
        "predictions.png",
        "mistakes.png",
        "attention.png",
        "positions.png",
        "provenance.json",
        "README.md",
        "finished.json",
        ".lock",
    }
    model = AutoModelForImageClassification.from_pretrained(run_folder)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    rows = read_metrics(run_folder)
    assert [row["split"] for row in rows if row["split"] != "train"] == ["validation", "test"]
    train = [row for row in rows if row["split"] == "train"]
    assert all(0 <= row["data_wait"] <= 1 for row in train)
    for plot in ("curves.png", "confusion.png", "reliability.png", "predictions.png"):
        assert len(Image.open(run_folder / plot).convert("RGB").getcolors(10**6)) > 20
    assert train[-1]["step"] == 40 and train[-1]["epoch"] == 1 and train[0]["images_per_second"] > 0
    assert train[-1]["loss"] < train[0]["loss"]  # ten seeds: by 0.09 or more
    assert train[-1]["lr"] < train[0]["lr"]


def test_pipeline_accuracy_equals_test_metrics(run_folder):
    said = read_metrics(run_folder)[-1]
    test = load_dataset(str(ROOT / "data/digits"), split="test")
    answers = pipeline("image-classification", model=str(run_folder), top_k=1)(list(test["image"]))
    right = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test["label"]))
    assert (said["split"], said["correct"], said["count"]) == ("test", right, 360)
    assert said["top1"] == right / 360 and said["top1"] <= said["top5"] <= 1


@pytest.mark.slow
def test_train_config_repeats_run_bit_for_bit(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(run_folder / "train_config.yaml")])
    main([str(run_folder / "train_config.yaml"), "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run_folder, tmp_path / "outputs/digits")]
    assert weights[0] == weights[1] != (tmp_path / "other/model.safetensors").read_bytes()


def test_data_wait_is_the_fraction_of_time_spent_waiting_for_data(tmp_path, monkeypatch):
    """On a fake clock: a batch takes three seconds and a loss one."""
    clock, batches, cross_entropy = [0.0], MapStyleSplit.batches, torch.nn.functional.cross_entropy

    def read(*given):
        for batch in batches(*given):
            clock[0] += 3
            yield batch

    def loss(*given, **rest):
        clock[0] += 1
        return cross_entropy(*given, **rest)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(MapStyleSplit, "batches", read)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)
    main(["--max_steps", "4", "--logging_steps", "2", "--eval_steps", "3", "--output_dir", str(tmp_path / "run")])
    train = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert [(row["data_wait"], row["images_per_second"]) for row in train] == [(0.75, 8.0), (0.75, 8.0)]


def test_output_folders_are_numbered_and_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(SHORT)
    assert files(tmp_path / "outputs") == {"digits", "digits-2"}
    line = f'pipeline("image-classification", "{tmp_path}/outputs/digits-2", trust_remote_code=True)'
    assert line in capsys.readouterr().out
    before = (tmp_path / "outputs/digits/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="expected a new or empty folder, got outputs/digits with files in it"):
        main([*SHORT, "--output_dir", "outputs/digits"])
    assert (tmp_path / "outputs/digits/model.safetensors").read_bytes() == before


def test_image_folder_trains_with_a_variant(tmp_path):
    for name, shade in (("dark", 40), ("light", 210)):
        for number in range(6):
            path = tmp_path / "images/train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20 + number, 30), shade + number).save(path)
    main(
        [
            *["--dataset_name", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")],
            *["--variant", "notebook/8", "--image_size", "16", "--num_train_epochs", "8", "--train_val_split", "0.34"],
            *["--per_device_train_batch_size", "3", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear"],
        ]
    )
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["split"] == "validation" and rows[-1]["top1"] == 1.0  # ten seeds: a loss of at most 0.011
    answer = pipeline("image-classification", model=str(tmp_path / "run"))(Image.new("RGB", (9, 9), (200, 200, 200)))
    assert answer[0]["label"] == "light"


# Ways to train


def losses_of(folder, *options) -> list[float]:
    """The training losses of the first ten steps, each with 64 images."""
    plain = ["--max_steps", "10", "--logging_steps", "1", "--per_device_train_batch_size", "64"]
    main([*plain, "--output_dir", str(folder), *options])
    return [row["loss"] for row in read_metrics(folder) if row["split"] == "train"]


UNCHANGED = [f"--affine_{name}=0" for name in ("degrees", "translate", "scale", "shear")] + ["--optim", "adamw"]


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_step_is_computed(tmp_path):
    model = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    common = [*UNCHANGED, "--model", model, "--max_eval_samples", "50"]
    expected = losses_of(tmp_path / "expected", *common)
    ways = [
        ["--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "16"],
        ["--gradient_checkpointing"],
        ["--cache_images", "off", "--dataloader_num_workers", "2"],
    ]
    # Under ATEN_CPU_CAPABILITY=default torch writes vector code that no compiler takes.
    ways += [["--torch_compile"]] if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else []
    for options in ways:
        assert losses_of(tmp_path / options[0], *common, *options) == pytest.approx(expected, abs=1e-5), options


def launch(launcher: list[str], *options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", *launcher, ROOT / "train.py", *options]
    return subprocess.Popen([*map(str, command)], env=environment, **pipes)


def torchrun(processes: int, *options) -> subprocess.Popen:
    return launch(["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)], *options)


def hosts(count: int, *options) -> list[subprocess.Popen]:
    """As many hosts of one process each, all of them here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", count, "--num_processes", count]
    common += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [launch([*common, "--machine_rank", rank], *options) for rank in range(count)]


@pytest.mark.slow
def test_two_hosts_train_like_one_process_with_the_same_batch(tmp_path):
    options = [*UNCHANGED, "--num_train_epochs", "1", "--logging_steps", "1", "--ema_decay", "0.9"]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*options, "--per_device_train_batch_size", "64", "--output_dir", str(one)])
    started = hosts(2, *options, "--per_device_train_batch_size", 32, "--output_dir", two)
    ended = [(*process.communicate(timeout=300), process.returncode) for process in started]
    for printed, errors, code in ended:
        assert code == 0, errors
        assert printed.count("saved in") == printed.count("of 360 correct") == 1
    assert "".join(printed for printed, _, _ in ended).count("step 20") == 1
    losses = [[row["loss"] for row in read_metrics(folder) if row["split"] == "train"] for folder in (one, two)]
    rest = [[row for row in read_metrics(folder) if row["split"] != "train"] for folder in (one, two)]
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert [row["count"] for row in rest[0]] == [144, 144, 360]
    assert [row["loss"] for row in rest[1]] == pytest.approx([row["loss"] for row in rest[0]], abs=1e-4)


@pytest.mark.slow
def test_stream_of_two_processes_stops_and_resumes_exactly(tmp_path):
    options = ["--max_steps", "60", "--logging_steps", "5", "--ema_decay", "0.9", "--save_steps", "25"]
    options += ["--streaming", "--dataloader_num_workers", "1"]  # each reads half of the rows, 40 steps per epoch
    whole = torchrun(2, *options, "--output_dir", tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    folder = tmp_path / "stopped"
    process = torchrun(2, *options, "--output_dir", folder)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode != 0 and len(list((folder / "checkpoints").iterdir())) == 1
    again = torchrun(2, *options, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert read_metrics(folder)[-1]["count"] == 360


@pytest.mark.slow
def test_dead_process_ends_the_others(tmp_path):
    process = torchrun(2, "--num_train_epochs", "500", "--output_dir", tmp_path / "run")
    while not (tmp_path / "run/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    psutil.Process(process.pid).children()[-1].kill()
    process.communicate(timeout=100)
    assert process.returncode != 0


@pytest.mark.slow
def test_dead_worker_ends_the_run(tmp_path):
    options = ["--num_train_epochs", "500", "--cache_images", "off", "--dataloader_num_workers", "2"]
    command = [sys.executable, ROOT / "train.py", *options, "--output_dir", tmp_path / "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    psutil.Process(process.pid).children()[-1].kill()
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and re.search("DataLoader worker .*(killed|exited unexpectedly)", errors), errors


def test_card_without_test_split_describes_the_saved_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_simple.training.optim.EMA.update", lambda *_: None)  # the average stays where it began
    digits = load_dataset(str(ROOT / "data/digits"), split="train")
    digits.to_parquet(tmp_path / "data/train.parquet")
    options = ["--ema_decay", "0.9999", "--output_dir", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "data")]
    main([str(ROOT / "recipes/digits.yaml"), *SHORT, "--num_train_epochs", "8", *options])
    last = [row for row in read_metrics(tmp_path / "run") if row["split"] == "validation"][-3:]
    assert last[0]["weights"] == last[2]["weights"] == "raw" and last[0]["correct"] == last[2]["correct"]
    assert last[1]["correct"] < last[2]["correct"]  # ten seeds: 12 to 22 and 55 to 111 of 143
    assert f"({last[2]['correct']} correct)" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("best", ["raw", "ema"])
def test_better_of_raw_and_averaged_weights_is_saved(tmp_path, monkeypatch, capsys, best):
    """The initial weights are worse than the last ones; an average without decay is equal to the last ones."""
    if best == "raw":
        monkeypatch.setattr("vit_simple.training.optim.EMA.update", lambda *_: None)  # the average stays where it began
    main([*SHORT, "--num_train_epochs", "8", "--ema_decay", "0", "--output_dir", str(tmp_path / "run")])
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] != "train"]
    last = {row["weights"]: row["correct"] for row in rows if row["split"] == "validation" and row["step"] == 40}
    assert (last["raw"] > last["ema"]) == (best == "raw")  # ten seeds: 55 to 111 and 12 to 22 of 143
    assert rows[-1]["split"] == "test" and rows[-1]["weights"] == best
    capsys.readouterr()
    main(["--eval_only", "--model_name_or_path", str(tmp_path / "run")])
    assert f"{rows[-1]['correct']} of 360" in capsys.readouterr().out


def test_eval_only_repeats_metrics_and_writes_nothing(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--eval_only", "--model_name_or_path", str(run_folder), "--per_device_eval_batch_size", "77"])
    printed = capsys.readouterr().out
    for row in read_metrics(run_folder):
        if row["split"] != "train":
            assert f"{row['correct']} of {row['count']}" in printed
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_bfloat16_training_is_evaluated_in_float32(tmp_path, monkeypatch, capsys):
    """Otherwise the pipeline would not reproduce the accuracy of the run."""
    exact = losses_of(tmp_path / "float32", *UNCHANGED)
    losses = losses_of(tmp_path / "run", *UNCHANGED, "--mixed_precision", "bf16")
    assert losses == pytest.approx(exact, abs=0.05) and losses != exact  # ten seeds: 0.00006 to 0.0007
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` sets it
    assert losses_of(tmp_path / "launched", *UNCHANGED) == losses
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    capsys.readouterr()
    main(["--eval_only", "--model_name_or_path", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    for row in read_metrics(tmp_path / "run"):
        if row["split"] != "train":
            assert f"{row['loss']:.4f}   {row['correct']} of {row['count']}" in printed


def test_launcher_without_process_group_is_refused(monkeypatch):
    """`accelerate launch --cpu --num_machines 2` starts runs that know nothing of each other."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit, match=r"accelerate launch --cpu .* cannot communicate; use torchrun"):
        main([])


def test_launcher_precision_is_checked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit, match="--mixed_precision: expected no or bf16, got fp8 from accelerate launch"):
        main([])


def test_fine_tuning_keeps_the_image_processor(run_folder, tmp_path):
    options = ["--model_name_or_path", str(run_folder), "--freeze_backbone", "--learning_rate", "0.03"]
    main([*SHORT, *options, "--num_train_epochs", "12", "--layer_decay", "0.75", "--output_dir", str(tmp_path / "run")])
    folders = (run_folder, tmp_path / "run")
    before, after = (AutoModelForImageClassification.from_pretrained(folder) for folder in folders)
    changed = {
        name for (name, one), other in zip(before.named_parameters(), after.parameters()) if (one != other).any()
    }
    assert changed == {"head.weight", "head.bias"}
    processors = [json.loads((folder / "preprocessor_config.json").read_text()) for folder in folders]
    assert processors[1] == processors[0] | {"do_center_crop": False}
    losses = [[row["loss"] for row in read_metrics(folder) if row["split"] == "validation"] for folder in folders]
    assert losses[1] < losses[0]  # ten seeds: by 0.20 to 0.61


def test_train_val_split_0_uses_all_training_images(tmp_path, capsys):
    main([*SHORT, "--train_val_split", "0", "--ema_decay", "0.9", "--output_dir", str(tmp_path / "run")])
    assert "1437 train, 360 test images" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] != "train"]
    assert [(row["split"], row["weights"]) for row in rows] == [("test", "ema")]


def test_tracker_receives_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main([*SHORT, "--report_to", "tensorboard", "--ema_decay", "0.9", "--output_dir", str(tmp_path / "run")])
    (events,) = (tmp_path / "run/vit_simple").glob("events*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/lr", "validation/top1", "validation_ema/top1"} <= set(tags)
    assert {"test/top1", "test_ema/top1"} & set(tags)  # of the better weights


def image_folder(folder) -> str:
    """Images of two sizes and two classes; one image of each split is damaged."""
    for split in ("train", "test"):
        for name, shade in (("dark", 40), ("light", 210)):
            for number, size in enumerate([(40, 30), (30, 40)] * 3):
                path = folder / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, (shade + number,) * 3).save(path)
        (folder / split / "dark/0.jpg").write_bytes(b"broken")
    return str(folder)


def test_bad_image_stops_the_run_or_is_skipped_and_listed(tmp_path, capsys):
    name = image_folder(tmp_path / "images")
    options = ["--dataset_name", name, "--variant", "notebook/8", "--image_size", "16", "--train_val_split", "0"]
    options += ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--output_dir"]
    for where in ("train", "test"):  # found before the training or, without a cache, during it
        first = ["--random_resized_crop", "0"] if where == "train" else ["--cache_images", "off"]
        with pytest.raises(SystemExit, match=r"error: row .*dark/0.jpg\) cannot be used: not an"):
            main([*options, str(tmp_path / where), *first])
        assert (tmp_path / where).exists() == (where == "test")
    capsys.readouterr()
    main([*options, str(tmp_path / "run"), "--on_bad_image", "skip"])
    printed = capsys.readouterr().out
    for split in ("train", "test"):
        file = f"{name}/{split}/dark/0.jpg"
        assert file in printed
    assert "skipped 2 unreadable images:" in printed
    assert read_metrics(tmp_path / "run")[-1]["count"] == 11


# What cannot run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset_name", "no/such/folder"], "--dataset_name: 'no/such/folder' cannot be loaded"),
        (["--image_column_name", "picture"], "--image_column_name: expected images in the column 'picture'"),
        (["--per_device_train_batch_size", "2000"], "expected at most 1293, so that the training images fill one step"),
        (["--gradient_accumulation_steps", "2000"], "--gradient_accumulation_steps: expected at most 1293, because"),
        (["--output_dir", "file/run"], "--output_dir: file/run cannot be written: Not a directory"),
        (["--output_dir", "file"], "--output_dir: file cannot be written: File exists"),
    ],
)
def test_refused_run_leaves_nothing_behind(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value) and stop.value.code == 2
    assert files(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_user_error_is_one_line_with_exit_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--sed", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "train.py: error: command line: '--sed' is not known, did you mean 'seed'?\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("1: 2", "1 is not known"),
        ("sed: 1", "'sed' is not known, did you mean 'seed'?"),
        ("seed: true", "--seed: expected an integer, got True"),
        ("seed: null", "--seed: expected an integer, got None"),
        ("learning_rate: [1]", "--learning_rate: expected a number, got [1]"),
        ("- 1", "expected a mapping of options in"),
        ("a: b: c", "cannot be read"),
        ("model: {hiden_size: 3}", "--model: 'hiden_size' is not known, did you mean 'hidden_size'?"),
        ("model: {image_size: 8, patch_size: 3}", "image_size: expected a multiple of patch_size=3, got 8"),
        ("model: {num_channels: 1}", "expected num_channels 3, because every image becomes RGB, got 1"),
    ],
)
def test_recipe_errors_name_the_option(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert message in str(stop.value) and stop.value.code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat", "1"], "command line: '--learning_rat' is not known, did you mean 'learning_rate'?"),
        (["--lr=1"], "command line: '--lr' is not known"),
        (["--zzz", "1"], "command line: '--zzz' is not known"),
        (["--seed", "x"], "--seed: expected an integer, got 'x'"),
        (["--seed"], "command line: argument --seed: expected one argument"),
        (["--seed", "1.5"], "--seed: expected an integer, got '1.5'"),
        (["--optim", "sgd"], "--optim: expected adamw or muon, got 'sgd'"),
        (["--num_train_epochs", "0"], "--num_train_epochs: expected a number in [1, inf), got 0"),
        (
            ["--per_device_train_batch_size", "-1"],
            "--per_device_train_batch_size: expected a number in [1, inf), got -1",
        ),
        (["--eval_steps", "0"], "--eval_steps: expected a number in [1, inf), got 0"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number in [0, inf), got nan"),
        (["--train_val_split", "1"], "--train_val_split: expected a number in [0, 1), got 1.0"),
        (["--affine_scale", "1"], "--affine_scale: expected a number in [0, 1), got 1.0"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor: expected a number in [0, 1), got 1.0"),
        (["--model", "[1]"], "--model: expected a YAML mapping, got '[1]'"),
        (["--variant", "S/16", "--model", "{}"], "--variant and --image_size cannot be combined with --model"),
        (
            ["--model_name_or_path", "x", "--variant", "S/16"],
            "--variant cannot be combined with --model_name_or_path: the checkpoint defines",
        ),
        (["--conversion", "{family: dino}"], "--conversion needs --model_name_or_path"),
        (["--eval_only"], "--eval_only needs --model_name_or_path, the checkpoint to evaluate"),
        (
            ["--eval_only", "--model_name_or_path", "x", "--push_to_hub", "--hub_model_id", "a/b"],
            "--push_to_hub cannot be combined with --eval_only",
        ),
        (["--eval_only", "maybe"], "--eval_only: expected true or false, got 'maybe'"),
        (["--report_to", "wandb"], "--report_to: expected wandb to be installed: pip install wandb"),
        (["--on_bad_image", "ignore"], "--on_bad_image: expected error or skip, got 'ignore'"),
        (["--randaugment_magnitude", "11"], "--randaugment_magnitude: expected a number in [0, 10], got 11.0"),
        (["--layer_decay", "0"], "--layer_decay: expected a number in (0, 1], got 0.0"),
        (["--affine_degrees", "90"], "--affine_degrees: expected a number in [0, 90), got 90.0"),
        (["--horizontal_flip", "2"], "--horizontal_flip: expected a number in [0, 1], got 2.0"),
        (["--variant", ""], "variant: expected NAME/PATCH"),
        (["--image_size", "0"], "--image_size: expected a number in [1, inf), got 0"),
        (["--seed", "-1"], "--seed: expected a number in [0, inf), got -1"),
        (["nowhere.yaml"], "recipe: nowhere.yaml cannot be read: "),
    ],
)
def test_option_errors_are_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert str(stop.value).startswith("train.py: error: ") and message in str(stop.value)
    assert stop.value.code == 2 and "\n" not in str(stop.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_outside_the_training_loop_is_one_line(monkeypatch, capsys, number):
    def stop(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        monkeypatch.setattr(train, "open_inputs", stop)
        with pytest.raises(SystemExit) as end:
            main([])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"train.py: stopped by {number.name}\n"


@pytest.mark.slow
def test_bug_keeps_its_traceback_with_exit_status_1(tmp_path):
    code = """
import sys
from vit_simple import train
def build_splits(*arguments):
    raise ValueError("a bug")
train.build_splits = build_splits
train.main(["--output_dir", sys.argv[1]])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and not (tmp_path / "run").exists()
    assert "in build_splits\nValueError: a bug\n" in result.stderr
    assert result.stderr.endswith("\ntrain.py: error: a bug\n")


@pytest.mark.slow
def test_bug_in_training_says_how_to_resume_after_its_traceback(tmp_path):
    code = """
import sys
from vit_simple import train
def schedule(step, *arguments):
    return 1.0 if step < 4 else undefined
train.schedule = schedule
train.main(sys.argv[1:])
"""
    folder = tmp_path / "run"
    options = ["--max_steps", "9", "--save_steps", "2", "--max_train_samples", "64", "--output_dir", str(folder)]
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert result.returncode == 1 and "\nNameError: name 'undefined' is not defined\n" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"train.py: error: name 'undefined' is not defined; the last good checkpoint is {folder}/")
    assert last.endswith(
        f"/step_000004; to continue, repeat the command with --output_dir {folder} --resume_from_checkpoint latest"
    )


@pytest.mark.slow
def test_failure_of_the_machine_is_one_line_with_exit_status_1(tmp_path):
    code = """
import sys, torch
from vit_simple import train
def build_splits(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate 2 GiB.")
train.build_splits = build_splits
train.main(["--output_dir", sys.argv[1]])
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("train.py: error: CUDA out of memory. Tried to allocate 2 GiB.\n")
