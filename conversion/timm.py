"""Plain ViTs of timm: its tensors and config.json from and to ours."""

import math
import re

from ..configuration_vit_simple import VARIANTS, ViTSimpleConfig, label_maps, pair
from ..files import UserError
from .resampling import FIELDS, RESAMPLING, joined, keep_resampling, with_positions_of_image_size
from .state_dict import (
    KeyMap,
    Tensors,
    build_config,
    drop,
    import_state_dict,
    join_names,
    move_class_position,
    refuse,
    with_learned_positions,
)

DEIT3: KeyMap = {
    f"blocks.*.ls{branch}.gamma": f"blocks.*.gamma_{branch}" for branch in (1, 2)
}  # the original DeiT III keys
DINOV2 = {r"^register_tokens$": "reg_token", r"\.mlp\.w12\.": ".mlp.fc1.", r"\.mlp\.w3\.": ".mlp.fc2."}  # original keys
# timm's config seldom states the number of attention heads, so it follows from the width: the published ones of ours,
# and those of timm's other ViTs, TinyCLIP, DINOv2 giant (1536) and CLIP bigG (1664).
HEADS_BY_WIDTH = {
    **{width: heads for name, (width, _, heads, _) in VARIANTS.items() if name != "notebook"},
    **{256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1152: 16, 1536: 24, 1664: 16},
}
HEADS_BY_NAME = {"vit_base_patch16_gap_224": 16}  # not what its width suggests
ACTIVATIONS = {  # timm's name: transformers' name
    **{"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"},
    **{"silu": "silu", "swish": "silu"},
}
HIDDEN_ACTS = sorted({*ACTIVATIONS.values()})
# Arguments of timm's VisionTransformer that are accepted: we read them, the tensors determine them, or they do not
# affect evaluation. Any other argument may change the outputs and is refused.
KNOWN_ARGS = """
img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads mlp_ratio qkv_bias init_values
class_token no_embed_class reg_tokens pre_norm fc_norm act_layer dynamic_img_size dynamic_img_pad strict_img_size
weight_init fix_init drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate
"""
CONFIG_FIELDS = {  # the types of the fields of timm's config.json that are read
    "architecture": str | None,
    "num_classes": int | None,
    "global_pool": str | None,
    "label_names": list[str] | dict[str, str] | None,
    "model_args": {
        "img_size": int | list[int] | None,
        "num_heads": int | None,
        "act_layer": str | None,
        "global_pool": str | None,
    },
    "pretrained_cfg": {
        "input_size": list[int] | None,
        "crop_pct": float | None,
        "crop_mode": str | None,
        "interpolation": str | None,
        "mean": list[float] | None,
        "std": list[float] | None,
        "license": str | None,
    },
}


# From timm


