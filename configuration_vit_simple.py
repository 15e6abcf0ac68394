"""Configuration of ViTSimple, a plain Vision Transformer."""

import difflib
import inspect
from collections.abc import Iterable

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

AUTO_MAP = {
    "AutoConfig": "configuration_vit_simple.ViTSimpleConfig",
    "AutoModel": "modeling_vit_simple.ViTSimpleModel",
    "AutoModelForImageClassification": "modeling_vit_simple.ViTSimpleForImageClassification",
    "AutoBackbone": "modeling_vit_simple.ViTSimpleBackbone",
}

# name: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
VARIANTS = {
    "notebook": (128, 3, 4, 128),  # the teaching notebook that this repository grew from
    "Ti": (192, 12, 3, 768),  # DeiT, arXiv:2012.12877, table 1
    "S": (384, 12, 6, 1536),  # DeiT, the same table
    "B": (768, 12, 12, 3072),  # ViT, arXiv:2010.11929, table 1
    "L": (1024, 24, 16, 4096),  # ViT, the same table
    "H": (1280, 32, 16, 5120),  # ViT, the same table
    "g": (1408, 40, 16, 6144),  # Scaling ViT, arXiv:2106.04560, table 2
}

# Names of timm and of the notebook for our fields. The base class accepts any keyword and would ignore these.
OTHER_NAMES = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "in_channels": "num_channels",
    "num_classes": "num_labels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_ratio": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "drop_rate": "hidden_dropout_prob",
    "proj_drop_rate": "hidden_dropout_prob",
    "attn_drop_rate": "attention_probs_dropout_prob",
    "global_pool": "pooling",
    "reg_tokens": "num_register_tokens",
    "init_values": "layerscale_value",
    "antialias": "interpolate_antialias",
    "pretrain_img_size": "pretrain_image_size",
}

SWITCHES = ("qkv_bias", "use_class_token", "fc_norm", "no_embed_class", "pre_norm", "interpolate_antialias")
LABEL_FIELDS = ("num_labels", "id2label", "label2id")

# The names under which a config.json can choose how attention is computed.
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


