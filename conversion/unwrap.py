"""What training programs wrap around the weights of a model: entries of a checkpoint, and prefixes of keys."""

import re
from collections import Counter

from ..files import UserError
from .state_dict import Tensors, join_names

# Modules that wrap others inside of a model: torch.compile, FSDP, activation checkpointing.
INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The patch projection of timm and of transformers, whose keys have a prefix of their own. What precedes it is not part
# of the model's keys.
ANCHOR = re.compile(
    r"(?:^|(?<=\.))(patch_embed\.proj\.weight"
    r"|(?:(?:vit|dinov2|dinov2_with_registers)\.)?embeddings\.patch_embeddings\.projection\.weight"
    r"|(?:vision_model\.)?embeddings\.patch_embedding\.weight)$"
)
# Where a file holds several models: the teacher of DINO, and timm's order, which prefers averaged weights.
PREFERRED = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model")
CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")  # DINOv2 trains with its blocks in chunks


def unwrap(tensors: Tensors, key: str | None, report: list[str]) -> tuple[Tensors, str]:
    """The tensors of one model under the keys of that model, and the prefix that they had.

    Args:
        key: an entry of the file or a part of the prefix, which says which of several models; None: the usual one.
        report: gets a line if a prefix is removed.

    Raises:
        UserError: `key` or the prefixes do not determine one model.
    """
    renamed = {INNER.sub("", name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError("expected the weights of one model, got some keys both with and without _orig_mod")
    prefixes = [name[: found.start()] for name in renamed if (found := ANCHOR.search(name))]
    prefix = choose(prefixes, key)
    chosen = {name.removeprefix(prefix): tensor for name, tensor in renamed.items() if name.startswith(prefix)}
    if any(map(CHUNK.match, chosen)):
        chosen = {CHUNK.sub(r"blocks.\1", name): tensor for name, tensor in chosen.items()}
    if prefix or renamed.keys() != tensors.keys():
        others = Counter(group(name, prefix) for name in renamed if not name.startswith(prefix))
        left_out = join_names(f"{name} ({count})" for name, count in others.items())
        inner = sorted({found[1] for name in tensors for found in INNER.finditer(name)})
        removed = " and ".join([*([prefix.rstrip(".")] if prefix else []), *inner])
        report.append(
            f"took {len(chosen)} of {len(tensors)} tensors and removed the prefix {removed}"
            + (f"; left out {left_out}" if others else "")
        )
    return chosen, prefix


def choose(prefixes: list[str], key: str | None) -> str:
    """The prefix that contains `key`, or the usual one of several."""
    matching = [prefix for prefix in prefixes if key is None or f".{key}." in f".{prefix}"]
    if key is not None and not matching:
        found = join_names(prefix.rstrip(".") or "no prefix" for prefix in prefixes) or "no model"
        raise UserError(f"--key: expected a part of a prefix in the file, got {key}; the file has {found}")

    def rank(prefix: str) -> int:
        return min([PREFERRED.index(part) for part in prefix.split(".") if part in PREFERRED], default=len(PREFERRED))

    best = min(map(rank, matching), default=0)
    matching = [prefix for prefix in matching if rank(prefix) == best] or [""]
    if len(matching) > 1:
        names = join_names(prefix.rstrip(".") or "no prefix" for prefix in matching)
        raise UserError(f"--key is required, because the file has several models: {names}")
    return matching[0]


def group(name: str, prefix: str) -> str:
    """The beginning of a key, up to the first part that the prefix does not have."""
    parts, taken = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, taken)) if a != b), 0)
    return ".".join(parts[: shared + 1])