def from_timm(
    content: dict,
    tensors: Tensors,
    report: list[str],
    missing: list[str],
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
    source: str = "timm",
) -> tuple[ViTSimpleConfig, Tensors]:
    """Our config and tensors from those of timm, or of the original repositories, which have the same keys.

    Args:
        content: timm's config.json, {} if there is none. Most of the architecture is read from the tensors.
        report: gets a line for everything that is dropped or assumed.
        missing: the options that are required; get those that are required here, too.
        num_attention_heads, hidden_act: for files whose config does not state them.
        source: "timm", or the original repository, a name in RESAMPLING.

    Raises:
        UserError: another family, tensors that contradict the config, or too little information.
    """
    architecture, args = content.get("architecture") or "", content.get("model_args") or {}
    for name in (architecture, *tensors):
        refuse(name)
    if architecture and not architecture.startswith(("vit_", "deit_", "deit3_")):
        raise UserError(f"expected a plain ViT, whose timm name begins with vit_, deit_ or deit3_, got {architecture}")
    if unknown := set(args).difference(KNOWN_ARGS.split()):
        raise UserError(f"expected model_args of a plain ViT, got {join_names(unknown)}")
    if any(key.startswith("pre_logits.") for key in tensors) and "head.weight" in tensors:
        report.append("dropped the head, because it reads the output of the tanh layer")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
        content = content | {"num_classes": None} if content else {}
    tensors = rename_dinov2(drop(tensors, report))
    fields = fields_from_shapes(tensors)
    fields |= fields_from_positions(content, tensors, fields)
    fields |= fields_from_head(content, tensors, fields)
    fields |= RESAMPLING[source] | {name: content[name] for name in FIELDS if name in content}
    if not content:
        size, pooling, count = pair(fields["image_size"]), fields["pooling"], tensors["pos_embed"].shape[1]
        grid = " x ".join(str(side // patch) for side, patch in zip(size, pair(fields["patch_size"])))
        report.append(
            f"assumed images of {size} pixels, since {count} positions fit {grid} patches, and pooling {pooling!r}, "
            "because there is no config.json; docs/conversion.md shows one for another size"
        )
    if source != "timm":
        report.append(f"positions are resampled for other image sizes as in {source}: {joined(RESAMPLING[source])}")
    heads = num_attention_heads or heads_of(architecture, args, fields["hidden_size"], report, missing)
    act = hidden_act or activation_of(content, fields, missing)
    if missing:
        raise UserError("; ".join(missing))
    is_clip = "_clip_" in architecture if architecture else fields["pre_norm"]
    eps = 1e-5 if is_clip else 1e-6
    config = build_config(layer_norm_eps=eps, num_attention_heads=heads, hidden_act=act, **fields)
    return config, import_state_dict(tensors, DEIT3 if "blocks.0.gamma_1" in tensors else {}, config)


def rename_dinov2(tensors: Tensors) -> Tensors:
    """The tensors with timm's keys for those that only DINOv2's repository has."""
    has_registers = "register_tokens" in tensors
    for pattern, name in DINOV2.items():
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    if has_registers:
        move_class_position(tensors, "cls_token", "pos_embed")
    return tensors


def heads_of(architecture: str, args: dict, width: int, report: list[str], missing: list[str]) -> int | None:
    """The number of attention heads, which does not show in any tensor; None if it is added to `missing`."""
    if args.get("num_heads"):
        return args["num_heads"]
    heads = HEADS_BY_NAME.get(architecture, HEADS_BY_WIDTH.get(width))
    if heads is None:
        missing.append(f"--num_attention_heads is required: no config states it and width {width} is not a known one")
        return None
    report.append(f"assumed {heads} attention heads, as in published ViTs of width {width}")
    return heads


def activation_of(content: dict, fields: dict, missing: list[str]) -> str:
    """The activation of the MLP: from model_args, or what timm uses for the name of the model."""
    architecture, args = content.get("architecture") or "", content.get("model_args") or {}
    if args.get("act_layer"):
        if args["act_layer"] not in ACTIVATIONS:
            raise UserError(f"act_layer: expected one of {', '.join(ACTIVATIONS)}, got {args['act_layer']}")
        return ACTIVATIONS[args["act_layer"]]
    if fields["mlp"] == "swiglu":
        return "silu"
    if "quickgelu" in architecture:
        return "quick_gelu"
    if fields["pre_norm"] and not architecture:
        missing.append("--hidden_act is required for CLIP without a config: quick_gelu (OpenAI's weights) or gelu")
    if "QuickGELU" in str((content.get("pretrained_cfg") or {}).get("notes")):
        missing.append(
            f"--hidden_act is required: config.json says that these weights were trained with quick_gelu, but timm "
            f"uses gelu for {architecture}"
        )
    return "gelu"


def fields_from_shapes(tensors: Tensors) -> dict:
    """The fields of the config that the shapes of the tensors determine."""
    needed = {  # and their number of axes
        "patch_embed.proj.weight": 4,
        "pos_embed": 3,
        "blocks.0.mlp.fc1.weight": 2,
        "blocks.0.mlp.fc2.weight": 2,
    }
    if any(re.search(r"\bembeddings\.patch_embedding", key) for key in tensors):
        raise UserError(
            "config.json is required for weights of transformers: put it into a folder with them, under the name "
            "model.safetensors or pytorch_model.bin, and give that folder"
        )
    if missing := [key for key in needed if key not in tensors]:
        raise UserError(f"expected the tensors of a plain ViT, got {join_names(tensors)} without {join_names(missing)}")
    for key, axes in (needed | {"head.weight": 2, "reg_token": 3}).items():
        if key in tensors and (tensors[key].ndim != axes or not tensors[key].numel()):
            raise UserError(f"{key}: expected {axes} axes, none of length 0, got the shape {tuple(tensors[key].shape)}")
    patch_embed, _, fc1, fc2 = (tensors[key] for key in needed)
    width, channels, *patch_size = patch_embed.shape
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(block) for block in re.findall(r"\bblocks\.(\d{1,6})\.", " ".join(tensors))),
        "intermediate_size": fc2.shape[1],
        "num_channels": channels,
        "patch_size": one_or_pair(patch_size),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "use_class_token": "cls_token" in tensors,
        "num_register_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "pre_norm": "norm_pre.weight" in tensors,
        "fc_norm": "fc_norm.weight" in tensors,
        "mlp": "swiglu" if len(fc1) == 2 * fc2.shape[1] else "mlp",
        # The initial value of LayerScale does not show in trained weights; any number says that there is LayerScale.
        "layerscale_value": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(tensors) else None,
    }


