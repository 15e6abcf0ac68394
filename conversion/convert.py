"""Open a plain ViT of timm, transformers or this repository, and write it for one of these libraries."""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from ..configuration_vit_simple import ViTSimpleConfig, pair, refuse_kernels
from ..data.processors import names_class
from ..files import (
    ADAPTER,
    CODE,
    PREPROCESSOR,
    ROOT,
    SAFETENSORS,
    RunError,
    UserError,
    check_types,
    inherited,
    read_json,
    refuse_adapter,
)
from .processors import (
    FAMILIES,
    FAMILY_OF_TYPE,
    PROCESSOR_OF_TYPE,
    family_processor,
    fit_processor,
    override_processor,
    processor_from_timm,
    processor_output,
    processor_to_timm,
)
from .resampling import joined, source_of_timm_keys, with_image_size
from .state_dict import Tensors, check_storages, import_state_dict, join_names, load_tensors
from .timm import CONFIG_FIELDS, from_timm, to_timm
from .transformers import check_type, from_transformers, to_transformers
from .unwrap import unwrap

DESCRIPTION = ("config.json", PREPROCESSOR, "processor_config.json", "README.md", ADAPTER[0])
PICKLES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")
OTHER_PROCESSOR = f"or --family, one of {', '.join(FAMILIES)}; or --image_mean and --image_std"
OPTIONS = {  # of `open_checkpoint`
    **{name: str | None for name in ("family", "hidden_act", "base_model", "key", "interpolation")},
    **{name: list[float] | None for name in ("image_mean", "image_std")},
    "num_attention_heads": int | None,
    "crop_pct": float | None,
}
# The first pattern that matches is used.
WEIGHTS = (*SAFETENSORS, *PICKLES, *(f"*.{name}" for name in ("safetensors", "bin", "pth", "pt", "ckpt", "pth.tar")))
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+")  # Trainer writes them, too


@dataclass
class Checkpoint:
    """A model in the format of this repository.

    processor: the content of preprocessor_config.json
    inherited: license and base model, for the model card
    report: one line for everything that was dropped or assumed
    origin: library or repository, and name of the checkpoint
    source: Hub id, or the name of a folder or file
    """

    config: ViTSimpleConfig
    tensors: Tensors
    processor: dict
    inherited: dict
    report: list[str]
    origin: str = ""
    source: str = ""


# Opening


def find_weights(source: str) -> tuple[Path | None, list[Path]]:
    """The folder that describes a checkpoint, and its weight files; what is not a path is downloaded from the Hub.

    A weight file without a standard name has no folder: the files beside it may belong to another checkpoint.
    """
    path = Path(source)
    if path.is_file():
        is_described = any(path.match(pattern) for pattern in (*SAFETENSORS, *PICKLES))
        return path.parent if is_described else None, [path]
    if not path.exists():
        path = download(source)
    if not path.is_dir():
        raise UserError(f"SOURCE: expected a file or a folder, got {path}")  # a FIFO or a device
    refuse_adapter(path)
    for pattern in WEIGHTS:
        files = sorted(file for file in path.glob(pattern) if not NO_WEIGHTS.fullmatch(file.name))
        if len(files) > 1 and "?" not in pattern:
            names = join_names(file.name for file in files)
            raise UserError(f"expected one weight file in {path}, got {names}; give one of these files")
        if files:
            return path, files
    raise UserError(f"expected a weight file in {path}, got {join_names(sorted(file.name for file in path.iterdir()))}")


