import contextlib
import json
import os
import sys

import pytest
import yaml

from tests.sharing.conftest import NAME, TOKEN
from vit_simple.files import UserError, read_json
from vit_simple.sharing import upload
from vit_simple.sharing.outgoing import cut_command, cut_paths, refuse_secrets, snapshot
from vit_simple.sharing.record import record
from vit_simple.sharing.upload import push
from vit_simple.sharing.verify import shared_names

# Secrets


@pytest.mark.parametrize(
    "text, is_secret",
    [
        ("hf_" + "a1B2" * 8, True),
        ("github_pat_" + "a1" * 20, True),
        ("sk-" + "aB3" * 10, True),
        ("https://me:word@host/data", True),
        ("-----BEGIN RSA PRIVATE KEY-----", True),
        ("my-own-secret-value", True),
        (TOKEN, True),
        ("TOKENhf_" + "a1B2" * 8, True),
        ("x_hf_" + "a1B2" * 8, True),
        ("hf\\u005f" + "a1B2" * 8, True),
        ("hf%5F" + "a1B2" * 8, True),
        ("https://account.blob.core.windows.net/data?sv=2022&sig=Qm9iJ3Mgc2lnbmF0dXJl", True),
        ("https://bucket.s3.amazonaws.com/data?X-Amz-Signature=" + "0a1b" * 16, True),
        ("https://host/data.zip?token=0123456789abcdef", True),
        ("https://hooks.slack.com/services/T00000000/B00000000/" + "aB1c" * 6, True),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0dXJlLW9mLWl0", True),
        ("sk_live_" + "a1B2" * 6, True),
        ("npm_" + "a1B2" * 9, True),
        ("pypi-AgEIcHlwaS5vcmc" + "a1B2" * 10, True),
        ("SG." + "a1B2" * 5 + "." + "a1B2" * 10, True),
        ("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", False),
        ("da39a3ee5e6b4b0d3255bfef95601890afd80709", False),
        ("commit of vit_simple: 3584b91f2c3d4e5f60718293a4b5c6d7e8f90123-dirty", False),
        ("/home/me/keys", False),
        ("Ada Lovelace", False),
        ("short", False),
        ("https://host:8080/sk-learn-digits-small-patch4-run2", False),
        ("ViTImageProcessor", False),
    ],
)
def test_secrets_are_refused_and_other_text_is_not(monkeypatch, text, is_secret):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_API_KEY", "my-own-secret-value")
    monkeypatch.setenv("TOKENIZER_NAME", "ViTImageProcessor")
    monkeypatch.setenv("SSH_KEY_FOLDER", "/home/me/keys")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Ada Lovelace")
    monkeypatch.setenv("DB_PASS", "short")
    error = pytest.raises(UserError, match=r"README\.md contains") if is_secret else contextlib.nullcontext()
    with error:
        refuse_secrets({"README.md": f"A card with {text} in it.".encode()})


NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "AZURE_STORAGE_KEY",
    "HF_TOKEN_WRITE",
    "DB_PASS",
    "PGPASSWORD",
    "MY_CREDENTIALS",
    "SIG",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
def test_values_of_secret_variables_are_refused_in_every_encoding(monkeypatch, name, encoding):
    monkeypatch.setenv(name, "/Wörter+geheim")
    with pytest.raises(UserError, match=rf"metrics\.jsonl contains the value of {name}"):
        refuse_secrets({"metrics.jsonl": '{"note": "/Wörter+geheim"}'.encode(encoding)})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_tokens_are_refused_in_utf_16(encoding):
    with pytest.raises(UserError, match="what looks like a token"):
        refuse_secrets({"README.md": ("github_pat_" + "a1" * 20).encode(encoding)})


# Links and other files


def test_links_are_refused(folder, tmp_path):
    (tmp_path / "private").write_text("pass = correct-horse-battery")
    for name in ("train_config.yaml", "README.md", "curves.png", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "private")
        with pytest.raises(UserError, match=f"digits/{name}: expected a regular file"):
            push(folder, NAME, dry_run=True)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


