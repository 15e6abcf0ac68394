"""What happens to the folder of a run: nothing is lost, mixed up or used by two."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import DIGITS
from vit_simple import train
from vit_simple.files import UserError, read_metrics
from vit_simple.train import main
from vit_simple.training.config import TrainConfig
from vit_simple.training.folder import choose_folder, how_to_resume
from vit_simple.training.integrity import complete_checkpoints, damaged, write_sums

MODEL = "{image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
MODEL += "intermediate_size: 32}"
OPTIONS = ["--dataset_name", DIGITS, "--model", MODEL, "--max_train_samples", "64", "--max_eval_samples", "16"]
OPTIONS += ["--max_steps", "7", "--save_steps", "2", "--per_device_train_batch_size", "16", "--ema_decay", "0.9"]
OPTIONS += ["--save_total_limit", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    main([*OPTIONS, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def message(*options) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*OPTIONS, *map(str, options)])
    assert stop.value.code == 2
    assert "\n" not in str(stop.value)
    return str(stop.value)


def resume(run: Path, *options) -> str:
    (run / "finished.json").unlink(missing_ok=True)
    return message("--output_dir", run, "--resume_from_checkpoint", "latest", *options)


# Order


def test_finished_run_is_not_resumed_by_latest(run):
    before = content(run)
    assert "this run is finished" in message("--output_dir", run, "--resume_from_checkpoint", "latest")
    assert content(run) == before


def test_named_checkpoint_of_a_finished_run_changes_nothing_until_it_is_replaced(run, monkeypatch):
    """A resumed run that fails before its first checkpoint leaves the folder's result and newer checkpoints."""
    before = {path: data for path, data in content(run).items() if path.name != "provenance.json"}

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", fail)
        with pytest.raises(SystemExit):
            main([*OPTIONS, "--resume_from_checkpoint", str(run / "checkpoints/step_000002")])
    now = content(run)
    assert {path: now[path] for path in before} == before
    main([*OPTIONS, "--resume_from_checkpoint", str(run / "checkpoints/step_000002")])
    assert (run / "finished.json").is_file() and not (run / ".metrics.jsonl").exists()
    assert (run / "model.safetensors").read_bytes() == before[run / "model.safetensors"]
    assert [path.name for path in complete_checkpoints(run)] == ["step_000002", "step_000004", "step_000006"]