def download(repo_id: str) -> Path:
    """The folder with the files of a repository, without pickles if there is a safetensors file."""
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=[*DESCRIPTION, *SAFETENSORS]))
        if not any(list(folder.glob(pattern)) for pattern in SAFETENSORS):
            folder = Path(snapshot_download(repo_id, allow_patterns=[*DESCRIPTION, *PICKLES]))
    except HFValidationError as error:
        raise UserError(f"SOURCE: there is no file, folder or Hub repository {repo_id}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"SOURCE: no file or folder {repo_id}, and no Hub repository to read: {error}") from error
    except OSError as error:
        raise OSError(f"SOURCE: no file or folder {repo_id}, and it cannot be downloaded: {error}") from error
    return folder


def open_checkpoint(
    source: str,
    family: str | None = None,
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
    base_model: str | None = None,
    *,
    key: str | None = None,
    **preprocessing: Any,
) -> Checkpoint:
    """A checkpoint in any supported format; the options supply what its files do not state.

    Args:
        key: an entry of the file, if it has several models.
        preprocessing: of a training of one's own: image_mean, image_std, interpolation, crop_pct.

    Raises:
        UserError: it is not a plain ViT, its files contradict each other, or too little is known.
        OSError: the Hub cannot be reached.
    """
    folder, files = find_weights(source)
    content = read_config(folder) if folder else {}
    model_type = content.get("model_type")
    if content:
        fields = CONFIG_FIELDS if model_type is None else {"model_type": str}
        check_types(content, fields, str(folder / "config.json"))
    is_ours = model_type == ViTSimpleConfig.model_type
    if model_type is not None and (num_attention_heads or hidden_act):
        raise UserError("--num_attention_heads and --hidden_act cannot be combined with a config.json that states both")
    if not is_ours and model_type is not None:
        check_type(model_type)
    report: list[str] = []
    tensors, prefix = unwrap(load_tensors(files), key, report)
    check_storages(tensors, str(files[0] if len(files) == 1 else folder))
    metadata = read_metadata(source, folder, content, base_model)
    processor_base = base_model or (inherited(folder).get("base_model") if folder else None)
    preprocessing = {name: value for name, value in preprocessing.items() if value is not None}
    is_clip = "norm_pre.weight" in tensors or str(model_type).startswith("clip")
    make_processor = choose_processor(folder, content, family, preprocessing, is_clip, processor_base, report)
    missing = [] if make_processor else [no_processor(base_model)]

    if model_type is None:
        is_pickle, has_registers = files[0].suffix != ".safetensors", "register_tokens" in tensors
        library = "timm" if content else source_of_timm_keys(family, is_pickle, prefix, has_registers)
        config, tensors = from_timm(content, tensors, report, missing, num_attention_heads, hidden_act, library)
    elif missing:
        raise UserError("; ".join(missing))
    elif is_ours:
        library, config = "vit_simple", open_config(folder, ViTSimpleConfig)
        tensors = import_state_dict(tensors, {}, config)
    else:
        library = "transformers"
        config, tensors = from_transformers(open_config(folder), tensors, report)

    processor = make_processor(pair(config.image_size))
    if not is_ours:
        config = with_image_size(config, processor_output(processor), report)
    processor = override_processor(fit_processor(processor, config, report), preprocessing)
    name = Path(source).resolve().name if Path(source).exists() else source
    return Checkpoint(config, tensors, processor, metadata, report, f"{library} {timm_name(content) or name}", name)


def read_metadata(source: str, folder: Path | None, content: dict, base_model: str | None) -> dict:
    """License and base model, as far as the files, the source's name and the user state them."""
    metadata = inherited(folder) if folder else {}
    if license := (content.get("pretrained_cfg") or {}).get("license"):
        metadata = {"license": license} | metadata
    if base_model is not None:
        return metadata | {"base_model": base_model}
    if folder and not Path(source).exists():
        metadata |= {"base_model": source, "base_model_revision": folder.name}  # of a snapshot: its commit
    return metadata


def timm_name(content: dict) -> str:
    """timm's name of a model, such as vit_base_patch16_224.mae; "" for other models."""
    architecture, tag = content.get("architecture") or "", (content.get("pretrained_cfg") or {}).get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture


def read_config(folder: Path) -> dict:
    """The content of config.json, {} if there is none.

    Raises:
        UserError: it is damaged, or names attention kernels of the Hub.
    """
    content = read_json(folder / "config.json")
    if content.get("model_type") == "timm_wrapper":  # of transformers: the other fields and the model are timm's
        del content["model_type"]
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


def choose_processor(
    folder: Path | None,
    content: dict,
    family: str | None,
    preprocessing: dict,
    is_clip: bool,
    base_model: Any,
    report: list[str],
) -> Callable[[tuple[int, int]], dict] | None:
    """The image processor for an image size: of the family that the user names, of the folder, of the base model, as
    the user describes it, or of the usual family; None if nothing says which.
    """
    if family is not None:
        return partial(family_processor, family)
    if pretrained := content.get("pretrained_cfg"):
        return partial(processor_from_timm, pretrained, report=report)
    if folder and (stored := read_processor(folder)):
        return lambda _: stored
    if of_base := processor_of_base(base_model, report):
        return of_base
    if {"image_mean", "image_std"} <= preprocessing.keys():
        defaults = {"interpolation": "bicubic", "crop_pct": 0.875}
        if assumed := {name: value for name, value in defaults.items() if name not in preprocessing}:
            report.append(f"assumed {joined(assumed)}, the default of timm")
        cfg = {"mean": preprocessing["image_mean"], "std": preprocessing["image_std"], **defaults}
        return partial(processor_from_timm, cfg, report=report)
    if family := FAMILY_OF_TYPE.get(content.get("model_type"), "clip" if is_clip else None):
        report.append(f"assumed the image processor of {family}, because the checkpoint has none")
        return partial(family_processor, family)
    return None


def no_processor(base_model: str | None) -> str:
    """What to do if nothing says how images are preprocessed."""
    if base_model is None:
        advice = "give --base_model, to take the image processor of that model"
    else:
        advice = f"--base_model {base_model} has none either or cannot be reached; give another one"
    return f"the checkpoint has no image processor: {advice}; {OTHER_PROCESSOR}"


def processor_of_base(base_model: Any, report: list[str]) -> Callable[[tuple[int, int]], dict] | None:
    """The image processor of the base model for an image size; None if it has none or cannot be read."""
    if isinstance(base_model, list) and len(base_model) == 1:
        (base_model,) = base_model
    if not isinstance(base_model, str):
        return None
    optional = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
    try:
        files = [cached_file(base_model, name, **optional) for name in (PREPROCESSOR, "config.json")]
        files += [] if files[0] else [cached_file(base_model, "processor_config.json", **optional)]
    except (OSError, ValueError):  # not found, no access, no name of a repository
        return None
    folder = next((Path(file).parent for file in files if file), None)
    if folder is None:
        return None
    line = f"took the image processor of the base model, {base_model}, because the checkpoint has none"
    if stored := read_processor(folder):
        report.append(line)
        return lambda _: stored
    cfg = read_json(folder / "config.json", {"pretrained_cfg": CONFIG_FIELDS["pretrained_cfg"]}).get("pretrained_cfg")
    if not cfg:
        return None
    report.append(line)
    return partial(processor_from_timm, cfg, report=report)


def read_processor(folder: Path) -> dict:
    """The image processor of a folder, {} if it has none. If its file names no class, `model_type` decides."""
    combined = read_json(folder / "processor_config.json").get("image_processor")
    processor = read_json(folder / PREPROCESSOR) or combined or {}
    if name := processor.get("image_processor_type"):  # ViTFeatureExtractor: the name until transformers 5
        return processor | {"image_processor_type": str(name).replace("FeatureExtractor", "ImageProcessor")}
    if not processor or names_class(processor):
        return processor
    model_type = str(read_json(folder / "config.json").get("model_type"))
    return processor | {"image_processor_type": PROCESSOR_OF_TYPE.get(model_type)}


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
            config, tensors = to_transformers(config, tensors, checkpoint.report)
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
