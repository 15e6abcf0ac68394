"""State dicts: reading them from files, renaming their keys, and refusing what is not a plain ViT."""

import argparse
import errno
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import safetensors
import torch

from ..configuration_vit_simple import ViTSimpleConfig
from ..files import RunError, UserError, is_machine_failure, weight_problem
from ..modeling_vit_simple import ViTSimpleForImageClassification, ViTSimpleModel, sincos2d

Tensors = dict[str, torch.Tensor]
KeyMap = dict[str, str | list[str]]  # our key -> theirs, see `their_keys`

MAX_ENTRIES, MAX_DEPTH = 100_000, 4  # tensors in a file of any training, and dictionaries inside of dictionaries
SAVE = "where the model can be loaded, save its weights alone: torch.save(model.state_dict(), file)"

DROPPED = {  # tensors that only pre-training needs: a pattern of their keys, and what they are
    r"pooler\.|pre_logits\.": "the tanh layer between backbone and head",
    r"(embeddings\.)?mask_token$": "the mask token",
    r"decoder[._]": "the decoder",
    r"text_model\.|text_projection\.|logit_scale$": "the text encoder",
    r"embeddings\.position_ids$": "the position ids",
    r"head\.\d+\.": "the head of several layers",
}
REFUSED = {  # other families: a pattern of model types in transformers, model names in timm, and keys; and the reason
    r"deit|.*distilled.*|dist_token|head_dist\..*": "DeiT distilled has a second prefix token with its own head",
    r"siglip.*|.*_siglip_.*|attn_pool\..*": "SigLIP pools by attention or has another activation",
    r"beit.*|data2vec.*|.*attn\.(q_bias|relative_position.*)|rel_pos_bias.*": "BEiT adds position biases to attention",
    r"swin.*|layers\.0\.blocks\..*": "Swin restricts attention to windows",
    r".*_rpn_.*": "it applies LayerNorm after each branch",
    r".*_(rope|dinov3|pe|lingbot)(_.*)?": "it has rotary position embeddings",
}


def refuse(name: str):
    """Raises UserError if a model type, model name or key belongs to another family."""
    for pattern, reason in REFUSED.items():
        if re.fullmatch(pattern, name):
            raise UserError(f"expected a plain ViT, got {name}: {reason}")


