"""How transformers and timm write a plain ViT: their names and configs, and the way between them and ours.

The names are those of files: transformers 5 has others in memory, but not in what it saves.
"""

import math
import re

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig

from vit_simple import VARIANTS, ViTSimpleConfig, ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.configuration_vit_simple import OWN_FIELDS, pair
from vit_simple.modeling_vit_simple import sincos2d

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
DEIT3 = {f"blocks.*.ls{branch}.gamma": f"blocks.*.gamma_{branch}" for branch in (1, 2)}  # as its authors wrote it

# model_type: names, the prefix under a head, the classes without and with one
TRANSFORMERS = {
    "vit": (VIT, "vit.", "ViTModel", "ViTForImageClassification"),
    "vit_mae": (VIT, "vit.", "ViTMAEModel", "ViTMAEForPreTraining"),
    "dinov2": (DINOV2, "dinov2.", "Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        DINOV2,
        "dinov2_with_registers.",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip": (CLIP, "vision_model.", "CLIPModel", "CLIPModel"),
    "clip_vision_model": (CLIP, "vision_model.", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
SWITCHES = {  # which of the network's switches each of them knows, beside those of the plain network below
    "vit": {"no_embed_class"},
    "dinov2": {"no_embed_class", "layerscale_value", "mlp", "pooling"},
    "dinov2_with_registers": {"no_embed_class", "layerscale_value", "mlp", "pooling", "num_register_tokens"},
    "clip_vision_model": {"pre_norm"},
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

Tensors = dict[str, torch.Tensor]

DROPPED = {  # remains of pre-training
    r"pooler\.|pre_logits\.": "the tanh layer between backbone and head",
    r"(embeddings\.)?mask_token$": "the token of masked patches",
    r"decoder\.": "the decoder",
    r"text_model\.|text_projection\.|logit_scale$": "the text tower",
    r"embeddings\.position_ids$": "a table that counts",
}
REFUSED = {  # model types of transformers, words in timm's names, tensors in timm's files
    r"deit|.*distilled.*|dist_token|head_dist\..*": "DeiT distilled, whose second prefix token has a head of its own",
    r"siglip.*|.*_siglip_.*|attn_pool\..*": "SigLIP, which pools by attention or has another activation",
    r"beit.*|data2vec.*|.*attn\.(q_bias|relative_position.*)|rel_pos_bias.*": "BEiT, whose positions bias attention",
    r"swin.*|layers\.0\.blocks\..*": "Swin, whose attention stays in windows",
    r".*_rpn_.*": "a ViT with LayerNorm behind the branches",
}
HEADS = {width: heads for width, _, heads, _ in VARIANTS.values()} | {1536: 24, 1664: 16}  # DINOv2 giant, CLIP bigG
TIMM_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
TIMM_ARGS = {  # arguments of timm's networks that the tensors tell of, or that change nothing in evaluation
    *(
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "global_pool",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
    ),
    *("qkv_bias", "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "act_layer"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init", "fix_init", "drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}


def refuse(name: str):
    """Raises ValueError for what belongs to a family that this network is not."""
    for pattern, family in REFUSED.items():
        if re.fullmatch(pattern, name):
            raise ValueError(f"expected a plain ViT, got {name}: {family}")


def listed(names, most: int = 4) -> str:
    """Names in a line, the first of them where there are many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def drop(tensors: Tensors, notes: list[str]) -> Tensors:
    """The tensors without what pre-training left behind, of which `notes` tells."""
    for pattern, what in DROPPED.items():
        found = [name for name in tensors if re.match(pattern, name)]
        if found:
            notes.append(f"dropped {what}: {listed(found)}")
    return {name: tensor for name, tensor in tensors.items() if not re.match("|".join(DROPPED), name)}


def names_of(name: str, names: dict) -> list[str]:
    """What a layout calls one of our tensors."""
    number = re.search(r"\.(\d+)\.", name)
    known = re.sub(r"\.\d+\.", ".*.", name)
    module = next((key for key in (known, known.rpartition(".")[0]) if key in names), known)
    theirs = names.get(module, module)
    found = [one + known.removeprefix(module) for one in (theirs if isinstance(theirs, list) else [theirs])]
    return [one.replace("*", number[1]) for one in found] if number else found


def gather(tensors: Tensors, names: dict, config: ViTSimpleConfig) -> Tensors:
    """Our tensors from those of a layout; what needs no joining stays where it is in memory.

    Raises:
        ValueError: names the tensors that are missing, not known or of another shape.
    """
    network = ViTSimpleForImageClassification if names_of("head.weight", names)[0] in tensors else ViTSimpleModel
    with torch.device("meta"):
        expected = network(config).state_dict()
    rest, ours, wrong = dict(tensors), {}, []
    for name, room in expected.items():
        others = names_of(name, names)
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
        raise ValueError(f"expected the tensors that the config describes, but {listed(wrong)}")
    return ours


def scatter(tensors: Tensors, names: dict, prefix: str) -> Tensors:
    """Our tensors under a layout's names, all but the head behind the prefix."""
    theirs = {}
    for name, tensor in tensors.items():
        others = names_of(name, names)
        for other, part in zip(others, tensor.chunk(len(others))):
            theirs[other if name.startswith("head.") else prefix + other] = part
    return theirs


def with_table(config: ViTSimpleConfig, tensors: Tensors) -> tuple[ViTSimpleConfig, Tensors]:
    """The same network with its fixed positions, if it has such, as a table of the patches."""
    if config.position_embedding == "learned":
        return config, tensors
    kernel = tensors["patch_embed.proj.weight"]
    table = sincos2d(*config.grid_size, config.hidden_size, kernel.device).to(kernel.dtype)
    config = ViTSimpleConfig.from_dict(config.to_dict(), position_embedding="learned", no_embed_class=True)
    return config, {**tensors, "pos_embed": table}


# transformers


def from_transformers(theirs: PretrainedConfig, tensors: Tensors, notes: list[str]) -> tuple[ViTSimpleConfig, Tensors]:
    """Config and tensors of ours from those of transformers; `notes` gets a line for all that is left out.

    Raises:
        ValueError: another family, or tensors that the config does not describe.
    """
    kind, vision = theirs.model_type, getattr(theirs, "vision_config", theirs)
    if kind not in TRANSFORMERS:
        refuse(kind)
        raise ValueError(f"expected a plain ViT of the types {', '.join(TRANSFORMERS)}, got {kind}")
    names, prefix, *_ = TRANSFORMERS[kind]
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
    if kind == "dinov2_with_registers" and names["pos_embed"] in tensors:
        table = tensors[names["pos_embed"]]
        tensors[names["cls_token"]] = tensors[names["cls_token"]] + table[:, :1]
        tensors[names["pos_embed"]] = table[:, 1:].contiguous()
        fields["no_embed_class"] = True
    if "classifier.weight" in tensors:
        fields |= {"id2label": theirs.id2label, "label2id": theirs.label2id, "problem_type": theirs.problem_type}
    config = ViTSimpleConfig(**fields)
    return config, gather(tensors, names, config)


def read_projection(tensors: Tensors, notes: list[str]) -> dict:
    """The fields for CLIP's head, a projection without a bias; a head of another class is taken out."""
    drop_head(tensors, notes, "on the mean of patches that no LayerNorm has seen")
    if "visual_projection.weight" not in tensors:
        return {}
    features = len(tensors["visual_projection.weight"])
    tensors["visual_projection.bias"] = tensors["visual_projection.weight"].new_zeros(features)
    notes.append(f"the head is CLIP's projection to {features} features, which are no classes")
    return {"num_labels": features}


def read_halves(tensors: Tensors, notes: list[str]) -> dict:
    """The fields for DINOv2's head, whose kernel has a half for the class token and one for the mean of the patches."""
    if "classifier.weight" not in tensors:
        return {}
    halves = dict(zip(("cls", "mean"), tensors["classifier.weight"].chunk(2, dim=1)))
    used = [pooling for pooling, half in halves.items() if half.any()]
    if len(used) != 1:
        drop_head(tensors, notes, "on class token and mean of the patches together")
        return {}
    tensors["classifier.weight"] = halves[used[0]].contiguous()
    return {"pooling": used[0]}


def drop_head(tensors: Tensors, notes: list[str], what: str):
    found = [name for name in tensors if name.startswith("classifier.")]
    if found:
        notes.append(f"dropped a head {what}, which this network does not have: {listed(found)}")
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
    config, tensors = with_table(config, tensors)
    if config.pre_norm:
        kind = "clip_vision_model"
    elif config.layerscale_value is None:
        kind = "vit"
    else:
        kind = "dinov2_with_registers" if config.num_register_tokens else "dinov2"
    names, prefix, backbone, classifier = TRANSFORMERS[kind]
    has_head = "head.weight" in tensors
    their_class = CONFIG_MAPPING[kind]
    fields = {name: getattr(config, name) for name in OWN_FIELDS if hasattr(their_class(), name)}
    held = {name: getattr(config, name) == PLAIN[name] for name in PLAIN if name not in SWITCHES[kind]}
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
    theirs = scatter(tensors, names, prefix if has_head or kind == "clip_vision_model" else "")
    if kind.startswith("dinov2"):
        theirs[f"{prefix if has_head else ''}embeddings.mask_token"] = tensors["cls_token"].new_zeros(
            1, config.hidden_size
        )
    return their_class(**fields, architectures=[classifier if has_head else backbone]), theirs


# timm


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
    if set(args) - TIMM_ARGS:
        raise ValueError(f"expected the model_args of a plain ViT, got {listed(set(args) - TIMM_ARGS)}")
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
    act = {timms: ours for ours, timms in TIMM_ACTIVATIONS.items()}.get(args.get("act_layer"), hidden_act)
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
    if config.hidden_act not in TIMM_ACTIVATIONS:
        raise ValueError(f"--to timm: expected hidden_act {list(TIMM_ACTIVATIONS)}, got {config.hidden_act}")
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
            "act_layer": TIMM_ACTIVATIONS[config.hidden_act],
        },
    }
    if content["num_classes"] and set(config.id2label.values()) != {f"LABEL_{i}" for i in config.id2label}:
        content["label_names"] = list(config.id2label.values())
    return content, tensors


def one_or_pair(sides) -> int | tuple[int, int]:
    """(height, width) as an int where both are equal."""
    height, width = sides
    return height if height == width else (height, width)
