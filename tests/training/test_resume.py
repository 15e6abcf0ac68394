"""A run that was killed or stopped resumes to the same bits: `pytest tests/training/test_resume.py --kills 20`."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vit_simple.files import ROOT
from vit_simple.train import main
from vit_simple.training.integrity import write_sums
from vit_simple.training.interrupt import catch_signals

# Every random choice that there is, checkpoints that fall between log lines and evaluations, and an average.
RUN = [
    *("--max_steps", "60", "--logging_steps", "7", "--eval_steps", "25"),
    *("--save_steps", "10", "--save_total_limit", "2"),
    *("--ema_decay", "0.95", "--drop_path_rate", "0.2", "--crop_padding", "1", "--horizontal_flip", "0.5"),
    *("--randaugment_num_ops", "1", "--random_erasing", "0.3", "--mixup_alpha", "0.5", "--cutmix_alpha", "1"),
    *("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "16"),
]
OPTIONS = {
    "cached": ["--random_resized_crop", "0"],
    "cropped": ["--random_resized_crop", "0.5", "--cache_images", "off"],
    "streamed": ["--random_resized_crop", "0.5", "--streaming", "--shuffle_buffer_size", "200"],
}
CACHED = OPTIONS["cached"]
WORKERS = {"cached": 0, "cropped": 0, "streamed": 2}  # of the runs that are left alone; a stream must keep its number
WAYS = [("cropped", 1), ("streamed", 2), ("cached", 0), ("streamed", 2), ("cropped", 3), ("cached", 3), ("cropped", 0)]
TIMES = {"images_per_second", "data_wait"}


def start(folder: Path, *options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train.py", "--output_dir", folder, *RUN, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "a") as log:
        options = {"stdout": log, "stderr": log, "env": environment, "cwd": folder.parent, "start_new_session": True}
        return subprocess.Popen([*map(str, command)], **options)


def finish(folder: Path, *options):
    assert start(folder, *options).wait(300) == 0, folder.with_suffix(".log").read_text()


def wait_for(condition, process: subprocess.Popen):
    """Whether the condition came true before the process ended."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def left(folder: Path) -> dict:
    """Everything that a run leaves, except times: tensors by file, and the lines of its log."""
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    found = {"checkpoints": checkpoints, "weights": load_file(folder / "model.safetensors")}
    last = folder / "checkpoints" / checkpoints[-1]
    found |= {name: load_file(last / name) for name in ("model.safetensors", "ema.safetensors")}
    found |= {name: torch.load(last / name, weights_only=True) for name in ("optimizer.bin", "optimizer_1.bin")}
    found["state"] = json.loads((last / "state.json").read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return found


def assert_same(one, other, path=""):
    """Equal to the last bit, whatever the nesting."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (first, second) in enumerate(zip(one, other)):
            assert_same(first, second, f"{path}/{number}")
    else:
        assert one == other, path


def options_of(name: str, workers: int) -> list[str]:
    return [*OPTIONS[name], "--dataloader_num_workers", str(workers)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What each way of reading data leaves when nothing happens, how long it takes, and the folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    processes = {name: start(folder / name, *options_of(name, WORKERS[name])) for name in OPTIONS}
    began, references = {}, {}
    for name, process in processes.items():
        assert wait_for((folder / name).exists, process), (folder / f"{name}.log").read_text()
        began[name] = time.perf_counter()
    for name, process in processes.items():
        assert process.wait(300) == 0, (folder / f"{name}.log").read_text()
        references[name] = left(folder / name), time.perf_counter() - began[name], folder / name
    return references


def kill(folder: Path, options: list[str], moment: float, saving: bool) -> bool:
    """Kills a run some seconds after it made its folder or, if `saving`, at its next checkpoint; False: it was over."""
    process = start(folder, *options)
    assert wait_for(folder.exists, process)
    time.sleep(moment)
    if saving and wait_for(lambda: any((folder / "checkpoints").glob(".step_*")), process):
        time.sleep(random.uniform(0, 0.01))
    process.kill()
    return process.wait() == -signal.SIGKILL


def two_at_a_time(function, cases):
    """Raises what the first of them to fail has raised."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(function, cases))


def test_killed_runs_resume_to_the_same_bits(uninterrupted, tmp_path, request):
    def check(number: int):
        name, workers = WAYS[number % len(WAYS)]
        expected, seconds, _ = uninterrupted[name]
        options = options_of(name, workers)
        saving = number % 2 == 1  # every other one dies while it writes a checkpoint
        for trial in range(20):
            folder, moment = tmp_path / f"run-{number}-{trial}", random.uniform(0, seconds)
            if kill(folder, options, moment, saving) and not (folder / "finished.json").exists():
                break
        else:
            pytest.fail("no run could be killed before its end")
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "step_" not in path.parent.name)
        finish(folder, *options, "--resume_from_checkpoint", "latest")
        assert_same(left(folder), expected)
        print(
            f"{name}, {workers} workers, killed after {moment:.2f} of {seconds:.2f} s, "
            f"leaving {' '.join(found)}: the same end"
        )

    two_at_a_time(check, range(request.config.getoption("--kills")))


# Stopping and resuming by hand