def test_precision_of_the_launcher_is_kept_and_compared_when_a_run_resumes(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` sets it
    assert "mixed_precision was 'no', is now 'bf16'" in resume(run)
    recipe = (run / "train_config.yaml").read_text()
    assert "mixed_precision: 'no'\n" in recipe
    (run / "train_config.yaml").write_text(recipe.replace("mixed_precision: 'no'", "mixed_precision: null"))
    main([*OPTIONS, "--output_dir", str(run), "--resume_from_checkpoint", "latest"])  # as an earlier version wrote it
    assert "mixed_precision: bf16\n" in (run / "train_config.yaml").read_text()


def test_folder_without_a_name_is_the_next_or_the_last_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, latest = TrainConfig(dataset_name="cats"), TrainConfig(dataset_name="cats", resume_from_checkpoint="latest")
    assert [choose_folder(config).name for config in (latest, new, latest)] == ["cats", "cats-2", "cats-2"]
    shutil.rmtree("outputs/cats")
    assert [choose_folder(config).name for config in (latest, new, latest)] == ["cats-2", "cats-3", "cats-3"]
    shutil.rmtree("outputs")
    Path("outputs").symlink_to("gone")
    with pytest.raises(FileExistsError):
        choose_folder(new)


def test_commands_in_messages_can_be_pasted(run):
    folder = run.rename(run.with_name("my run"))
    assert f"--output_dir '{folder}' --resume_from_checkpoint latest" in how_to_resume(folder)
    newest, other = reversed(complete_checkpoints(folder)[-2:])
    assert f"--resume_from_checkpoint '{other}'" in str(damaged(newest, "damaged"))


def test_damaged_older_checkpoint_leaves_the_newer_ones(run):
    older = run / "checkpoints/step_000002"
    (older / "model.safetensors").write_bytes((older / "model.safetensors").read_bytes()[:-10])
    before = content(run)
    said = message("--resume_from_checkpoint", older)
    assert f"{older}/model.safetensors" in said and f"--resume_from_checkpoint {run}/checkpoints/step_000006" in said
    assert content(run) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, limit, reason",
    [
        ("log_metrics", 0, "/metrics.jsonl"),
        ("export", 1_000, "the weights cannot be saved in"),
        ("export", 14_000, "the weights cannot be saved in"),
        ("write_card", 1_000, "/README.md"),
    ],
)
def test_full_disk_is_one_line_and_the_run_resumes(finished, tmp_path, function, limit, reason):
    """The limit on the size of a file stands in for the full disk, from the end of the training on."""
    code = """
import resource, sys
from vit_simple import train
name, limit = sys.argv[1], int(sys.argv[2])
schedule, function, done = train.schedule, getattr(train, name), []
def step(*given):
    done.append(1)
    return schedule(*given)
def full(*given, **options):
    if len(done) == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return function(*given, **options)
train.schedule = step
setattr(train, name, full)
train.main(sys.argv[3:])
"""
    run, environment = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, function, str(limit), *OPTIONS, "--output_dir", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: ") and reason in last
    assert f"; the last good checkpoint is {run}/checkpoints/step_000006; to continue, repeat" in last
    assert not (run / "finished.json").exists() and not (run / ".result").exists()
    assert function == "write_card" or not (run / "model.safetensors").exists()
    main([*OPTIONS, "--output_dir", str(run), "--resume_from_checkpoint", "latest"])
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    keys = [(row["step"], row["split"], row.get("weights")) for row in read_metrics(run)]
    assert keys == [(row["step"], row["split"], row.get("weights")) for row in read_metrics(finished)]


# Content


def write_images(folder: Path, names: list[str]):
    """32 images of two classes with these names, in a parquet file."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    images = list(generator.integers(256, size=(32, 8, 8, 3), dtype=np.uint8))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    Dataset.from_dict({"image": images, "label": [0, 1] * 16}, features).to_parquet(folder / "train.parquet")


def test_run_is_not_resumed_on_a_dataset_with_exchanged_class_names(tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    options = ["--dataset_name", str(images), "--max_steps", "3", "--per_device_train_batch_size", "8"]
    write_images(images, ["cat", "dog"])
    main([*OPTIONS, *options, "--output_dir", str(run)])
    (run / "finished.json").unlink()
    write_images(images, ["dog", "cat"])
    before = content(run)
    said = message(*options, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert f"cannot resume {run} with another dataset: label names have changed" in said
    assert content(run) == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_checkpoint_is_refused_by_the_name_of_its_file(run, name, damage):
    file = run / "checkpoints/step_000006" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(data) if damage == "flipped" else bytes(data[: len(data) // 2]))
    before = content(run)
    options = ["--output_dir", run, "--resume_from_checkpoint", file.parent]
    said = message(*options)
    if (name, damage) == ("state.json", "missing"):
        assert "expected latest or a checkpoints/step_N folder" in said
    else:
        assert str(file.parent) in said
        assert f"--resume_from_checkpoint {run}/checkpoints/step_000004" in said
    if name not in ("SHA256SUMS", "state.json"):
        assert str(file) in said
    assert content(run) == before


def make_old(checkpoint: Path):
    state = json.loads((checkpoint / "state.json").read_text())
    del state["data"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "SHA256SUMS").unlink()


def test_checkpoint_of_an_earlier_version_resumes_with_a_warning(run, capsys):
    make_old(run / "checkpoints/step_000006")
    main([*OPTIONS, "--resume_from_checkpoint", str(run / "checkpoints/step_000006")])
    assert capsys.readouterr().out.count("saved by an earlier version, without hashes") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.bin"])
def test_damaged_checkpoint_of_an_earlier_version_is_one_line(run, name):
    checkpoint = run / "checkpoints/step_000006"
    make_old(checkpoint)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:50])
    said = message("--resume_from_checkpoint", checkpoint)
    assert f"{checkpoint} cannot be loaded" in said
    assert f"--resume_from_checkpoint {run}/checkpoints/step_000004" in said


@pytest.mark.parametrize(
    "state", ["{}", "[]", '{"step": "6"}', "{", '{"step": 6, "processes": 1, "loss_sums": 0, "bad_images": {}}']
)
def test_state_with_wrong_types_names_the_file(run, state):
    checkpoint = run / "checkpoints/step_000006"
    make_old(checkpoint)
    (checkpoint / "state.json").write_text(state)
    assert f"{checkpoint}/state.json: expected" in resume(run)


@pytest.mark.parametrize("recipe", ["", "[]", "seed: [1]", "{", "!!python/object:os.system {}"])
def test_recipe_with_wrong_types_names_the_file(run, recipe):
    (run / "train_config.yaml").write_text(recipe)
    assert f"{run}/train_config.yaml: expected" in resume(run)


@pytest.mark.parametrize("line", ["[]", '{"step": "1", "split": "train"}', '{"step": 1, "split": "test", "loss": []}'])
def test_metrics_with_wrong_types_name_the_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected"):
        read_metrics(tmp_path)


# Finite weights and numbers


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path):
    """A huge learning rate: loss and gradient of the step are finite, and the weights after it are not."""
    folder = tmp_path / "run"
    options = ["--output_dir", str(folder), "--learning_rate", "1e39", "--warmup_steps", "0"]
    for steps in ("1", "2"):  # at the end, or at a checkpoint
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(SystemExit) as stop:
            main([*OPTIONS, *options, "--max_steps", steps, "--save_steps", "1", "--logging_steps", "1"])
        assert stop.value.code == 1 and "not finite" in str(stop.value)
        assert f"there is no checkpoint in {folder}" in str(stop.value)
        assert not (folder / "model.safetensors").exists()


def test_checkpoint_with_weights_that_are_not_finite_is_refused(run):
    from safetensors.torch import load_file, save_file

    checkpoint = run / "checkpoints/step_000006"
    weights = load_file(checkpoint / "model.safetensors")
    weights["head.bias"][0] = math.nan
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    (checkpoint / "SHA256SUMS").unlink()
    write_sums(checkpoint)
    assert "the weights after step 6 are not finite" in resume(run)


def test_metrics_never_hold_a_number_that_is_not_finite(tmp_path, monkeypatch):
    evaluate = train.evaluate

    def broken(*given, **options):
        result = evaluate(*given, **options)
        result.values["loss"] = math.nan
        return result

    monkeypatch.setattr(train, "evaluate", broken)
    with pytest.raises(SystemExit, match="loss of the split 'validation' at step 4 is nan"):
        main([*OPTIONS, "--output_dir", str(tmp_path / "run")])
    assert all(row["split"] == "train" for row in read_metrics(tmp_path / "run"))


# Names, links and owners


def test_names_that_are_no_checkpoints_are_left_alone(run):
    folder = run / "checkpoints"
    for name in ("step_000010.bak", "step_best", "step_000020 (copy)", ".step_best"):
        shutil.copytree(folder / "step_000002", folder / name)
    (folder / "step_999999").write_text("a file")
    (folder / "step_999998").mkdir()
    strange = {path for path in folder.iterdir()} - {folder / f"step_00000{step}" for step in (2, 4, 6)}
    assert [path.name for path in complete_checkpoints(run)] == ["step_000002", "step_000004", "step_000006"]
    (run / "finished.json").unlink()
    main([*OPTIONS, "--output_dir", str(run), "--resume_from_checkpoint", "latest", "--save_total_limit", "1"])
    assert strange <= set(folder.iterdir())


def test_copies_that_are_made_during_a_run_are_left_alone(tmp_path, monkeypatch):
    run, names, schedule = tmp_path / "run", ("step_000010.bak", "step_best_so_far", ".step_000002.old"), train.schedule

    def copy(step, *given):
        if step == 3:
            for name in names:
                shutil.copytree(run / "checkpoints/step_000002", run / "checkpoints" / name)
        return schedule(step, *given)

    monkeypatch.setattr(train, "schedule", copy)
    main([*OPTIONS, "--output_dir", str(run), "--save_total_limit", "1"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {*names, "step_000006"}


def test_checkpoints_may_be_a_link_to_another_disk(run, tmp_path):
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    main([*OPTIONS, "--resume_from_checkpoint", str(run / "checkpoints/step_000006")])
    main([*OPTIONS, "--output_dir", str(run), "--resume_from_checkpoint", str(tmp_path / "disk/step_000006")])


@pytest.mark.slow
def test_folder_has_one_owner_until_its_process_ends(run):
    code = "import sys; from pathlib import Path; from vit_simple.training.lock import lock; lock(Path(sys.argv[1]))"
    code += "\nprint('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(run)], **pipes) as owner:
        assert owner.stdout.readline() == "locked\n"
        before = content(run)
        assert f"{run} is in use by process {owner.pid} on " in resume(run)
        del before[run / "finished.json"]
        assert content(run) == before
        owner.kill()
    main([*OPTIONS, "--output_dir", str(run), "--resume_from_checkpoint", "latest"])


@pytest.mark.slow
def test_new_runs_at_once_never_share_a_folder(tmp_path):
    code = """
import sys, time
from vit_simple.files import UserError
from vit_simple.training.config import TrainConfig
from vit_simple.training.folder import open_folder
sys.stdin.readline()
for given in [None, *(f"run{number}" for number in range(20))]:
    try:
        print(open_folder(TrainConfig(dataset_name="digits", output_dir=given), 1, {})[0], flush=True)
    except UserError:
        pass
print("end", flush=True)
sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    folders = [folder for process in processes for folder in iter(process.stdout.readline, "end\n")]
    for process in processes:
        process.communicate("\n")
    assert len(folders) == len(set(folders)) == 2 + 20  # one without a name for each, and 20 with a name


def test_output_folder_inside_the_dataset_is_refused(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "images")
    said = message("--dataset_name", tmp_path / "images", "--output_dir", tmp_path / "images/run")
    assert "--output_dir: expected a folder outside the dataset" in said
    assert not (tmp_path / "images/run").exists()