class ViTSimpleConfig(PretrainedConfig):
    """Everything that defines a ViTSimple model (ViT: Dosovitskiy et al., arXiv:2010.11929, section 3.1).

    Args:
        hidden_size: width D of every token; a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads h.
        intermediate_size: hidden width of the MLP.
        hidden_act: activation of the MLP, a name in `transformers.activations.ACT2FN`.
        hidden_dropout_prob: dropout after the embedding and at the end of both branches of a block, in [0, 1).
        attention_probs_dropout_prob: dropout on the attention weights, in [0, 1).
        drop_path_rate: probability that a sample skips a branch of the last block, in [0, 1); it rises linearly from 0
            at the first block (stochastic depth, arXiv:1603.09382, section 3, drawn per sample).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the truncated normal for weight matrices, tokens and positions.
        image_size: height and width in pixels, an int or a (height, width) pair; a multiple of `patch_size`.
        patch_size: height and width of a patch in pixels, an int or a (height, width) pair.
        num_channels: channels of an image.
        qkv_bias: whether query, key and value have a bias.
        use_class_token: whether a learned class token precedes the patches.
        pooling: `"cls"`, the class token, or `"mean"`, the mean of the patch tokens.
        fc_norm: whether the last LayerNorm comes after the mean instead of before it (MAE fine-tuned, timm's `avg`).
        num_register_tokens: learned tokens between class token and patches (arXiv:2309.16588, section 2.2; DINOv2).
        position_embedding: `"learned"`, or `"sincos2d"`: fixed, for the patches only (arXiv:2205.01580).
        no_embed_class: whether class token and registers have no position (DeiT-III, DINOv2 with registers).
        pre_norm: whether a LayerNorm precedes the blocks, and the patch projection has no bias (CLIP).
        mlp: `"mlp"`, or `"swiglu"`, whose `intermediate_size` is the width after the gate (DINOv2 giant).
        layerscale_value: initial LayerScale of both branches (arXiv:2103.17239, section 2; DeiT-III, DINOv2) or None.
        head_init_std: standard deviation of the head's weights; None means `initializer_range`, 0 starts at zero.
        interpolate_antialias: whether learned positions are antialiased when they are resampled for other image sizes
            (timm, DINOv2 with registers), or not (DINO, DINOv2, most classes of transformers).
        interpolate_offset: what is added to the new number of rows and columns to get the scale of that resampling, in
            [0, 1): 0.1 in the repositories of DINO and DINOv2.
        pretrain_image_size: size of the images for which the learned positions are stored, if it is not `image_size`;
            they are resampled in every forward pass, so that any other size is as exact. An int, a pair or None.
        kwargs: fields of every transformers config, such as `num_labels`, `id2label` (sets `label2id`, too) and
            `problem_type`; and, for AutoBackbone, `out_features`, `out_indices` and `reshape_hidden_states`.

    Raises:
        ValueError: a value that cannot work, or a keyword that resembles one of the above.
    """

    model_type = "vit_simple"

    # What ViTSimpleBackbone returns; config.json has these fields only where they were set.
    out_features = None  # names in `stage_names`, such as ["stage6", "stage12"]; None means the last one
    out_indices = None  # the same by number: 0 is the stem, 12 or -1 the last of 12 blocks
    reshape_hidden_states = True  # maps (B, D, H/P, W/P); False means tokens (B, 1 + N, D), as DPT needs

    def __init__(
        self,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
        image_size=224,
        patch_size=16,
        num_channels=3,
        qkv_bias=True,
        use_class_token=True,
        pooling="cls",
        fc_norm=False,
        num_register_tokens=0,
        position_embedding="learned",
        no_embed_class=False,
        pre_norm=False,
        mlp="mlp",
        layerscale_value=None,
        head_init_std=None,
        interpolate_antialias=True,
        interpolate_offset=0.0,
        pretrain_image_size=None,
        **kwargs,
    ):
        arguments = locals()
        for name in OWN_FIELDS:
            setattr(self, name, arguments[name])
        refuse_near_misses(kwargs)
        kwargs |= complete_labels(*(kwargs.pop(name, None) for name in LABEL_FIELDS))
        # Names all classes in this folder, whichever class is saved and wherever the config comes from.
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        super().__init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers: `kwargs` override fields. Here, a misspelled field is an error. Any of
        `num_labels`, `id2label` and `label2id` replaces all three stored ones, unless only `num_labels` is given and
        equals the stored number. A given image or patch size removes `pretrain_image_size`.
        """
        refuse_near_misses(kwargs)
        refuse_kernels(config_dict)  # of the file; `kwargs` are the caller's
        if config_dict.get("id2label"):  # whoever edits the file may forget the other map
            config_dict = {key: value for key, value in config_dict.items() if key != "label2id"}
        labels = {name: value for name in LABEL_FIELDS if (value := kwargs.pop(name, None)) is not None}
        if labels and labels != {"num_labels": len(config_dict.get("id2label") or ())}:
            config_dict = {key: value for key, value in config_dict.items() if key not in LABEL_FIELDS} | labels
        if {"image_size", "patch_size"} & kwargs.keys():
            config_dict = {key: value for key, value in config_dict.items() if key != "pretrain_image_size"}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file) -> "ViTSimpleConfig":
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_variant(cls, variant: str, **kwargs) -> "ViTSimpleConfig":
        """A published size with a patch size, such as `"S/16"`; `kwargs` are further fields.

        Raises:
            ValueError: the variant is not `NAME/PATCH` with a name in `VARIANTS`.
        """
        name, _, patch = str(variant).partition("/")
        if name not in VARIANTS or not patch.isdecimal():
            raise ValueError(f"variant: expected NAME/PATCH with NAME in {list(VARIANTS)}, got {variant!r}")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return cls(**{**dict(zip(names, VARIANTS[name])), "patch_size": int(patch), **kwargs})

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid, (H/P, W/P)."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def position_grid_size(self) -> tuple[int, int]:
        """Rows and columns of the learned positions, which are resampled if `grid_size` differs."""
        return patch_grid(self.pretrain_image_size or self.image_size, self.patch_size)

    @property
    def stage_names(self) -> list[str]:
        """Names of the embedding and of each block, as in other backbones of transformers."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def num_prefix_positions(self) -> int:
        """Tokens before the patches that have a learned position."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def check(self):
        """Checks every field. Called again when a model is built: transformers sets overrides after `__init__`.

        Raises:
            ValueError: says which field, what was expected and what was got.
        """
        expect = self._expect
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            expect(is_integer(getattr(self, field)), field, "a positive integer")
        expect(is_integer(self.num_register_tokens, minimum=0), "num_register_tokens", "0 or a positive integer")
        expect(is_integer(self.num_labels), "num_labels", "a positive integer")
        complete_labels(None, self.id2label, self.label2id)
        expect(set(self.id2label) == set(range(self.num_labels)), "id2label", "integers as keys")
        for field in ("image_size", "patch_size", "pretrain_image_size"):
            valid = is_size(getattr(self, field)) or (field == "pretrain_image_size" and getattr(self, field) is None)
            expect(valid, field, "a positive integer or a (height, width) pair of them")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "interpolate_offset"):
            value = getattr(self, field)
            expect(is_number(value) and 0 <= value < 1, field, "a number in [0, 1)")
        for field in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, field)
            expect(is_number(value) and 0 < value < float("inf"), field, "a positive number")
        for field in ("layerscale_value", "head_init_std"):
            value = getattr(self, field)
            valid = value is None or (is_number(value) and 0 <= value < float("inf"))
            expect(valid, field, "None or a number of at least 0")
        for field in (*SWITCHES, "reshape_hidden_states"):
            expect(isinstance(getattr(self, field), bool), field, "True or False")
        choices = {
            "pooling": ("cls", "mean"),
            "mlp": ("mlp", "swiglu"),
            "position_embedding": ("learned", "sincos2d"),
            "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
        }
        for field, allowed in choices.items():
            expect(getattr(self, field) in allowed, field, f"one of {allowed}")
        expect(isinstance(self.hidden_act, str) and self.hidden_act in ACT2FN, "hidden_act", "a name in ACT2FN")

        # Fields that depend on each other.
        heads, patch_size = self.num_attention_heads, pair(self.patch_size)
        expect(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads={heads}")
        for field in ("image_size", "pretrain_image_size"):
            divides = all(size % patch == 0 for size, patch in zip(pair(getattr(self, field) or 0), patch_size))
            expect(divides, field, f"a multiple of patch_size={self.patch_size}")
        valid = self.position_embedding == "learned" or self.hidden_size % 4 == 0
        expect(valid, "hidden_size", "a multiple of 4 for position_embedding='sincos2d'")
        expect(self.pooling == "mean" or self.use_class_token, "pooling", "'mean' when use_class_token=False")
        expect(self.pooling == "mean" or not self.fc_norm, "pooling", "'mean' when fc_norm=True")
        expect(self.mlp == "mlp" or self.hidden_act == "silu", "hidden_act", "'silu' when mlp='swiglu'")
        valid = self.problem_type != "single_label_classification" or self.num_labels > 1
        expect(valid, "num_labels", "at least 2 for problem_type='single_label_classification'")
        self._check_backbone()

    def _check_backbone(self):
        depth, expect = self.num_hidden_layers, self._expect
        for field, is_stage, allowed in (
            ("out_features", self._is_stage_name, f"'stem' and 'stage1' to 'stage{depth}'"),
            ("out_indices", range(-depth - 1, depth + 1).__contains__, f"0 (the stem) to {depth}, or -1 (the last)"),
        ):
            value = getattr(self, field)
            valid = isinstance(value, (list, tuple)) and value and all(map(is_stage, value))
            expect(value is None or valid, field, f"None or a list of values from {allowed}")
        expect(self.out_features is None or self.out_indices is None, "out_indices", "None when out_features is given")

    def _is_stage_name(self, name) -> bool:
        """Whether it is one of `stage_names`, which are too many to be listed in a damaged config.json."""
        number = name.removeprefix("stage") if isinstance(name, str) else ""
        is_number = number.isdecimal() and len(number) < 10 and name == f"stage{int(number)}"
        return name == "stem" or (is_number and 1 <= int(number) <= self.num_hidden_layers)

    def _expect(self, condition, field: str, expected: str):
        if not condition:
            raise ValueError(f"ViTSimpleConfig.{field}: expected {expected}, got {getattr(self, field)!r}")


# The arguments of __init__ without self and kwargs.
OWN_FIELDS = tuple(inspect.signature(ViTSimpleConfig.__init__).parameters)[1:-1]


def pair(value) -> tuple[int, int]:
    """(height, width) of a size, which is one int for both or such a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def patch_grid(image_size, patch_size) -> tuple[int, int]:
    """Rows and columns of the patches of an image."""
    (height, width), (patch_height, patch_width) = pair(image_size), pair(patch_size)
    return height // patch_height, width // patch_width