def test_signal_saves_a_checkpoint_and_says_how_to_resume(uninterrupted, tmp_path):
    def check(case: tuple):
        number, name = case
        folder, options = tmp_path / name, options_of(name, WORKERS[name])
        process = start(folder, *options)
        assert wait_for((folder / "metrics.jsonl").exists, process)
        os.killpg(process.pid, number)
        assert process.wait(60) == 128 + number
        (checkpoint,) = (folder / "checkpoints").iterdir()
        said = folder.with_suffix(".log").read_text()
        assert f"stopped by a signal: the last good checkpoint is {checkpoint}; to continue, repeat the" in said
        assert f"--output_dir {folder} --resume_from_checkpoint latest" in said and "Traceback" not in said
        finish(folder, *options, "--resume_from_checkpoint", "latest")
        assert_same(left(folder), uninterrupted[name][0])

    two_at_a_time(check, [(signal.SIGINT, "cached"), (signal.SIGTERM, "streamed")])


def test_only_a_second_ctrl_c_ends_a_run_at_once():
    with catch_signals() as signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_named_checkpoint_resumes_the_run(uninterrupted):
    """Later checkpoints and metrics stay until the first one of the resumed run is saved."""
    expected, _, folder = uninterrupted["cached"]
    process = start(folder, *CACHED, "--resume_from_checkpoint", folder / "checkpoints/step_000040")
    assert wait_for(lambda: not (folder / "finished.json").exists(), process)
    assert wait_for(lambda: (folder / "checkpoints/step_000050").exists(), process)
    process.kill()
    process.wait()
    finish(folder, *CACHED, "--resume_from_checkpoint", "latest")
    assert_same(left(folder), expected)


SHORT = ["--max_steps", "3", "--save_steps", "2", "--max_train_samples", "64"]


@pytest.fixture
def short_run(tmp_path) -> Path:
    main([*SHORT, "--output_dir", str(tmp_path / "run")])
    return tmp_path / "run"


def test_latest_without_checkpoint_starts_from_the_first_step(tmp_path, capsys):
    folder = tmp_path / "run"
    for _ in range(2):
        (folder / "finished.json").unlink(missing_ok=True)  # as if the first run had been killed just before
        main([*SHORT, "--save_steps", "9", "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
        assert f"no complete checkpoint in {folder}: starting from the first step" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 3, 3]  # one line each of training, validation and test, the second time, too


def test_latest_without_folder_resumes_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(SHORT)
    (tmp_path / "outputs/digits-2/finished.json").unlink()
    main([*SHORT, "--resume_from_checkpoint", "latest"])
    assert "resuming from outputs/digits-2/checkpoints/step_000002" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["digits", "digits-2"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seed", "1"], "cannot resume {run} with other options: seed was 0, is now 1"),
        (
            ["--max_steps", "4", "--learning_rate", "1"],
            "max_steps was 3, is now 4, learning_rate was 0.002, is now 1.0",
        ),
        (["--resume_from_checkpoint", "{run}"], "expected latest or a checkpoints/step_N folder, got {run}"),
        (
            ["--output_dir", "{run}/checkpoints"],
            "expected the folder of a run, got {run}/checkpoints without train_config",
        ),
        (
            ["--resume_from_checkpoint", "{run}/checkpoints/step_000002", "--output_dir", "elsewhere"],
            "--output_dir: expected {run}, the run of the checkpoint, got elsewhere",
        ),
    ],
)
def test_resume_refuses_another_run(short_run, options, message):
    before = {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()}
    given = ["--output_dir", str(short_run), "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit) as stop:
        main([*SHORT, *given, *(option.format(run=short_run) for option in options)])
    assert message.format(run=short_run) in str(stop.value)
    assert {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()} == before


def test_resume_refuses_another_number_of_processes(short_run):
    state = short_run / "checkpoints/step_000002/state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "processes": 2, "loss_sums": [0.0, 0.0]}))
    (state.parent / "SHA256SUMS").unlink()
    write_sums(state.parent)
    with pytest.raises(SystemExit, match="number of processes was 2, is now 1"):
        main([*SHORT, "--resume_from_checkpoint", str(state.parent)])


def test_resume_allows_options_that_change_no_weight(short_run):
    changed = ["--save_total_limit", "5", "--save_steps", "1"]
    changed += ["--on_bad_image", "skip", "--dataloader_num_workers", "1"]
    before = (short_run / "model.safetensors").read_bytes()
    main([*SHORT, "--resume_from_checkpoint", str(short_run / "checkpoints/step_000002"), *changed])
    assert (short_run / "model.safetensors").read_bytes() == before


# Disks and losses


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The limit on the size of a file stands in for the full disk: writing fails in the middle."""
    folder = tmp_path / "run"
    code = """
import resource, signal, sys
from vit_simple import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_state, saved = train.Accelerator.save_state, []
def full(self, *arguments):
    saved.append(1)
    if len(saved) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return save_state(self, *arguments)
train.Accelerator.save_state = full
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *RUN, *CACHED, "--output_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: step 30 cannot be saved: ")
    assert f"; the last good checkpoint is {folder}/checkpoints/step_000020; to continue, repeat" in last
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000010", "step_000020"]
    main([*RUN, *CACHED, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch, where):
    folder, calls = tmp_path / "run", []

    def break_seventh(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        broken = len(calls) == 7
        if where == "loss":
            return value * math.nan if broken else value
        value.register_hook(lambda gradient: gradient * math.inf if broken else gradient)
        return value

    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *given, **rest: break_seventh(cross_entropy(*given, **rest))
    )
    options = ["--max_steps", "40", "--logging_steps", "20", "--save_steps", "4", "--output_dir", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main([*options, "--eval_steps", "40"])
    assert "the loss or the gradient of step 7 is not finite: try a lower learning rate" in str(stop.value)
    assert f"; the last good checkpoint is {folder}/checkpoints/step_000004; to" in str(stop.value)
    assert stop.value.code == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000004"]
