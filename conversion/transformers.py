"""Plain ViTs of transformers: their configs and tensors from and to ours.

The keys are those of saved files; transformers 5 renames some of them in memory.
"""

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..configuration_vit_simple import OWN_FIELDS, ViTSimpleConfig, label_maps, pair
from ..files import UserError
from .resampling import RESAMPLING, keep_resampling, with_positions_of_image_size
from .state_dict import (
    KeyMap,
    Tensors,
    build_config,
    drop,
    export_state_dict,
    import_state_dict,
    join_names,
    move_class_position,
    refuse,
    their_keys,
    with_learned_positions,
)

# Key maps, as `their_keys` reads them.
VIT: KeyMap = {
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
CLIP: KeyMap = {
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
KEY_MAPS = {  # by model_type: the key map, and the prefix of all keys but those of the head
    "vit": (VIT, "vit."),
    "vit_mae": (VIT, "vit."),
    "dinov2": (DINOV2, "dinov2."),
    "dinov2_with_registers": (DINOV2, "dinov2_with_registers."),
    "clip": (CLIP, "vision_model."),
    "clip_vision_model": (CLIP, "vision_model."),
}
PLAIN = {  # the switches of our config, and their values in a ViT without any extras
    "use_class_token": True,
    "pooling": "cls",
    "fc_norm": False,
    "num_register_tokens": 0,
    "no_embed_class": False,
    "pre_norm": False,
    "mlp": "mlp",
    "layerscale_value": None,
}
DINOV2_SWITCHES = ("no_embed_class", "layerscale_value", "mlp", "pooling")
TARGETS = {  # by model_type: the classes without and with a head, and the switches that need not have the plain value
    "vit": ("ViTModel", "ViTForImageClassification", ("no_embed_class",)),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", DINOV2_SWITCHES),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        (*DINOV2_SWITCHES, "num_register_tokens"),
    ),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection", ("pre_norm",)),
}


# From transformers


def check_type(model_type: str):
    """Raises UserError if a model type is not a plain ViT."""
    refuse(model_type)
    if model_type not in KEY_MAPS:
        raise UserError(f"model_type: expected a plain ViT ({', '.join(KEY_MAPS)}), got {model_type}")


def from_transformers(config: PretrainedConfig, tensors: Tensors, report: list[str]) -> tuple[ViTSimpleConfig, Tensors]:
    """Our config and tensors from those of transformers; `report` gets a line for everything that is dropped.

    Raises:
        UserError: another family, or tensors that contradict the config.
    """
    model_type, vision = config.model_type, getattr(config, "vision_config", config)
    check_type(model_type)
    key_map, prefix = KEY_MAPS[model_type]
    tensors = drop({key.removeprefix(prefix): tensor for key, tensor in tensors.items()}, report)
    fields = RESAMPLING[model_type] | {name: getattr(vision, name) for name in OWN_FIELDS if hasattr(vision, name)}
    if key_map is CLIP:
        fields |= {"pre_norm": True, "attention_probs_dropout_prob": vision.attention_dropout}
        fields |= read_clip_projection(tensors, report)
    if key_map is DINOV2:
        fields |= {"intermediate_size": dinov2_width(vision.hidden_size, vision.mlp_ratio, vision.use_swiglu_ffn)}
        if vision.use_swiglu_ffn:
            key_map, fields = DINOV2_GIANT, fields | {"mlp": "swiglu", "hidden_act": "silu"}
        fields |= read_dinov2_head(tensors, report)
    if model_type == "dinov2_with_registers":
        fields |= move_class_position(tensors, *their_keys("cls_token", key_map), *their_keys("pos_embed", key_map))
    if "classifier.weight" in tensors:
        fields |= {"id2label": config.id2label, "problem_type": config.problem_type}
    our_config = build_config(**fields)
    return our_config, import_state_dict(tensors, key_map, our_config)


def read_clip_projection(tensors: Tensors, report: list[str]) -> dict:
    """The fields for CLIP's projection, which becomes a head with a bias of zeros; any other head is dropped."""
    drop_head(tensors, report, "on the mean of the patches without LayerNorm")
    if "visual_projection.weight" not in tensors:
        return {}
    features = len(tensors["visual_projection.weight"])
    tensors["visual_projection.bias"] = tensors["visual_projection.weight"].new_zeros(features)
    report.append(f"the head is CLIP's projection: its {features} outputs are features, not classes")
    names = [f"feature {number}" for number in range(features)]
    return label_maps(names)


def read_dinov2_head(tensors: Tensors, report: list[str]) -> dict:
    """The pooling for DINOv2's head, which reads the class token beside the mean of the patches.

    If one half of its weight is zero, the other half is our head; else the head is dropped.
    """
    if "classifier.weight" not in tensors:
        return {}
    halves = dict(zip(("cls", "mean"), tensors["classifier.weight"].chunk(2, dim=1)))
    used = [pooling for pooling, half in halves.items() if half.any()] or ["cls"]
    if len(used) != 1:
        drop_head(tensors, report, "on the class token and the mean of the patches together")
        return {}
    tensors["classifier.weight"] = halves[used[0]].contiguous()
    return {"pooling": used[0]}


def drop_head(tensors: Tensors, report: list[str], description: str):
    keys = [key for key in tensors if key.startswith("classifier.")]
    if keys:
        report.append(f"dropped a head {description}, which ViTSimple does not support: {join_names(keys)}")
    for key in keys:
        del tensors[key]


def dinov2_width(hidden_size: int, mlp_ratio: int, swiglu: bool) -> int:
    """The hidden width of DINOv2's MLP; for SwiGLU, two thirds of it, rounded up to a multiple of 8."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


# To transformers


def to_transformers(config: ViTSimpleConfig, tensors: Tensors, report: list[str]) -> tuple[PretrainedConfig, Tensors]:
    """Config and tensors of transformers from ours; `report` gets a line for everything that changes.

    Raises:
        UserError: names the fields that no model of transformers supports.
    """
    config, tensors = with_learned_positions(config, tensors)
    model_type, has_head = target_type(config), "head.weight" in tensors
    resampling = keep_resampling(config, model_type, report)
    if model_type.startswith("dinov2") and not resampling:  # these classes resample for any size, as we do
        native = config.pretrain_image_size or config.image_size
        config = ViTSimpleConfig.from_dict(config.to_dict(), image_size=native)
    config, tensors = with_positions_of_image_size(config, tensors, report)
    check_supported(config, model_type)
    (key_map, prefix), (backbone, classifier, _) = KEY_MAPS[model_type], TARGETS[model_type]
    if model_type.startswith("dinov2") and config.mlp == "swiglu":
        key_map = DINOV2_GIANT
    if not has_head and model_type != "clip_vision_model":
        prefix = ""
    tensors = dict(tensors)
    if config.no_embed_class:
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    if model_type == "clip_vision_model":
        tensors |= {"cls_token": tensors["cls_token"].flatten(), "pos_embed": tensors["pos_embed"][0]}
        if has_head and tensors.pop("head.bias").any():
            raise UserError(f"--to transformers: {classifier} does not support head.bias")
    if model_type.startswith("dinov2") and has_head:  # its head reads class token and mean of the patches side by side
        weight = tensors["head.weight"]
        halves = [weight if pooling == config.pooling else torch.zeros_like(weight) for pooling in ("cls", "mean")]
        tensors["head.weight"] = torch.cat(halves, dim=1)
    exported = export_state_dict(tensors, key_map, prefix)
    if model_type.startswith("dinov2"):
        exported[f"{prefix}embeddings.mask_token"] = tensors["cls_token"].new_zeros(1, config.hidden_size)
    fields = target_fields(config, model_type, has_head) | resampling
    return CONFIG_MAPPING[model_type](**fields, architectures=[classifier if has_head else backbone]), exported


def target_type(config: ViTSimpleConfig) -> str:
    """The model type of transformers that comes closest."""
    if config.pre_norm:
        return "clip_vision_model"
    if config.layerscale_value is None:
        return "vit"
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def check_supported(config: ViTSimpleConfig, model_type: str):
    """Raises UserError if a model type of transformers does not support a field of ours."""
    backbone, _, switches = TARGETS[model_type]
    supported = {name: getattr(config, name) == PLAIN[name] for name in PLAIN if name not in switches}
    if model_type == "dinov2_with_registers":
        supported["no_embed_class"] = config.no_embed_class
    if model_type.startswith("dinov2"):
        supported["intermediate_size"] = dinov2_ratio(config) is not None
    if model_type == "clip_vision_model":
        supported["qkv_bias"] = config.qkv_bias
    if model_type != "vit":  # the others take the square root of the number of patches
        supported |= {name: len(set(pair(getattr(config, name)))) == 1 for name in ("image_size", "patch_size")}
    if not all(supported.values()):
        fields = [f"{name}={getattr(config, name)!r}" for name, is_supported in supported.items() if not is_supported]
        raise UserError(f"--to transformers: {backbone} does not support {', '.join(fields)}")


def dinov2_ratio(config: ViTSimpleConfig) -> int | None:
    """The mlp_ratio for which DINOv2's MLP has our width, None if there is none."""
    ratios = range(1, 17)
    widths = [dinov2_width(config.hidden_size, ratio, config.mlp == "swiglu") for ratio in ratios]
    return dict(zip(widths, ratios)).get(config.intermediate_size)


def target_fields(config: ViTSimpleConfig, model_type: str, has_head: bool) -> dict:
    """The fields of the config of transformers."""
    defaults = CONFIG_MAPPING[model_type]()
    fields = {name: getattr(config, name) for name in OWN_FIELDS if hasattr(defaults, name)}
    if model_type.startswith("dinov2"):
        fields |= {"mlp_ratio": dinov2_ratio(config), "use_swiglu_ffn": config.mlp == "swiglu"}
    if model_type == "clip_vision_model":
        fields |= {"attention_dropout": config.attention_probs_dropout_prob}
        fields |= {"projection_dim": config.num_labels} if has_head else {}
    elif has_head:
        fields |= {name: getattr(config, name) for name in ("id2label", "label2id", "problem_type")}
    return fields