def is_integer(value, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_name(name: str | float) -> str:
    """The name of a class, which may be given as a number. Raises TypeError if it is neither."""
    if not isinstance(name, (str, int, float)):
        raise TypeError(f"expected a name, got {name!r}")
    return str(name)


def label_maps(names: Iterable[str]) -> dict[str, dict]:
    """The config fields `id2label` and `label2id` for class names in the order of the logits."""
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}


def is_size(value) -> bool:
    return is_integer(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_integer, value)))


def complete_labels(num_labels=None, id2label=None, label2id=None) -> dict:
    """The label fields of a config, both maps if one of them is given, in the order of the logits.

    Raises:
        ValueError: they are not labels, or contradict each other.
    """
    if num_labels is not None and not is_integer(num_labels):
        raise ValueError(f"ViTSimpleConfig.num_labels: expected a positive integer, got {num_labels!r}")
    if id2label is None and label2id is None:
        return {} if num_labels is None else {"num_labels": num_labels}
    try:  # keys are strings in JSON
        names = {int(index): as_name(name) for index, name in (id2label or {}).items()}
        indices = {as_name(name): int(index) for name, index in (label2id or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        wanted = "expected dictionaries of numbers and names"
        raise ValueError(f"ViTSimpleConfig.id2label and label2id: {wanted}, got {id2label} and {label2id}") from error
    names = names or {index: name for name, index in indices.items()}
    if id2label is None and len(names) < len(indices):
        raise ValueError(f"ViTSimpleConfig.label2id: expected one name for each number, got {label2id}")
    if sorted(names) != list(range(len(names))) or not names:
        wanted = "expected the classes to be numbered from 0 without gaps"
        raise ValueError(f"ViTSimpleConfig.id2label: {wanted}, got {sorted(names)}")
    maps = label_maps(names[index] for index in range(len(names)))
    # Two classes may have one name; label2id then has either.
    if indices and (indices.keys() != maps["label2id"].keys() or any(names[i] != name for name, i in indices.items())):
        wanted = f"expected {maps['label2id']}, as in id2label, or None"
        raise ValueError(f"ViTSimpleConfig.label2id: {wanted}, got {label2id}")
    if num_labels not in (None, len(names)):
        raise ValueError(f"ViTSimpleConfig.num_labels: expected {len(names)}, as in id2label, got {num_labels}")
    return maps | ({"label2id": indices} if indices else {})


def refuse_near_misses(keywords: Iterable[str]):
    """Raises ValueError for a keyword that resembles one of our fields: the base class accepts and ignores it."""
    for key in keywords:
        near = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key, OWN_FIELDS, 1, cutoff=0.75)), None)
        if near and key not in OWN_FIELDS:
            raise ValueError(f"ViTSimpleConfig has no field {key!r}: did you mean {near!r}?")


def refuse_kernels(content, key: str | None = None):
    """Refuses the content of a config.json that names a repository of attention kernels, at any depth.

    Some versions of transformers download such kernels and run them without `trust_remote_code` (CVE-2026-4372).

    Raises:
        ValueError: names the key and the repository.
    """
    if isinstance(content, dict):
        for name, value in content.items():
            refuse_kernels(value, name if name in ATTENTION_KEYS else key)
    elif isinstance(content, list):
        for value in content:
            refuse_kernels(value, key)
    elif key is not None and isinstance(content, str) and "/" in content:
        raise ValueError(
            f"config.json: expected no repository of kernels in {key!r}, got {content!r}: its code would run here. "
            "Remove the key from the file; to use a kernel that you trust, pass attn_implementation yourself"
        )
