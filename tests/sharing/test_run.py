import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.fake_hub.hub import Fault
from tests.sharing.conftest import NAME, TOKEN
from vit_simple.files import ROOT
from vit_simple.sharing import run
from vit_simple.sharing.run import BackgroundPush
from vit_simple.training.config import TrainConfig


@pytest.fixture
def background_push(folder):
    push = BackgroundPush(TrainConfig(push_to_hub=True, hub_model_id=NAME, license="mit"), folder)
    yield push
    push.stop()


def test_save_during_a_push_is_skipped_and_the_end_stops_a_push_that_hangs(background_push, monkeypatch):
    monkeypatch.setattr(BackgroundPush, "CODE", "import time; time.sleep(3600)")
    monkeypatch.setattr(run, "WAIT_SECONDS", 0.1)
    assert background_push.start(1) == "step 1 is being pushed while training continues"
    process = background_push.process
    assert background_push.start(2) == "step 2 is not pushed: the push of step 1 has not ended"
    assert background_push.wait() == "the push of step 1 was stopped after 0.1 seconds"
    assert process.poll() is not None and background_push.wait() == ""


def test_background_push_tells_how_it_ended(background_push, monkeypatch):
    monkeypatch.setattr(BackgroundPush, "CODE", "print('first'); raise SystemExit('no such repository')")
    background_push.start(1)
    assert background_push.wait() == "step 1 cannot be pushed: no such repository"
    monkeypatch.setattr(BackgroundPush, "CODE", "")
    background_push.start(2)
    assert background_push.wait() == "pushed step 2"


def test_background_push_has_the_files_of_its_save(background_push, folder, monkeypatch):
    code = """
import json, sys, pathlib, time
time.sleep(1)
folder = pathlib.Path(json.loads(sys.argv[1])["folder"])
raise SystemExit(folder.joinpath("metrics.jsonl").read_text())
"""
    monkeypatch.setattr(BackgroundPush, "CODE", code)
    (folder / "metrics.jsonl").write_text("of the save")
    background_push.start(1)
    (folder / "metrics.jsonl").write_text("of later")
    assert background_push.wait() == "step 1 cannot be pushed: of the save"


def test_folder_that_cannot_be_copied_does_not_end_the_training(background_push, folder, tmp_path):
    (folder / "curves.png").unlink()
    (folder / "curves.png").symlink_to(tmp_path / "private")
    assert "step 1 cannot be pushed: " in background_push.start(1) and background_push.process is None


@pytest.mark.slow
def test_signal_during_a_push_that_hangs_saves_and_ends_the_run(hub, tmp_path):
    hub.faults.append(Fault("/commit/", times=99, delay=3600))
    options = ["--num_train_epochs", "1000", "--save_steps", "20", "--output_dir", tmp_path / "run"]
    options += ["--push_to_hub", "--hub_model_id", NAME, "--hub_strategy", "every_save", "--license", "mit"]
    command = [sys.executable, ROOT / "train.py", *options]
    variables = {**hub.environment(tmp_path / "home", TOKEN), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as train:
        output = []
        for line in train.stdout:
            output.append(line)
            if "is not pushed" in line:  # training continues beside the push
                break
        while not any("/commit/" in request.path for request in hub.log):
            time.sleep(0.1)
        train.send_signal(signal.SIGTERM)
        output += train.stdout
    assert train.returncode == 128 + signal.SIGTERM, "".join(output)
    assert "stopped by a signal: the last good checkpoint is" in "".join(output)


def test_signal_while_the_end_waits_for_a_push_ends_the_push_too(hub, tmp_path):
    code = """
import sys
from vit_simple import train
from vit_simple.sharing import run
run.BackgroundPush.CODE = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(3600)"
train.main(sys.argv[1:])
"""
    options = ["--max_steps", "4", "--save_steps", "2", "--max_train_samples", "64", "--output_dir", tmp_path / "run"]
    options += ["--push_to_hub", "--hub_model_id", NAME, "--hub_strategy", "every_save", "--license", "mit"]
    command = [sys.executable, "-u", "-c", code, *options]
    variables = {**hub.environment(tmp_path / "home", TOKEN), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=variables, cwd=tmp_path, **pipes) as train:
        output = [*itertools.takewhile(lambda line: "waiting for the push of step 2" not in line, train.stdout)]
        push = int((tmp_path / "pid").read_text())
        train.send_signal(signal.SIGTERM)
        output += train.stdout
    assert train.returncode == 128 + signal.SIGTERM, "".join(output)
    assert output[-1] == (
        "train.py: stopped by SIGTERM; the folder is complete; "
        f"push it with python push_to_hub.py {tmp_path / 'run'} {NAME}\n"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(push, 0)