def join_names(names, limit: int = 4) -> str:
    """The first names, separated by commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def drop(tensors: Tensors, report: list[str]) -> Tensors:
    """The tensors without those that only pre-training needs, which are listed in `report`."""
    for pattern, description in DROPPED.items():
        if keys := [key for key in tensors if re.match(pattern, key)]:
            report.append(f"dropped {description}: {join_names(keys)}")
    return {key: tensor for key, tensor in tensors.items() if not re.match("|".join(DROPPED), key)}


def build_config(**fields) -> ViTSimpleConfig:
    """The config with these fields, which come from a file or from options.

    Raises:
        UserError: they are not valid together.
    """
    try:
        return ViTSimpleConfig(**fields)
    except ValueError as error:
        raise UserError(str(error)) from error


# Key maps. A map names modules or tensors of ours and theirs, such as {"blocks.*.norm1": "encoder.layer.*.norm1"};
# * stands for the number of a block. A list of theirs holds the parts of one tensor of ours, such as query, key, value.


def their_keys(key: str, key_map: dict[str, str | list[str]]) -> list[str]:
    """The keys of another library for a key of ours; keys that the map does not mention are the same in both."""
    pattern = re.sub(r"\.\d+\.", ".*.", key)
    module = next((name for name in (pattern, pattern.rpartition(".")[0]) if name in key_map), pattern)
    names = key_map.get(module, module)
    names = [name + pattern.removeprefix(module) for name in (names if isinstance(names, list) else [names])]
    block = re.search(r"\.(\d+)\.", key)
    return [name.replace("*", block[1]) for name in names] if block else names


def import_state_dict(tensors: Tensors, key_map: dict[str, str | list[str]], config: ViTSimpleConfig) -> Tensors:
    """Our tensors from those of another library; only those that are concatenated are copied.

    Raises:
        UserError: names the tensors that are missing, unknown, of another shape or dtype, or not finite.
    """
    has_head = their_keys("head.weight", key_map)[0] in tensors
    expected = expected_tensors(config, has_head, len(tensors))
    remaining, imported, problems = dict(tensors), {}, []
    for key, empty in expected.items():
        names = their_keys(key, key_map)
        parts = [remaining.pop(name, None) for name in names]
        for name, part, empty_part in zip(names, parts, empty.chunk(len(names))):
            if part is None:
                problems.append(f"{name} is missing")
            elif part.squeeze().shape != empty_part.squeeze().shape:  # some libraries omit our leading dimension
                problems.append(f"{name} has the shape {tuple(part.shape)} instead of {tuple(empty_part.shape)}")
            elif problem := weight_problem(part):
                problems.append(f"{name} {problem}")
        if not problems:
            imported[key] = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(empty.shape)
    for name in remaining:
        refuse(name)
    problems += [f"{name} is unknown" for name in remaining]
    if problems:
        raise UserError(f"expected the tensors that the config describes, but {join_names(problems)}")
    return imported


def expected_tensors(config: ViTSimpleConfig, has_head: bool, count: int) -> Tensors:
    """The tensors that a config describes, without values.

    Raises:
        UserError: they cannot be those of a file with `count` tensors, or are too large.
    """
    if config.num_hidden_layers > count:  # the model would take forever to build
        raise UserError(f"num_hidden_layers: expected at most {count}, since there are {count} tensors")
    try:
        with torch.device("meta"):
            return (ViTSimpleForImageClassification if has_head else ViTSimpleModel)(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # more elements than fit in 64 bits
        sizes = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "image_size")}
        raise UserError(f"expected the sizes of a model that can be built, got {sizes}") from error


def export_state_dict(tensors: Tensors, key_map: dict[str, str | list[str]], prefix: str) -> Tensors:
    """Our tensors under the keys of another library, with a prefix before all but those of the head."""
    exported = {}
    for key, tensor in tensors.items():
        names = their_keys(key, key_map)
        for name, part in zip(names, tensor.chunk(len(names))):
            exported[name if key.startswith("head.") else prefix + name] = part
    return exported


def with_learned_positions(config: ViTSimpleConfig, tensors: Tensors) -> tuple[ViTSimpleConfig, Tensors]:
    """The same model with fixed sine-cosine positions stored as learned ones, since other libraries only have these."""
    if config.position_embedding == "learned":
        return config, tensors
    weight = tensors["patch_embed.proj.weight"]
    positions = sincos2d(*config.grid_size, config.hidden_size, weight.device).to(weight.dtype)
    config = ViTSimpleConfig.from_dict(config.to_dict(), position_embedding="learned", no_embed_class=True)
    return config, {**tensors, "pos_embed": positions}


def move_class_position(tensors: Tensors, class_token: str, positions: str) -> dict:
    """Adds the position of the class token to the token, since we have no positions before register tokens."""
    if not {class_token, positions} <= tensors.keys():
        return {}  # import_state_dict says what is missing
    token, table = tensors[class_token], tensors[positions]
    tensors[class_token] = (token.float() + table[:, :1].float()).to(token.dtype)
    tensors[positions] = table[:, 1:].contiguous()
    return {"no_embed_class": True}


# Files


def load_tensors(files: list[Path]) -> Tensors:
    """The tensors in one or more files, memory-mapped; code in pickles is not run.

    Those of nested dictionaries have the keys joined by dots. `check_storages` says whether they can be used.

    Raises:
        UserError: a file is damaged, holds an object of a class that is not allowed, or repeats a tensor of another.
    """
    tensors: Tensors = {}
    for file in files:
        if not file.is_file():  # a FIFO or a device may never end
            raise UserError(f"{file}: expected a regular file")
        loaded = load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file)
        if repeated := tensors.keys() & loaded.keys():
            raise UserError(f"{file}: expected another shard, got {join_names(repeated)} a second time")
        tensors |= loaded
    return tensors


def load_safetensors(file: Path) -> Tensors:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: expected a complete safetensors file: {error}") from error
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error}") from error


def load_pickle(file: Path) -> Tensors:
    # DeiT, MAE and DINO save their options, which are harmless, beside the weights.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with allowed, warnings.catch_warnings(action="ignore"):  # the error says it all
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        if is_machine_failure(error) and getattr(error, "errno", None) != errno.EINVAL:  # a seek before the beginning
            raise RunError(f"{file} cannot be read: {error}") from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {code[1]}, which is not loaded; {SAVE}" if code else "it is damaged or not a checkpoint"
        if file.suffix == ".npz":
            reason = "it is a file of JAX; convert the same weights from timm or transformers"
        elif "TorchScript" in str(error):
            reason = f"it is a TorchScript archive; {SAVE}"
        raise UserError(f"{file}: expected a file of tensors: {reason}") from error
    tensors: Tensors = dict(islice(flatten(loaded), MAX_ENTRIES + 1))
    if not tensors:
        kind = type(loaded).__name__ + (" without tensors" if isinstance(loaded, Mapping) else "")
        raise UserError(f"{file}: expected a dictionary of names and tensors, got a {kind}; {SAVE}")
    if len(tensors) > MAX_ENTRIES:
        raise UserError(f"{file}: expected at most {MAX_ENTRIES:,} tensors, got more")
    return tensors


def flatten(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries, under their keys joined by dots."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif depth < MAX_DEPTH:  # a dictionary may contain itself
            yield from flatten(value, f"{prefix}{key}.", depth + 1)


def check_storages(tensors: Tensors, source: str):
    """Raises UserError if a tensor is not dense, or if tensors need many more bytes than the file has for them.

    A tensor with strides of 0, or many that share their bytes, would turn a small file into a large checkpoint.
    """
    sizes: dict[int, int] = {}
    for name, tensor in tensors.items():
        is_usual = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        if not is_usual or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise UserError(
                f"{source}: expected dense tensors, but {name} is sparse, quantized, nested or without values"
            )
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        sizes[address] = sizes.get(address, 0) + tensor.nbytes
        if tensor.nbytes > storage.nbytes() or sizes[address] > 4 * storage.nbytes():  # a few tied weights are usual
            raise UserError(
                f"{source}: {name} has {tensor.nbytes:,} bytes, but the file has {storage.nbytes():,} for it"
            )
