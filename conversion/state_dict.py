"""What the layouts of timm and transformers have in common: names of tensors, and what is no plain ViT."""

import pickle
import re
import zipfile
from pathlib import Path

import safetensors
import torch

from ..configuration_vit_simple import ViTSimpleConfig
from ..modeling_vit_simple import ViTSimpleForImageClassification, ViTSimpleModel, sincos2d

Tensors = dict[str, torch.Tensor]

DROPPED = {  # remains of pre-training
    r"pooler\.|pre_logits\.": "the tanh layer between backbone and head",
    r"(embeddings\.)?mask_token$": "the token of masked patches",
    r"decoder[._]": "the decoder",
    r"text_model\.|text_projection\.|logit_scale$": "the text tower",
    r"embeddings\.position_ids$": "a table that counts",
}
REFUSED = {  # model types of transformers, words in timm's names, tensors in timm's files
    r"deit|.*distilled.*|dist_token|head_dist\..*": "DeiT distilled, whose second prefix token has a head of its own",
    r"siglip.*|.*_siglip_.*|attn_pool\..*": "SigLIP, which pools by attention or has another activation",
    r"beit.*|data2vec.*|.*attn\.(q_bias|relative_position.*)|rel_pos_bias.*": "BEiT, whose positions bias attention",
    r"swin.*|layers\.0\.blocks\..*": "Swin, whose attention stays in windows",
    r".*_rpn_.*": "a ViT with LayerNorm behind the branches",
    r".*_(rope|dinov3|pe|lingbot)(_.*)?": "a ViT with rotary positions",
}


def refuse(name: str):
    """Raises ValueError for what belongs to a family that this network is not."""
    for pattern, family in REFUSED.items():
        if re.fullmatch(pattern, name):
            raise ValueError(f"expected a plain ViT, got {name}: {family}")


def join_names(names, most: int = 4) -> str:
    """Names in a line, the first of them where there are many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def drop(tensors: Tensors, notes: list[str]) -> Tensors:
    """The tensors without what pre-training left behind, of which `notes` tells."""
    for pattern, what in DROPPED.items():
        found = [name for name in tensors if re.match(pattern, name)]
        if found:
            notes.append(f"dropped {what}: {join_names(found)}")
    return {name: tensor for name, tensor in tensors.items() if not re.match("|".join(DROPPED), name)}


def their_keys(name: str, names: dict) -> list[str]:
    """What a layout calls one of our tensors."""
    number = re.search(r"\.(\d+)\.", name)
    known = re.sub(r"\.\d+\.", ".*.", name)
    module = next((key for key in (known, known.rpartition(".")[0]) if key in names), known)
    theirs = names.get(module, module)
    found = [one + known.removeprefix(module) for one in (theirs if isinstance(theirs, list) else [theirs])]
    return [one.replace("*", number[1]) for one in found] if number else found


def import_state_dict(tensors: Tensors, names: dict, config: ViTSimpleConfig) -> Tensors:
    """Our tensors from those of a layout; what needs no joining stays where it is in memory.

    Raises:
        ValueError: names the tensors that are missing, not known or of another shape.
    """
    network = ViTSimpleForImageClassification if their_keys("head.weight", names)[0] in tensors else ViTSimpleModel
    with torch.device("meta"):
        expected = network(config).state_dict()
    rest, ours, wrong = dict(tensors), {}, []
    for name, room in expected.items():
        others = their_keys(name, names)
        parts = [rest.pop(other, None) for other in others]
        for other, part, share in zip(others, parts, room.chunk(len(others))):
            if part is None:
                wrong.append(f"{other} is missing")
            elif part.squeeze().shape != share.squeeze().shape:  # some tables lack our leading dimension
                wrong.append(f"{other} has the shape {tuple(part.shape)} and not {tuple(share.shape)}")
        if not wrong:
            ours[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(room.shape)
    for name in rest:
        refuse(name)
    wrong += [f"{name} is not known" for name in rest]
    if wrong:
        raise ValueError(f"expected the tensors that the config describes, but {join_names(wrong)}")
    return ours


def export_state_dict(tensors: Tensors, names: dict, prefix: str) -> Tensors:
    """Our tensors under a layout's names, all but the head behind the prefix."""
    theirs = {}
    for name, tensor in tensors.items():
        others = their_keys(name, names)
        for other, part in zip(others, tensor.chunk(len(others))):
            theirs[other if name.startswith("head.") else prefix + other] = part
    return theirs


def with_learned_positions(config: ViTSimpleConfig, tensors: Tensors) -> tuple[ViTSimpleConfig, Tensors]:
    """The same network with its fixed positions, if it has such, as a table of the patches."""
    if config.position_embedding == "learned":
        return config, tensors
    kernel = tensors["patch_embed.proj.weight"]
    table = sincos2d(*config.grid_size, config.hidden_size, kernel.device).to(kernel.dtype)
    config = ViTSimpleConfig.from_dict(config.to_dict(), position_embedding="learned", no_embed_class=True)
    return config, {**tensors, "pos_embed": table}


def load_tensors(files: list[Path]) -> Tensors:
    """The tensors of files, in the memory of the files themselves; no pickle is run."""
    tensors = {}
    for file in files:
        found = load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file)
        if both := tensors.keys() & found.keys():
            raise ValueError(f"{file}: expected another part of a checkpoint, got {join_names(both)} a second time")
        tensors |= found
    return tensors


def load_safetensors(file: Path) -> Tensors:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: expected a whole file of safetensors: {error}") from error


def load_pickle(file: Path) -> Tensors:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"there is {code[1]} in it, which is not loaded" if code else "it is damaged or something else"
        raise ValueError(f"{file}: expected a file of nothing but tensors: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    entries = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in entries):
        raise ValueError(f"{file}: expected names and tensors, got {type(loaded).__name__} with other things in it")
    return dict(loaded)
