"""Plain ViTs as timm writes them: the way between its tensors and config.json and ours."""

import math

from vit_simple import VARIANTS, ViTSimpleConfig
from vit_simple.configuration_vit_simple import pair
from vit_simple.layouts import Tensors, drop, gather, listed, refuse, with_table

DEIT3 = {f"blocks.*.ls{branch}.gamma": f"blocks.*.gamma_{branch}" for branch in (1, 2)}  # as its authors wrote it
HEADS = {width: heads for width, _, heads, _ in VARIANTS.values()} | {1536: 24, 1664: 16}  # DINOv2 giant, CLIP bigG
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
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
    architecture, args = content.get("architecture", ""), content.get("model_args", {})
    for name in (architecture, *tensors):
        refuse(name)
    if architecture and not architecture.startswith(("vit_", "deit_", "deit3_")):
        raise ValueError(f"expected a plain ViT, whose timm name begins with vit_, deit_ or deit3_, got {architecture}")
    if unknown := set(args).difference(KNOWN_ARGS.split()):
        raise ValueError(f"expected the model_args of a plain ViT, got {listed(unknown)}")
    tensors = drop(tensors, notes)
    fields = fields_of_shapes(tensors)
    fields |= fields_of_positions(content, tensors, fields)
    fields |= fields_of_head(content, tensors, fields)

    width = fields["hidden_size"]
    heads = args.get("num_heads", num_attention_heads)
    if heads is None and width not in HEADS:
        raise ValueError(f"--num_attention_heads: expected a number, since no published ViT is {width} wide")
    if heads is None:
        heads = HEADS[width]
        notes.append(f"took {heads} attention heads, as published ViTs of width {width} have")
    native = "QuickGELU" in str(content.get("pretrained_cfg", {}).get("notes", ""))
    act = {timms: ours for ours, timms in ACTIVATIONS.items()}.get(args.get("act_layer"), hidden_act)
    if act is None and fields["pre_norm"] and not architecture:
        raise ValueError("--hidden_act: expected quick_gelu (as OpenAI trained CLIP) or gelu, since no config tells")
    if act is None and native and "quickgelu" not in architecture:
        notes.append("took quick_gelu, with which this file was trained; timm has gelu under the name in its config")
    quick = "quickgelu" in architecture or native
    act = act or ("silu" if fields["mlp"] == "swiglu" else "quick_gelu" if quick else "gelu")
    clip = "_clip_" in architecture if architecture else fields["pre_norm"]
    config = ViTSimpleConfig(num_attention_heads=heads, hidden_act=act, layer_norm_eps=1e-5 if clip else 1e-6, **fields)
    return config, gather(tensors, DEIT3 if "blocks.0.gamma_1" in tensors else {}, config)


def fields_of_shapes(tensors: Tensors) -> dict:
    """What the shapes of timm's tensors tell of the network."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"expected the tensors of a plain ViT, got {listed(tensors)} without {listed(missing)}")
    if tensors[needed[0]].ndim != 4:
        raise ValueError(f"{needed[0]}: expected a kernel (D, C, P, P), got {tuple(tensors[needed[0]].shape)}")
    kernel, _, up, down = (tensors[name] for name in needed)
    width, channels, *patch_size = kernel.shape
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
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
    size = content.get("model_args", {}).get("img_size") or content.get("pretrained_cfg", {}).get("input_size", ())[1:]
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
    pool = content.get("model_args", {}).get("global_pool", content.get("global_pool", default))
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
    return found | {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def to_timm(config: ViTSimpleConfig, tensors: Tensors, notes: list[str]) -> tuple[dict, Tensors]:
    """timm's config.json, all but `pretrained_cfg`, and its tensors.

    Raises:
        ValueError: an activation or epsilon that a config of timm cannot name.
    """
    config, tensors = with_table(config, tensors)
    names = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}  # epsilon stands in timm's code alone
    if config.mlp == "swiglu":
        names = {1e-6: "vit_giant_patch14_dinov2"}
    eps = config.layer_norm_eps
    if eps == 1e-12 and 1e-6 in names:
        notes.append("timm's networks have a layer_norm_eps of 1e-6, in the place of 1e-12")
        eps = 1e-6
    if eps not in names:
        raise ValueError(f"--to timm: expected layer_norm_eps 1e-12 or one of {list(names)}, got {eps}")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"--to timm: expected hidden_act {list(ACTIVATIONS)}, got {config.hidden_act}")
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
            "act_layer": ACTIVATIONS[config.hidden_act],
        },
    }
    if content["num_classes"] and set(config.id2label.values()) != {f"LABEL_{i}" for i in config.id2label}:
        content["label_names"] = list(config.id2label.values())
    return content, tensors


def one_or_pair(sides) -> int | tuple[int, int]:
    """(height, width) as an int where both are equal."""
    height, width = sides
    return height if height == width else (height, width)
