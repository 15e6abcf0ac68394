"""Text of datasets and files reaches terminals and file names without doing any harm."""

import io
import json
import os
import shutil
import subprocess
import sys

import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import tiny
from vit_simple import convert_checkpoint, push_to_hub
from vit_simple.files import file_name, terminal_text
from vit_simple.sharing import upload
from vit_simple.training.config import TrainConfig
from vit_simple.training.folder import choose_folder
from vit_simple.training.metrics import Evaluation, class_table

NAMES = ["$5_$10", "\x1b]0;title\x07\x1b[2Jred", "a\r\nb", "\u202egod", "猫", "kočička"]


@pytest.fixture
def terminal(monkeypatch):
    """Gives the standard output another encoding."""
    return lambda encoding: monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("kočička 猫 ☃", "kočička 猫 ☃"),
        ("\x1b[2J\x9b0m", "\\x1b[2J\\x9b0m"),
        ("a\r\nb\tc\x00", "a\\r\\nb\\tc\\x00"),
        ("\u202egod\u2028", "\\u202egod\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_terminal_text_escapes_what_controls_a_terminal(text, shown, terminal):
    terminal("utf-8")
    assert terminal_text(text) == shown


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", "ko\\u010di\\u010dka \\u732b"), ("cp1252", "ko\\u010di\\u010dka \\u732b")]
)
def test_terminal_text_escapes_what_the_terminal_cannot_encode(encoding, shown, terminal):
    terminal(encoding)
    assert terminal_text("kočička 猫") == shown


@pytest.mark.parametrize(
    "text, name",
    [
        ("digits", "digits"),
        ("imagenet-1k_v2.0", "imagenet-1k_v2.0"),
        ("猫", "猫"),
        ("../a/b", "_a_b"),
        ("\x1b[2J\nx:y", "__2J_x_y"),
        (".hidden", "hidden"),
        ("--output_dir", "output_dir"),
        ("猫" * 300, "猫" * 60),  # 180 of the 255 bytes that file systems allow
        ("", "unnamed"),
    ],
)
def test_file_name_of_any_text(text, name):
    assert file_name(text) == name


def test_output_folder_of_a_dataset_with_a_strange_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_folder(TrainConfig(dataset_name="\x1b[2J\nname")).name == "__2J_name"
    assert choose_folder(TrainConfig(dataset_name="/")).as_posix() == "outputs/unnamed"


def test_class_table_has_one_line_for_each_class():
    lines = class_table("test", Evaluation({"top1": 1.0}, [1.0] * len(NAMES)), NAMES).splitlines()
    assert len(lines) == 1 + len(NAMES) and is_harmless("".join(lines))
    assert lines[3].split() == ["a\\r\\nb", "100.00%"]


def test_error_is_one_line_without_control_characters(tmp_path, capsys):
    torch.save({**tiny().state_dict(), "\x1b[2J\r\nodd": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(SystemExit):
        convert_checkpoint.main(
            [str(tmp_path / "a.pth"), str(tmp_path / "out"), "--num_attention_heads", "4", "--family", "augreg"]
        )
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and is_harmless(printed) and "\\x1b[2J" in printed


def test_convert_report_has_no_control_characters(tmp_path, capsys):
    torch.save({**tiny().state_dict(), "decoder.\x1b[2J": torch.ones(1)}, tmp_path / "a.pth")
    options = ["--num_attention_heads", "4", "--family", "augreg"]
    convert_checkpoint.main([str(tmp_path / "a.pth"), str(tmp_path / "out"), *options])
    printed = capsys.readouterr().out
    assert is_harmless(printed) and "dropped the decoder: decoder.\\x1b[2J" in printed


def test_push_dry_run_has_no_control_characters(run_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    names = dict(enumerate(["\x1b[2J", "猫", *map(str, range(2, 10))]))
    config |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(upload, "local_outputs", lambda folder: {})
    push_to_hub.main([str(folder), "user/digits", "--license", "mit", "--dry_run"])
    printed = capsys.readouterr().out
    assert is_harmless(printed) and "猫" in printed and "model.safetensors" in printed


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_run_with_any_class_names_completes_on_any_terminal(tmp_path, encoding):
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    images = [PIL.Image.new("RGB", (16, 16), (5 * number, 200, 90)) for number in range(48)]
    rows = {"image": images, "label": [number % len(NAMES) for number in range(48)]}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"猫/{split}.parquet")
    options = ["--train_val_split", "0", "--variant", "notebook/8", "--image_size", "16", "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "8"]
    command = [sys.executable, "-m", "vit_simple.train", "--dataset_name", "猫", "--output_dir", "run 猫", *options]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    printed = result.stdout.decode(encoding)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr.decode(encoding, "replace")
    assert is_harmless(printed) and "\\x1b]0;title" in printed and "saved in run " in printed
    assert ("猫" in printed) == (encoding == "utf-8")
    files = {path.name for path in (tmp_path / "run 猫").iterdir()}
    assert {"README.md", "curves.png", "confusion.png", "predictions.png", "model.safetensors"} <= files
    assert list(json.loads((tmp_path / "run 猫/config.json").read_text())["id2label"].values()) == NAMES
