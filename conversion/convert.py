"""Open a plain ViT of timm, transformers or this repository, and write it for one of these libraries."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from ..configuration_vit_simple import ViTSimpleConfig, pair, refuse_kernels
from ..files import CODE, PREPROCESSOR, ROOT, SAFETENSORS, RunError, UserError, inherited, read_json
from .processors import (
    FAMILIES,
    FAMILY_OF_TYPE,
    family_processor,
    fit_processor,
    processor_from_timm,
    processor_to_timm,
)
from .state_dict import Tensors, import_state_dict, join_names, load_tensors
from .timm import from_timm, to_timm
from .transformers import check_type, from_transformers, to_transformers

DESCRIPTION = ("config.json", PREPROCESSOR, "processor_config.json", "README.md")
PICKLES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")
WEIGHTS = (*SAFETENSORS, "*.safetensors", *PICKLES, "*.bin", "*.pth")  # the first pattern that matches is used


@dataclass
class Checkpoint:
    """A model in the format of this repository.

    processor: the content of preprocessor_config.json
    inherited: license and base model, for the model card
    report: one line for everything that was dropped or assumed
    """

    config: ViTSimpleConfig
    tensors: Tensors
    processor: dict
    inherited: dict
    report: list[str]


# Opening


def find_weights(source: str) -> tuple[Path | None, list[Path]]:
    """The folder that describes a checkpoint, and its weight files; what is not a path is downloaded from the Hub.

    For a weight file without a standard name there is no folder: the files beside it may belong to another checkpoint.
    """
    path = Path(source)
    if path.is_file():
        is_described = any(path.match(pattern) for pattern in (*SAFETENSORS, *PICKLES))
        return path.parent if is_described else None, [path]
    if not path.exists():
        path = download(source)
    if not path.is_dir():
        raise UserError(f"SOURCE: expected a file or a folder, got {path}")  # a FIFO or a device
    for pattern in WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) > 1 and "?" not in pattern:
            raise UserError(f"expected one weight file in {path}, got {join_names(file.name for file in files)}")
        if files:
            return path, files
    raise UserError(f"expected a weight file in {path}, got {join_names(sorted(file.name for file in path.iterdir()))}")


def download(repo_id: str) -> Path:
    """The folder with the files of a repository, without pickles if there is a safetensors file."""
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=[*DESCRIPTION, *SAFETENSORS]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=[*DESCRIPTION, *PICKLES]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"SOURCE: expected a file, a folder or a Hub repository, got {repo_id}: {error}") from error
    except OSError as error:
        raise OSError(f"SOURCE: no file or folder {repo_id}, and it cannot be downloaded: {error}") from error
    return folder


def open_checkpoint(
    source: str,
    family: str | None = None,
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
    base_model: str | None = None,
) -> Checkpoint:
    """A checkpoint in any supported format; the options supply what its files do not state.

    Raises:
        UserError: it is not a plain ViT, its files contradict each other, or too little is known.
        OSError: the Hub cannot be reached.
    """
    folder, files = find_weights(source)
    tensors, report = load_tensors(files), []
    content = read_config(folder) if folder else {}
    metadata = inherited(folder) if folder else {}
    model_type, pretrained = content.get("model_type"), content.get("pretrained_cfg") or {}
    if model_type is not None and (num_attention_heads or hidden_act):
        raise UserError("--num_attention_heads and --hidden_act cannot be combined with a config.json that states both")
    if model_type is None:
        config, tensors = from_timm(content, tensors, report, num_attention_heads, hidden_act)
        metadata = ({"license": pretrained["license"]} if pretrained.get("license") else {}) | metadata
    elif model_type == ViTSimpleConfig.model_type:
        config = open_config(folder, ViTSimpleConfig)
        tensors = import_state_dict(tensors, {}, config)
    else:
        check_type(model_type)
        config, tensors = from_transformers(open_config(folder), tensors, report)

    if family is None and pretrained:
        processor = processor_from_timm(pretrained, pair(config.image_size), report)
    else:
        processor = read_processor(folder, family, model_type, config, report)
    if not Path(source).exists():
        metadata["base_model"] = source
    if base_model is not None:
        metadata["base_model"] = base_model
    return Checkpoint(config, tensors, fit_processor(processor, config, report), metadata, report)


def read_config(folder: Path) -> dict:
    """The content of config.json, {} if there is none.

    Raises:
        UserError: it is damaged, or names attention kernels of the Hub.
    """
    content = read_json(folder / "config.json")
    try:
        refuse_kernels(content)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    return content


def open_config(folder: Path, config_class: Any = AutoConfig) -> PretrainedConfig:
    """The config in config.json.

    Raises:
        UserError: a field has a wrong type or value.
    """
    try:
        return config_class.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def read_processor(
    folder: Path | None, family: str | None, model_type: str | None, config: ViTSimpleConfig, report: list[str]
) -> dict:
    """The image processor of the family that the user names, of the folder, or of the usual family."""
    if family is None and folder is not None:
        combined = read_json(folder / "processor_config.json").get("image_processor")
        if processor := read_json(folder / PREPROCESSOR) or combined:
            return processor
    if family is None:
        family = FAMILY_OF_TYPE.get(model_type, "clip" if config.pre_norm else None)
        if family is None:
            choices = ", ".join(FAMILIES)
            raise UserError(f"--family is required, because there is no image processor: choose one of {choices}")
        report.append(f"assumed the image processor of {family}, because the checkpoint has none")
    return family_processor(family, pair(config.image_size))


# Writing


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` when the block ends; if the block fails, nothing is left.

    Raises:
        UserError: `path` exists.
    """
    if path.exists():
        raise UserError(f"OUT: {path} already exists; choose a new folder")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(path)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, to: str = "vit_simple"):
    """Writes config, image processor, weights and, for "vit_simple", the model's code; no model card.

    Args:
        to: "vit_simple", "timm" or "transformers".

    Raises:
        UserError: that library does not support the model or the image processor.
        RunError: the disk is full.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if to == "timm":
        content, tensors = to_timm(config, tensors, checkpoint.report)
        license = {name: value for name, value in checkpoint.inherited.items() if name == "license"}
        classes = {"num_classes": content["num_classes"]}
        content["pretrained_cfg"] = processor_to_timm(checkpoint.processor, config) | classes | license
        write_json(folder / "config.json", content)
    else:
        if to == "transformers":
            config, tensors = to_transformers(config, tensors)
        else:
            config.architectures = ["ViTSimpleForImageClassification" if "head.weight" in tensors else "ViTSimpleModel"]
            for name in CODE:
                shutil.copy(ROOT / name, folder)
        config.dtype = next(iter(tensors.values())).dtype
        config.save_pretrained(folder)
        write_json(folder / PREPROCESSOR, checkpoint.processor)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    try:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise RunError(f"OUT: the weights cannot be written: {error}") from error
    except RuntimeError as error:  # of safetensors
        raise UserError("SOURCE: expected tensors that do not overlap in memory") from error


def write_json(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
