"""Plain ViTs as timm writes them: the way between its tensors and config.json and ours."""

import math
import re

from ..configuration_vit_simple import VARIANTS, ViTSimpleConfig, label_maps, pair
from .state_dict import Tensors, drop, import_state_dict, join_names, refuse, with_learned_positions

DEIT3 = {f"blocks.*.ls{branch}.gamma": f"blocks.*.gamma_{branch}" for branch in (1, 2)}  # as its authors wrote it
HEADS = {  # of each width; DINOv2 giant has 1536, CLIP bigG 1664, the others are timm's own and TinyCLIP's
    **{width: heads for width, _, heads, _ in VARIANTS.values()},
    **{256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1152: 16, 1536: 24, 1664: 16},
}
OTHER_HEADS = {"vit_base_patch16_gap_224": 16}
ACTIVATIONS = {  # timm's names, and transformers'
    **{"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"},
    **{"silu": "silu", "swish": "silu"},
}
# Arguments of timm's networks that the tensors tell of, too, or that change nothing in evaluation.
KNOWN_ARGS = """
img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads mlp_ratio qkv_bias init_values
class_token no_embed_class reg_tokens pre_norm fc_norm act_layer dynamic_img_size dynamic_img_pad strict_img_size
weight_init fix_init drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate
"""


def from_timm(
    content: dict,
    tensors: Tensors,
    notes: list[str],
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
) -> tuple[ViTSimpleConfig, Tensors]:
    """Config and tensors of ours from those of timm.

    Args:
        content: timm's config.json; empty, where there is none. Most of the network is read off the tensors.
        notes: gets a line for all that is left out or taken from elsewhere.
        num_attention_heads, hidden_act: for files whose config does not tell them.

    Raises:
        ValueError: another family, tensors and config that do not fit, or too little to tell what the network is.
    """
    architecture, args = content.get("architecture") or "", content.get("model_args") or {}
    for name in (architecture, *tensors):
        refuse(name)
    if architecture and not architecture.startswith(("vit_", "deit_", "deit3_")):
        raise ValueError(f"expected a plain ViT, whose timm name begins with vit_, deit_ or deit3_, got {architecture}")
    if unknown := set(args).difference(KNOWN_ARGS.split()):
        raise ValueError(f"expected the model_args of a plain ViT, got {join_names(unknown)}")
    alone = not content
    if any(name.startswith("pre_logits.") for name in tensors) and "head.weight" in tensors:
        notes.append("dropped the head, which stands on the tanh layer")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        content = content | {"num_classes": None}
    tensors = drop(tensors, notes)
    fields = fields_of_shapes(tensors)
    fields |= fields_of_positions(content, tensors, fields)
    fields |= fields_of_head(content, tensors, fields)
    if alone:
        size, pooling = pair(fields["image_size"]), fields["pooling"]
        notes.append(f"took images of {size} pixels and the pooling {pooling}, since no config tells of others")
    fields["num_attention_heads"] = num_attention_heads or heads_of(architecture, args, fields["hidden_size"], notes)
    fields["hidden_act"] = hidden_act or activation_of(content, fields)
    clip = "_clip_" in architecture if architecture else fields["pre_norm"]
    config = ViTSimpleConfig(layer_norm_eps=1e-5 if clip else 1e-6, **fields)
    return config, import_state_dict(tensors, DEIT3 if "blocks.0.gamma_1" in tensors else {}, config)


def heads_of(architecture: str, args: dict, width: int, notes: list[str]) -> int:
    """The number of attention heads, which no tensor and seldom a config tells."""
    if args.get("num_heads"):
        return args["num_heads"]
    heads = OTHER_HEADS.get(architecture, HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"--num_attention_heads: expected it, since no file and no table tells it of a width of {width}"
        )
    notes.append(f"took {heads} attention heads, as published ViTs of width {width} have")
    return heads


def activation_of(content: dict, fields: dict) -> str:
    """The activation of the MLP: that of the arguments, else what timm's name of the network stands for."""
    architecture, args = content.get("architecture") or "", content.get("model_args") or {}
    if args.get("act_layer"):
        if args["act_layer"] not in ACTIVATIONS:
            raise ValueError(f"act_layer: expected one of {', '.join(ACTIVATIONS)}, got {args['act_layer']}")
        return ACTIVATIONS[args["act_layer"]]
    if fields["mlp"] == "swiglu":
        return "silu"
    if "quickgelu" in architecture:
        return "quick_gelu"
    if fields["pre_norm"] and not architecture:
        raise ValueError("--hidden_act: expected quick_gelu (as OpenAI trained CLIP) or gelu, since no config tells")
    if "QuickGELU" in str((content.get("pretrained_cfg") or {}).get("notes")):
        raise ValueError(
            "--hidden_act: expected quick_gelu, with which this file was trained at first, or gelu, which timm takes "
            f"for {architecture}: config.json tells of both"
        )
    return "gelu"