def fields_from_positions(content: dict, tensors: Tensors, fields: dict) -> dict:
    """The image size, and whether the prefix tokens have positions."""
    prefix, positions = fields["use_class_token"] + fields["num_register_tokens"], tensors["pos_embed"].shape[1]
    patch_size = pair(fields["patch_size"])
    args, pretrained = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
    size = args.get("img_size") or (pretrained.get("input_size") or ())[1:]
    if size:
        if len(pair(size)) != 2:
            raise UserError(f"img_size or input_size: expected a height and a width, got {size}")
        grid_h, grid_w = (side // patch for side, patch in zip(pair(size), patch_size))
        return {"image_size": one_or_pair(pair(size)), "no_embed_class": bool(prefix) and positions == grid_h * grid_w}
    # Without a config, the patches are assumed to form a square, with or without positions for the prefix tokens.
    patches = {count: positions - count for count in (0, prefix) if count <= positions}
    squares = [count for count, number in patches.items() if math.isqrt(number) ** 2 == number]
    if len(squares) != 1:
        raise UserError(f"config.json is required: {positions} positions do not determine the image size")
    side = math.isqrt(positions - squares[0])
    return {
        "image_size": one_or_pair([side * patch for patch in patch_size]),
        "no_embed_class": bool(prefix) and squares[0] == 0,
    }


def fields_from_head(content: dict, tensors: Tensors, fields: dict) -> dict:
    """The pooling and the classes; a head without bias, such as CLIP's projection, gets a bias of zeros."""
    default = "avg" if fields["fc_norm"] or not fields["use_class_token"] else "token"
    pool = (content.get("model_args") or {}).get("global_pool") or content.get("global_pool") or default
    if pool not in ("token", "avg") or (fields["fc_norm"] and pool == "token"):
        raise UserError(f"global_pool: expected token (without fc_norm) or avg, got {pool}")
    pooling = {"pooling": "cls" if pool == "token" else "mean"}
    weight, num_classes = tensors.get("head.weight"), content.get("num_classes")
    count = 0 if weight is None else len(weight)
    if num_classes not in (None, count):
        raise UserError(f"num_classes: expected {count}, the rows of head.weight, got {num_classes}")
    if weight is None:
        return pooling
    tensors.setdefault("head.bias", weight.new_zeros(count))
    names = content.get("label_names") or {}
    if isinstance(names, dict):  # {number: name}, for some of the classes
        if unknown := sorted(names.keys() - {str(index) for index in range(count)}):
            raise UserError(f"label_names: expected names for the classes 0 to {count - 1}, got {', '.join(unknown)}")
        names = [names.get(str(index), f"LABEL_{index}") for index in range(count)]
    if len(names) != count:
        raise UserError(f"label_names: expected a list of {count} names, got {names}")
    return pooling | label_maps(names)


# To timm


def to_timm(config: ViTSimpleConfig, tensors: Tensors, report: list[str]) -> tuple[dict, Tensors]:
    """timm's tensors and its config.json, except for `pretrained_cfg`.

    Raises:
        UserError: an activation or a layer_norm_eps that timm's config cannot express.
    """
    config, tensors = with_positions_of_image_size(*with_learned_positions(config, tensors), report)
    activations = {ours: timms for timms, ours in reversed(ACTIVATIONS.items())}
    if config.hidden_act not in activations:
        raise UserError(f"--to timm: expected hidden_act to be one of {list(activations)}, got {config.hidden_act}")
    if config.problem_type not in (None, "single_label_classification"):
        report.append(f"dropped problem_type {config.problem_type!r}, which timm's config cannot express")
    rows = len(tensors["blocks.0.mlp.fc1.weight"])
    ratio = rows / config.hidden_size
    global_pool = "token" if config.pooling == "cls" else "avg"
    content = {
        "architecture": architecture_of(config, report),
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "num_features": config.hidden_size,
        "global_pool": global_pool,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.num_channels,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            # timm rounds the product of width and ratio down to an integer
            "mlp_ratio": ratio if int(config.hidden_size * ratio) == rows else math.nextafter(ratio, math.inf),
            "qkv_bias": config.qkv_bias,
            "init_values": config.layerscale_value,
            "class_token": config.use_class_token,
            "global_pool": global_pool,
            "no_embed_class": config.no_embed_class,
            "reg_tokens": config.num_register_tokens,
            "pre_norm": config.pre_norm,
            "fc_norm": config.fc_norm,
            "act_layer": activations[config.hidden_act],
        },
        **keep_resampling(config, "timm", report),
    }
    if content["num_classes"] and set(config.id2label.values()) != {f"LABEL_{i}" for i in config.id2label}:
        content["label_names"] = list(config.id2label.values())
    return content, tensors


def architecture_of(config: ViTSimpleConfig, report: list[str]) -> str:
    """The timm model whose code has this layer_norm_eps and MLP; model_args override everything else."""
    names = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    if config.mlp == "swiglu":
        names = {1e-6: "vit_giant_patch14_dinov2"}
    eps = config.layer_norm_eps
    if eps == 1e-12:  # transformers' default
        report.append("changed layer_norm_eps from 1e-12 to 1e-6, which timm uses")
        eps = 1e-6
    if eps not in names:
        raise UserError(f"--to timm: expected layer_norm_eps to be 1e-12 or one of {list(names)}, got {eps}")
    return names[eps]


def one_or_pair(sides) -> int | tuple[int, int]:
    """(height, width), or a single int if both are equal."""
    height, width = sides
    return height if height == width else (height, width)
