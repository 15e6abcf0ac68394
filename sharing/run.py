"""What train.py shares of a run: the record for its model card, and its pushes to the Hub."""

import contextlib
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from ..data.dataloader import has_16_bit_images
from ..data.loading import ImageData
from ..files import NETWORK_ERRORS, ROOT, RunError, UserError, inherited
from ..training.config import TrainConfig
from .record import record
from .upload import push, with_retries


def base_of(path: str | None) -> dict:
    """License and base model of a run that starts from a checkpoint, in a folder or on the Hub."""
    if path is None:
        return {}
    if Path(path).exists():
        return inherited(Path(path))
    with contextlib.suppress(UserError, *NETWORK_ERRORS):
        return inherited(Path(hf_hub_download(path, "README.md")).parent) | {"base_model": path}
    return {"base_model": path}


def check_hub(config: TrainConfig):
    """Checks before training that a push at the end can succeed.

    Raises:
        UserError: there is no license or no login.
    """
    if config.license is None and "license" not in base_of(config.model_name_or_path):
        raise UserError("--push_to_hub needs --license, such as apache-2.0")
    try:
        with_retries(HfApi().whoami)
    except NETWORK_ERRORS as error:
        raise UserError(f"--push_to_hub needs a login (hf auth login, or HF_TOKEN): {error}") from error


def record_run(config: TrainConfig, data: ImageData, folder: Path):
    """Records what the model card needs and no other file contains: the dataset and the base model."""
    base = base_of(config.model_name_or_path)
    base["base_model_relation"] = "finetune" if "base_model" in base else None
    name, revision = config.dataset_name, config.dataset_revision
    on_hub = not Path(name).exists() and not (ROOT / name).exists()
    if on_hub:
        with contextlib.suppress(*NETWORK_ERRORS):
            revision = HfApi().dataset_info(name, revision=revision).sha
    dataset = {
        "name": name if on_hub else Path(name).resolve().name,
        "on_hub": on_hub,
        "config": config.dataset_config_name,
        "revision": revision,
        "images": data.sizes["train"],
        "has_16_bit_images": has_16_bit_images(data),
    }
    record(folder, dataset=dataset, **base)


def share(config: TrainConfig, folder: Path, title: str) -> str:
    """Pushes the folder of a run; returns the commit. Raises what `push` raises."""
    return push(
        folder,
        config.hub_model_id,
        private=config.hub_private_repo,
        license=config.license,
        commit_message=f"{title} of {folder.resolve().name}",
    )


def share_or_warn(config: TrainConfig, folder: Path, title: str) -> str | None:
    """Pushes the folder during training; returns the reason if that fails, because the next push may succeed."""
    try:
        share(config, folder, title)
    except (UserError, RunError, *NETWORK_ERRORS) as error:
        return f"{title} cannot be pushed: {error}"
    return None