def fields_of_shapes(tensors: Tensors) -> dict:
    """What the shapes of timm's tensors tell of the network."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(
            f"expected the tensors of a plain ViT, got {join_names(tensors)} without {join_names(missing)}"
        )
    for name, axes in zip(needed, (4, 3, 2, 2)):
        if tensors[name].ndim != axes:
            raise ValueError(f"{name}: expected {axes} axes, got the shape {tuple(tensors[name].shape)}")
    kernel, _, up, down = (tensors[name] for name in needed)
    width, channels, *patch_size = kernel.shape
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(block) for block in re.findall(r"\bblocks\.(\d+)\.", " ".join(tensors))),
        "intermediate_size": down.shape[1],
        "num_channels": channels,
        "patch_size": one_or_pair(patch_size),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "use_class_token": "cls_token" in tensors,
        "num_register_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "pre_norm": "norm_pre.weight" in tensors,
        "fc_norm": "fc_norm.weight" in tensors,
        "mlp": "swiglu" if len(up) == 2 * down.shape[1] else "mlp",
        # Where there is LayerScale, its first value, of which nothing is left once it is trained.
        "layerscale_value": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(tensors) else None,
    }


def fields_of_positions(content: dict, tensors: Tensors, fields: dict) -> dict:
    """The size of the images, and whether prefix tokens have a position."""
    prefix, positions = fields["use_class_token"] + fields["num_register_tokens"], tensors["pos_embed"].shape[1]
    patch_size = pair(fields["patch_size"])
    args, pretrained = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
    size = args.get("img_size") or pretrained.get("input_size", ())[1:]
    if size:
        rows, columns = (side // patch for side, patch in zip(pair(size), patch_size))
        return {"image_size": one_or_pair(pair(size)), "no_embed_class": bool(prefix) and positions == rows * columns}
    squares = [count for count in {0, prefix} if math.isqrt(positions - count) ** 2 == positions - count]
    if len(squares) != 1:
        raise ValueError(f"expected a config.json beside a file with {positions} positions, which can be no one square")
    side = math.isqrt(positions - squares[0])
    return {
        "image_size": one_or_pair([side * patch for patch in patch_size]),
        "no_embed_class": bool(prefix) and squares[0] == 0,
    }


def fields_of_head(content: dict, tensors: Tensors, fields: dict) -> dict:
    """How tokens are pooled, and the classes; a head without bias, as CLIP's projection, gets one of zeros."""
    default = "avg" if fields["fc_norm"] or not fields["use_class_token"] else "token"
    pool = (content.get("model_args") or {}).get("global_pool") or content.get("global_pool") or default
    if pool not in ("token", "avg") or (fields["fc_norm"] and pool == "token"):
        raise ValueError(f"global_pool: expected token (without fc_norm) or avg, got {pool}")
    found = {"pooling": "cls" if pool == "token" else "mean"}
    kernel, classes = tensors.get("head.weight"), content.get("num_classes")
    count = 0 if kernel is None else len(kernel)
    if classes not in (None, count):
        raise ValueError(f"num_classes: expected {count}, as head.weight has, got {classes}")
    if kernel is None:
        return found
    tensors.setdefault("head.bias", kernel.new_zeros(count))
    names = content.get("label_names") or [f"LABEL_{index}" for index in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(f"label_names: expected a list of {count} names, got {names}")
    return found | label_maps(names)


def to_timm(config: ViTSimpleConfig, tensors: Tensors, notes: list[str]) -> tuple[dict, Tensors]:
    """timm's config.json, all but `pretrained_cfg`, and its tensors.

    Raises:
        ValueError: an activation or epsilon that a config of timm cannot name.
    """
    config, tensors = with_learned_positions(config, tensors)
    names = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}  # epsilon stands in timm's code alone
    if config.mlp == "swiglu":
        names = {1e-6: "vit_giant_patch14_dinov2"}
    eps = config.layer_norm_eps
    if eps == 1e-12 and 1e-6 in names:
        notes.append("timm's networks have a layer_norm_eps of 1e-6, in the place of 1e-12")
        eps = 1e-6
    if eps not in names:
        raise ValueError(f"--to timm: expected layer_norm_eps 1e-12 or one of {list(names)}, got {eps}")
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.hidden_act not in activations:
        raise ValueError(f"--to timm: expected hidden_act {list(activations)}, got {config.hidden_act}")
    if config.problem_type not in (None, "single_label_classification"):
        notes.append(f"timm's config has no place for the problem_type {config.problem_type}")
    rows = len(tensors["blocks.0.mlp.fc1.weight"])
    ratio = rows / config.hidden_size
    content = {
        "architecture": names[eps],
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "num_features": config.hidden_size,
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "in_chans": config.num_channels,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            # timm cuts the product with the width down to an integer
            "mlp_ratio": ratio if int(config.hidden_size * ratio) == rows else math.nextafter(ratio, math.inf),
            "qkv_bias": config.qkv_bias,
            "init_values": config.layerscale_value,
            "class_token": config.use_class_token,
            "global_pool": "token" if config.pooling == "cls" else "avg",
            "no_embed_class": config.no_embed_class,
            "reg_tokens": config.num_register_tokens,
            "pre_norm": config.pre_norm,
            "fc_norm": config.fc_norm,
            "act_layer": activations[config.hidden_act],
        },
    }
    if content["num_classes"] and set(config.id2label.values()) != {f"LABEL_{i}" for i in config.id2label}:
        content["label_names"] = list(config.id2label.values())
    return content, tensors


def one_or_pair(sides) -> int | tuple[int, int]:
    """(height, width) as an int where both are equal."""
    height, width = sides
    return height if height == width else (height, width)