def test_fifos_are_refused_without_opening_them(folder):
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a regular file"):
        push(folder, NAME, dry_run=True)


def test_images_must_be_images(folder):
    (folder / "curves.png").write_text("root:x:0:0")
    with pytest.raises(UserError, match=r"curves\.png: expected a PNG image"):
        push(folder, NAME, dry_run=True)


def test_snapshot_stays_as_it_was_when_the_folder_changes(folder):
    metrics, weights = (folder / "metrics.jsonl").read_bytes(), (folder / "model.safetensors").read_bytes()
    with snapshot(folder, shared_names(folder)) as copy:
        (folder / "metrics.jsonl").write_text(TOKEN)
        (folder / "model.safetensors").write_bytes(b"other")
        assert (copy / "metrics.jsonl").read_bytes() == metrics
        assert (copy / "model.safetensors").read_bytes() == weights


def test_errors_name_the_folder_and_not_its_copy(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"{folder}/config.json: expected JSON"):
        push(folder, NAME, dry_run=True)


# Paths


@pytest.mark.parametrize(
    "value, cut",
    [
        ("/home/alice.smith/clients/acme secret/cats", "cats"),
        ("~/clients/acme/cats/", "cats"),
        ("../../clients/acme/cats", "cats"),
        ("file:///home/alice/cats.parquet", "cats.parquet"),
        ("C:\\Users\\alice\\cats", "cats"),
        ("--data=/home/alice/cats", "--data=cats"),
        (
            "{'train': '/home/alice/a.parquet', 'test': \"/home/alice/b.parquet\"}",
            "{'train': 'a.parquet', 'test': \"b.parquet\"}",
        ),
        (["/home/alice/a", {"b": "/home/alice/b"}, 3], ["a", {"b": "b"}, 3]),
        ("outputs/digits", "outputs/digits"),
        ("user/digits", "user/digits"),
        ("S/16", "S/16"),
        ("https://host/data/a.zip", "https://host/data/a.zip"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(value, cut):
    assert cut_paths(value) == cut


def test_command_keeps_its_other_words():
    command = "python train.py recipes/cifar10.yaml --dataset_name '/home/alice smith/cats' --output_dir=/mnt/acme/run"
    assert cut_command(command) == "python train.py recipes/cifar10.yaml --dataset_name cats --output_dir=run"


def test_command_is_recorded_once_although_its_paths_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", str(tmp_path)])
    for _ in range(2):
        record(tmp_path)
    assert read_json(tmp_path / "provenance.json")["commands"] == [f"python train.py --output_dir {tmp_path.name}"]


def test_pushed_files_have_no_absolute_path_and_the_folder_keeps_its_recipe(folder, monkeypatch, capsys):
    recipe = yaml.safe_load((folder / "train_config.yaml").read_text())
    recipe |= {"dataset_name": "/home/alice/acme/cats", "model_name_or_path": "/home/alice/base"}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(recipe))
    record = json.loads((folder / "provenance.json").read_text())
    record["commands"] = ["python train.py --dataset_name /home/alice/acme/cats --output_dir /home/alice/acme/run"]
    (folder / "provenance.json").write_text(json.dumps(record))
    with snapshot(folder, shared_names(folder)) as copy:
        for file in copy.iterdir():
            assert file.name == "README.md" or b"/home/alice" not in file.read_bytes(), file
        assert yaml.safe_load((copy / "train_config.yaml").read_text())["dataset_name"] == "cats"
    monkeypatch.setattr(upload, "local_outputs", lambda folder: {})
    push(folder, NAME, dry_run=True)
    printed = capsys.readouterr().out
    assert "--dataset_name cats --output_dir run" in printed and "alice" not in printed and "acme" not in printed
    assert "/home/alice/acme/cats" in (folder / "train_config.yaml").read_text()
