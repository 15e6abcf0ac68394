"""What train.py shares of a run: the record for its model card, and its pushes to the Hub."""

import atexit
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..conversion.convert import Checkpoint
from ..data.loading import ImageData, local_path
from ..files import NETWORK_ERRORS, ONNX_FILES, UserError
from ..training.config import TrainConfig
from .network import announced, with_retries
from .outgoing import copy_regular_files
from .record import record
from .upload import push
from .verify import shared_names

WAIT_SECONDS = 600  # that the end of a run waits for the push of a checkpoint


def check_hub(config: TrainConfig, base: Checkpoint | None):
    """Checks before training that a push at the end can succeed.

    Raises:
        UserError: there is no license or no login.
    """
    if config.license is None and "license" not in (base.inherited if base else {}):
        raise UserError("--push_to_hub needs --license, such as apache-2.0")
    try:
        with_retries("checking the login", HfApi().whoami)
    except NETWORK_ERRORS as error:
        raise UserError(f"--push_to_hub needs a login (hf auth login, or HF_TOKEN): {error}") from error


def record_run(config: TrainConfig, data: ImageData, base: Checkpoint | None, folder: Path):
    """Records what the model card needs and no other file contains: the dataset and the base model."""
    facts = dict(base.inherited) if base else {}
    facts["base_model_relation"] = "finetune" if "base_model" in facts else None
    facts["remarks"] = base.report if base and not base.origin.startswith("vit_simple ") else None
    if config.lora_rank is not None:
        saved = "merged into its weights" if config.adapter_base is None else "saved as an adapter"
        facts["method"] = f"LoRA of rank {config.lora_rank} on the attention weights, {saved}; the head as a whole"
        if config.adapter_base is not None and "base_model" in facts:
            facts["base_model_relation"] = "adapter"
    name, revision = config.dataset_name, config.dataset_revision
    on_hub = not local_path(name).exists()
    if on_hub:
        what = "the Hub: reading the revision of the dataset"
        with contextlib.suppress(*NETWORK_ERRORS), announced(what):
            revision = HfApi().dataset_info(name, revision=revision).sha
    dataset = {
        "name": name if on_hub else Path(name).resolve().name,
        "on_hub": on_hub,
        "config": config.dataset_config_name,
        "revision": revision,
        "images": data.sizes["train"],
        "has_16_bit_images": data.bit_depth is not None,
        "bit_depth": data.bit_depth,
    }
    record(folder, dataset=dataset, **facts)


def share(config: TrainConfig, folder: Path, title: str) -> str:
    """Pushes the folder of a run; returns the commit. Raises what `push` raises."""
    return push(folder, **push_options(config, folder, title))


def push_options(config: TrainConfig, folder: Path, title: str) -> dict:
    return {
        "repo_id": config.hub_model_id,
        "private": config.hub_private_repo,
        "license": config.license,
        "commit_message": f"{title} of {folder.resolve().name}",
    }


class BackgroundPush:
    """Pushes a run's folder from another process while training continues: one push at a time, not verified."""

    CODE = """
import json, sys
from vit_simple.files import command_errors
from vit_simple.sharing.upload import push
with command_errors("push"):
    push(**json.loads(sys.argv[1]), verify=False)
"""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder, self.title = config, folder, ""
        self.process: subprocess.Popen | None = None
        atexit.register(self.stop)

    def start(self, step: int) -> str:
        """Starts to push the folder as it is now; returns what to tell the user. An unfinished push is left alone."""
        message, title = self.message(), f"step {step}"
        if self.process is not None:
            return f"{title} is not pushed: the push of {self.title} has not ended"
        self.title, self.work = title, tempfile.TemporaryDirectory()
        copy, log = Path(self.work.name) / self.folder.resolve().name, Path(self.work.name) / "log"
        options = {**push_options(self.config, self.folder, title), "folder": str(copy)}
        command = [sys.executable, "-c", self.CODE, json.dumps(options)]
        try:
            copy.mkdir()
            names = [name for name in shared_names(self.folder) if name not in ONNX_FILES]  # of earlier weights
            copy_regular_files(self.folder, copy, names)
            with open(log, "w") as file:  # Ctrl-C reaches this process alone, which then stops the push
                output: dict = {"stdout": file, "stderr": subprocess.STDOUT}
                self.process = subprocess.Popen(command, start_new_session=True, **output)
        except (UserError, OSError) as error:
            self.work.cleanup()
            return f"{title} cannot be pushed: {error}"
        return "\n".join(filter(None, [message, f"{title} is being pushed while training continues"]))

    def message(self) -> str:
        """How the last push ended, once; "" while there is nothing new."""
        if self.process is None or self.process.poll() is None:
            return ""
        lines = (Path(self.work.name) / "log").read_text(errors="replace").strip().splitlines()
        failed, self.process = self.process.returncode != 0, None
        self.work.cleanup()
        return (
            f"{self.title} cannot be pushed: {lines[-1] if lines else 'no reason'}"
            if failed
            else f"pushed {self.title}"
        )

    def wait(self) -> str:
        """Waits until the push has ended, and stops it after WAIT_SECONDS; returns what to tell the user."""
        if self.process is not None:
            try:
                with announced(f"the push of {self.title}"):
                    self.process.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.stop()
                return f"the push of {self.title} was stopped after {WAIT_SECONDS} seconds"
        return self.message()

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process: subprocess.Popen | None = None
            self.work.cleanup()
