"""Opens a plain ViT of timm or transformers, and describes it as this repository, timm or transformers has it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from ..configuration_vit_simple import ViTSimpleConfig, pair, refuse_kernels
from ..files import inherited, read_json
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

DESCRIPTION = ("config.json", "preprocessor_config.json", "processor_config.json", "README.md")
SAFETENSORS = ("model.safetensors", "model-?????-of-?????.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")
WEIGHTS = (*SAFETENSORS, "*.safetensors", *PICKLES, "*.bin", "*.pth")  # the first of these that are there


@dataclass
class Checkpoint:
    """A network as this repository has it, its image processor as JSON, and what its card inherits."""

    config: ViTSimpleConfig
    tensors: Tensors
    processor: dict
    card: dict


def find_weights(source: str) -> tuple[Path | None, list[Path]]:
    """The folder that describes a checkpoint and its files of weights; what is no path comes from the Hub.

    A file of another name than those of folders stands alone: what lies beside it may be of another checkpoint.
    """
    path = Path(source)
    if path.is_file():
        return path.parent if any(path.match(pattern) for pattern in (*SAFETENSORS, *PICKLES)) else None, [path]
    if not path.exists():
        try:
            path = Path(snapshot_download(source, allow_patterns=[*DESCRIPTION, *SAFETENSORS]))
            if not list(path.glob("*.safetensors")):
                path = Path(snapshot_download(source, allow_patterns=[*DESCRIPTION, *PICKLES]))
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a file, a folder or a repository of the Hub, got {source}: {error}") from error
    for pattern in WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) > 1 and "?" not in pattern:
            raise ValueError(f"expected one file of weights in {path}, got {join_names(file.name for file in files)}")
        if files:
            return path, files
    raise ValueError(
        f"expected a file of weights in {path}, got {join_names(sorted(file.name for file in path.iterdir()))}"
    )


def open_checkpoint(
    source: str,
    notes: list[str],
    family: str | None = None,
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
    base_model: str | None = None,
) -> Checkpoint:
    """A checkpoint of any layout; the options tell what its files do not, and `notes` gets a line for each guess.

    Raises:
        ValueError: it is no plain ViT, does not fit together, is not described well enough, or its config.json names
            attention kernels of the Hub.
    """
    folder, files = find_weights(source)
    tensors, content, processor, card = load_tensors(files), {}, {}, {}
    if folder is not None:
        content, processor = (read_json(folder / name) for name in DESCRIPTION[:2])
        refuse_kernels(content)
        processor = processor or read_json(folder / "processor_config.json").get("image_processor", {})
        card = inherited(folder)
    kind, pretrained = content.get("model_type"), content.get("pretrained_cfg") or {}
    if kind is not None and (num_attention_heads or hidden_act):
        raise ValueError("--num_attention_heads and --hidden_act: expected neither, since config.json tells both")
    if kind is None:
        config, tensors = from_timm(content, tensors, notes, num_attention_heads, hidden_act)
        card = ({"license": pretrained["license"]} if pretrained.get("license") else {}) | card
    elif kind == ViTSimpleConfig.model_type:
        config = ViTSimpleConfig.from_pretrained(folder)
        tensors = import_state_dict(tensors, {}, config)
    else:
        config, tensors = from_transformers(open_config(folder, kind), tensors, notes)

    usual = FAMILY_OF_TYPE.get(kind, "clip" if config.pre_norm else None)
    if family is None and pretrained:
        processor = processor_from_timm(pretrained, pair(config.image_size), notes)
    elif family is not None or not processor:
        if not (family or usual):
            raise ValueError(
                f"--family: expected one of {', '.join(FAMILIES)}, since no file tells how pixels are scaled"
            )
        if family is None:
            notes.append(f"took the image processor of {usual}, since no file tells of another")
        processor = family_processor(family or usual, pair(config.image_size))
    if not Path(source).exists():
        card["base_model"] = source
    if base_model is not None:
        card["base_model"] = base_model
    return Checkpoint(config, tensors, fit_processor(processor, config, notes), card)


def open_config(folder: Path, kind: str) -> PretrainedConfig:
    """The config that transformers makes of config.json."""
    check_type(kind)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def in_layout_of(checkpoint: Checkpoint, to: str, notes: list[str]) -> tuple[PretrainedConfig | dict, Tensors]:
    """Config and tensors as the library named has them.

    Raises:
        ValueError: the network or the image processor has what that library has not.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if to == "timm":
        content, tensors = to_timm(config, tensors, notes)
        licence = {name: value for name, value in checkpoint.card.items() if name == "license"}
        classes = {"num_classes": content["num_classes"]}
        return content | {
            "pretrained_cfg": processor_to_timm(checkpoint.processor, config) | classes | licence
        }, tensors
    if to == "transformers":
        config, tensors = to_transformers(config, tensors)
    else:
        config.architectures = ["ViTSimpleForImageClassification" if "head.weight" in tensors else "ViTSimpleModel"]
    config.dtype = next(iter(tensors.values())).dtype
    return config, tensors
