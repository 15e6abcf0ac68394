"""Plain ViTs as transformers writes them: their names and configs, and the way between them and ours.

The names are those of files: transformers 5 has others in memory, but not in what it saves.
"""

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..configuration_vit_simple import OWN_FIELDS, ViTSimpleConfig, label_maps, pair
from .state_dict import Tensors, drop, export_state_dict, import_state_dict, join_names, refuse, with_learned_positions

# Our names and theirs; * is a block's number, and a list is what follows each other in one tensor of ours.
VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.*.norm1": "encoder.layer.*.layernorm_before",
    "blocks.*.attn.qkv": [f"encoder.layer.*.attention.attention.{part}" for part in ("query", "key", "value")],
    "blocks.*.attn.proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.norm2": "encoder.layer.*.layernorm_after",
    "blocks.*.mlp.fc1": "encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.fc2": "encoder.layer.*.output.dense",
    "norm": "layernorm",
    "head": "classifier",
}
DINOV2 = VIT | {
    "reg_token": "embeddings.register_tokens",
    "blocks.*.norm1": "encoder.layer.*.norm1",
    "blocks.*.ls1.gamma": "encoder.layer.*.layer_scale1.lambda1",
    "blocks.*.norm2": "encoder.layer.*.norm2",
    "blocks.*.mlp.fc1": "encoder.layer.*.mlp.fc1",
    "blocks.*.mlp.fc2": "encoder.layer.*.mlp.fc2",
    "blocks.*.ls2.gamma": "encoder.layer.*.layer_scale2.lambda1",
}
DINOV2_GIANT = DINOV2 | {
    "blocks.*.mlp.fc1": "encoder.layer.*.mlp.weights_in",
    "blocks.*.mlp.fc2": "encoder.layer.*.mlp.weights_out",
}
CLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "blocks.*.norm1": "encoder.layers.*.layer_norm1",
    "blocks.*.attn.qkv": [f"encoder.layers.*.self_attn.{part}_proj" for part in "qkv"],
    "blocks.*.attn.proj": "encoder.layers.*.self_attn.out_proj",
    "blocks.*.norm2": "encoder.layers.*.layer_norm2",
    "blocks.*.mlp.fc1": "encoder.layers.*.mlp.fc1",
    "blocks.*.mlp.fc2": "encoder.layers.*.mlp.fc2",
    "norm": "post_layernorm",
    "head": "visual_projection",
}
READ = {  # model_type: names, and the prefix of all but a head
    "vit": (VIT, "vit."),
    "vit_mae": (VIT, "vit."),
    "dinov2": (DINOV2, "dinov2."),
    "dinov2_with_registers": (DINOV2, "dinov2_with_registers."),
    "clip": (CLIP, "vision_model."),
    "clip_vision_model": (CLIP, "vision_model."),
}
DINOV2_SWITCHES = ("no_embed_class", "layerscale_value", "mlp", "pooling")
WRITTEN = {  # the classes without and with a head, and the switches in which they may differ from a plain network
    "vit": ("ViTModel", "ViTForImageClassification", ("no_embed_class",)),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", DINOV2_SWITCHES),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        (*DINOV2_SWITCHES, "num_register_tokens"),
    ),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection", ("pre_norm",)),
}
PLAIN = {
    "use_class_token": True,
    "pooling": "cls",
    "fc_norm": False,
    "num_register_tokens": 0,
    "no_embed_class": False,
    "pre_norm": False,
    "mlp": "mlp",
    "layerscale_value": None,
}


def check_type(kind: str):
    """Raises ValueError for a model_type that is no plain ViT's."""
    refuse(kind)
    if kind not in READ:
        raise ValueError(f"expected a plain ViT of the types {', '.join(READ)}, got {kind}")


