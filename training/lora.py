"""LoRA through PEFT: low-rank additions to frozen weights (Hu et al., 2021, arXiv:2106.09685).

A weight W (out, in) becomes W + B A, where A is (rank, in), and B is (out, rank) and starts at zero. As in section 4.2
of the paper, attention is adapted and the MLP is not: `qkv` and `proj` of each block. The head is trained as a whole.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..configuration_vit_simple import ViTSimpleConfig
from ..conversion.convert import Checkpoint
from ..files import ADAPTER, UserError, read_json
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .config import TrainConfig

TARGETS = ["attn.qkv", "attn.proj"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER
BASE, A, B = ".base_layer", ".lora_A.default", ".lora_B.default"  # what PEFT inserts into the names of parameters


def check_lora(config: TrainConfig, base: Checkpoint | None):
    """Raises UserError if --lora_rank does not suit the checkpoint, or PEFT is not installed."""
    if config.lora_rank is None or config.eval_only:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora_rank: expected peft to be installed: pip install peft")
    if config.lora_rank > base.config.hidden_size:
        raise UserError(
            f"--lora_rank: expected at most {base.config.hidden_size}, the width of the model, got {config.lora_rank}"
        )
    if config.lora_save == "adapter" and not base.origin.startswith("vit_simple "):
        raise UserError(
            f"--lora_save adapter needs a checkpoint of vit_simple, to which PEFT can add it, got {base.origin}: "
            "convert it with convert_checkpoint.py first, or use --lora_save merged"
        )


def lora_config(rank: int, **options):
    """PEFT's config; `lora_alpha` is the rank, so that the additions are not scaled."""
    from peft import LoraConfig  # an optional package

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, **options)


def add_lora(model: ViTSimpleForImageClassification, rank: int):
    """Adds the low-rank weights in place, and freezes all others but the head's."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(rank), model)
    model.head.requires_grad_(True)


def merge_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a plain model that computes the same; weights without LoRA stay as they are.

    The parameters themselves do not change, so that training can continue with the same bits.
    """
    merged = {name.replace(BASE, ""): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name in weights:
        if name.endswith(f"{B}.weight"):
            layer = name.removesuffix(f"{B}.weight")
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + weights[name] @ weights[f"{layer}{A}.weight"]
    return merged


def save_adapter(
    model: ViTSimpleForImageClassification, weights: dict[str, torch.Tensor], base_model: str, folder: Path
):
    """Writes the low-rank weights and the head as PEFT reads them, and the config and code of the adapted model."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    (rank,) = {len(tensor) for name, tensor in weights.items() if f"{A}." in name}
    options = {"modules_to_save": ["head"], "base_model_name_or_path": base_model, "inference_mode": True}
    lora_config(rank, **options).save_pretrained(folder)
    adapter = {
        f"base_model.model.{name.replace('.default', '')}": tensor.contiguous().cpu()
        for name, tensor in weights.items()
        if ".lora_" in name or name.startswith("head.")
    }
    save_file(adapter, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def adapter_base(folder: Path) -> str:
    """The checkpoint that the adapter in a folder belongs to."""
    return read_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": str})["base_model_name_or_path"]


def loading_code(adapter: str, base_model: str) -> str:
    """Python that loads an adapter: its config says the labels and the image size, which may not be the base's."""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForImageClassification\n\n"
        f"config = AutoConfig.from_pretrained({json.dumps(adapter, ensure_ascii=False)}, trust_remote_code=True)\n"
        f"base_model = {json.dumps(base_model, ensure_ascii=False)}\n"
        "base = AutoModelForImageClassification.from_pretrained(base_model, config=config, trust_remote_code=True)\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(adapter, ensure_ascii=False)}).merge_and_unload()"
    )


def load_merged(folder: Path) -> ViTSimpleForImageClassification:
    """The model of a folder that `save_adapter` wrote, in float32, with the adapter merged into its weights."""
    from peft import PeftModel

    config = ViTSimpleConfig.from_pretrained(folder)
    base = ViTSimpleForImageClassification.from_pretrained(adapter_base(folder), config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).merge_and_unload()