def from_transformers(theirs: PretrainedConfig, tensors: Tensors, notes: list[str]) -> tuple[ViTSimpleConfig, Tensors]:
    """Config and tensors of ours from those of transformers; `notes` gets a line for all that is left out.

    Raises:
        ValueError: another family, or tensors that the config does not describe.
    """
    kind, vision = theirs.model_type, getattr(theirs, "vision_config", theirs)
    check_type(kind)
    names, prefix = READ[kind]
    tensors = drop({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, notes)
    fields = {name: getattr(vision, name) for name in OWN_FIELDS if hasattr(vision, name)}
    if names is CLIP:
        fields |= {"pre_norm": True, "attention_probs_dropout_prob": vision.attention_dropout}
        fields |= read_projection(tensors, notes)
    if names is DINOV2:
        fields |= {"intermediate_size": dinov2_width(vision.hidden_size, vision.mlp_ratio, vision.use_swiglu_ffn)}
        if vision.use_swiglu_ffn:
            names, fields = DINOV2_GIANT, fields | {"mlp": "swiglu", "hidden_act": "silu"}
        fields |= read_halves(tensors, notes)
    if kind == "dinov2_with_registers" and {names["cls_token"], names["pos_embed"]} <= tensors.keys():
        table = tensors[names["pos_embed"]]
        token = tensors[names["cls_token"]]
        tensors[names["cls_token"]] = (token.float() + table[:, :1].float()).to(token.dtype)
        tensors[names["pos_embed"]] = table[:, 1:].contiguous()
        fields["no_embed_class"] = True
    if "classifier.weight" in tensors:
        fields |= {"id2label": theirs.id2label, "label2id": theirs.label2id, "problem_type": theirs.problem_type}
    config = ViTSimpleConfig(**fields)
    return config, import_state_dict(tensors, names, config)


def read_projection(tensors: Tensors, notes: list[str]) -> dict:
    """The fields for CLIP's head, a projection without a bias; a head of another class is taken out."""
    drop_head(tensors, notes, "on the mean of patches that no LayerNorm has seen")
    if "visual_projection.weight" not in tensors:
        return {}
    features = len(tensors["visual_projection.weight"])
    tensors["visual_projection.bias"] = tensors["visual_projection.weight"].new_zeros(features)
    notes.append(f"the head is CLIP's projection to {features} features, which are no classes")
    names = [f"feature {number}" for number in range(features)]
    return label_maps(names)


def read_halves(tensors: Tensors, notes: list[str]) -> dict:
    """The fields for DINOv2's head, whose kernel has a half for the class token and one for the mean of the patches."""
    if "classifier.weight" not in tensors:
        return {}
    halves = dict(zip(("cls", "mean"), tensors["classifier.weight"].chunk(2, dim=1)))
    used = [pooling for pooling, half in halves.items() if half.any()] or ["cls"]
    if len(used) != 1:
        drop_head(tensors, notes, "on class token and mean of the patches together")
        return {}
    tensors["classifier.weight"] = halves[used[0]].contiguous()
    return {"pooling": used[0]}


def drop_head(tensors: Tensors, notes: list[str], what: str):
    found = [name for name in tensors if name.startswith("classifier.")]
    if found:
        notes.append(f"dropped a head {what}, which this network does not have: {join_names(found)}")
    for name in found:
        del tensors[name]


def dinov2_width(hidden_size: int, mlp_ratio: int, swiglu: bool) -> int:
    """The hidden width of DINOv2's MLP, with a gate that behind it (DINOv2's code rounds it up to a multiple of 8)."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


def to_transformers(config: ViTSimpleConfig, tensors: Tensors) -> tuple[PretrainedConfig, Tensors]:
    """Config and tensors of transformers from those of ours.

    Raises:
        ValueError: names what no network of transformers has.
    """
    config, tensors = with_learned_positions(config, tensors)
    if config.pre_norm:
        kind = "clip_vision_model"
    elif config.layerscale_value is None:
        kind = "vit"
    else:
        kind = "dinov2_with_registers" if config.num_register_tokens else "dinov2"
    (names, prefix), (backbone, classifier, switches) = READ[kind], WRITTEN[kind]
    has_head = "head.weight" in tensors
    their_class = CONFIG_MAPPING[kind]
    fields = {name: getattr(config, name) for name in OWN_FIELDS if hasattr(their_class(), name)}
    held = {name: getattr(config, name) == PLAIN[name] for name in PLAIN if name not in switches}
    if kind == "dinov2_with_registers":
        held["no_embed_class"] = config.no_embed_class
    if kind.startswith("dinov2"):
        swiglu = config.mlp == "swiglu"
        ratios = {dinov2_width(config.hidden_size, ratio, swiglu): ratio for ratio in range(1, 17)}
        held["intermediate_size"] = config.intermediate_size in ratios
        fields |= {"mlp_ratio": ratios.get(config.intermediate_size), "use_swiglu_ffn": swiglu}
        names = DINOV2_GIANT if swiglu else DINOV2
    if kind == "clip_vision_model":
        fields |= {"attention_dropout": config.attention_probs_dropout_prob}
        held |= {"qkv_bias": config.qkv_bias}
    if kind != "vit":  # the others take the square root of the number of patches
        held |= {name: len(set(pair(getattr(config, name)))) == 1 for name in ("image_size", "patch_size")}
    if not all(held.values()):
        other = [f"{name}={getattr(config, name)!r}" for name, fits in held.items() if not fits]
        raise ValueError(f"--to transformers: expected what {backbone} can hold, got {', '.join(other)}")

    tensors = dict(tensors)
    if config.no_embed_class:
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    if kind == "clip_vision_model":
        tensors |= {"cls_token": tensors["cls_token"].flatten(), "pos_embed": tensors["pos_embed"][0]}
        if has_head and tensors.pop("head.bias").any():
            raise ValueError(f"--to transformers: expected what {classifier} can hold, got a bias, head.bias")
        fields |= {"projection_dim": config.num_labels} if has_head else {}
    elif has_head:
        labels = ("id2label", "label2id", "problem_type")
        fields |= {name: getattr(config, name) for name in labels}
    if kind.startswith("dinov2") and has_head:
        kernel = tensors["head.weight"]
        halves = [kernel if part == config.pooling else torch.zeros_like(kernel) for part in ("cls", "mean")]
        tensors["head.weight"] = torch.cat(halves, dim=1)
    theirs = export_state_dict(tensors, names, prefix if has_head or kind == "clip_vision_model" else "")
    if kind.startswith("dinov2"):
        theirs[f"{prefix if has_head else ''}embeddings.mask_token"] = tensors["cls_token"].new_zeros(
            1, config.hidden_size
        )
    return their_class(**fields, architectures=[classifier if has_head else backbone]), theirs
