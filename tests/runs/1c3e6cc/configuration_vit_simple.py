"""Configuration of ViTSimple, a plain Vision Transformer."""

import difflib
import inspect

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

AUTO_MAP = {
    "AutoConfig": "configuration_vit_simple.ViTSimpleConfig",
    "AutoModel": "modeling_vit_simple.ViTSimpleModel",
    "AutoModelForImageClassification": "modeling_vit_simple.ViTSimpleForImageClassification",
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

# What timm and the notebook call our fields. Base classes take unknown keywords, so these would pass unused.
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
}


class ViTSimpleConfig(PretrainedConfig):
    r"""Everything that shapes a ViTSimple network (ViT: Dosovitskiy et al., arXiv:2010.11929, section 3.1).

    Args:
        hidden_size: width D of every token; a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads h.
        intermediate_size: hidden width of the MLP.
        hidden_act: activation of the MLP, a name in `transformers.activations.ACT2FN`.
        hidden_dropout_prob: dropout after the embedding and at the end of both branches of a block, in [0, 1).
        attention_probs_dropout_prob: dropout on the attention weights, in [0, 1).
        drop_path_rate: probability that a sample skips a branch at the last block; 0 at the first, rising linearly
            (stochastic depth, arXiv:1603.09382, section 3, here drawn for each sample). In [0, 1).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the truncated normal that fills kernels, tokens and positions.
        image_size: height and width in pixels, an int or a (height, width) pair; a multiple of `patch_size`.
        patch_size: height and width of a patch in pixels, an int or a (height, width) pair.
        num_channels: channels of an image.
        qkv_bias: whether query, key and value have a bias.
        use_class_token: whether a learned token stands before the patches.
        pooling: `"cls"`, the class token, or `"mean"`, the mean of the patch tokens only.
        fc_norm: whether the last LayerNorm follows the mean instead of preceding it (MAE fine-tuned, timm's `avg`).
        num_register_tokens: learned tokens between class token and patches (arXiv:2309.16588, section 2.2; DINOv2).
        position_embedding: `"learned"`, or `"sincos2d"`: fixed, on the patches only (arXiv:2205.01580).
        no_embed_class: whether class token and registers carry no position (DeiT-III, DINOv2 with registers).
        pre_norm: whether a LayerNorm precedes the blocks, and patches have no bias (CLIP).
        mlp: `"mlp"`, or `"swiglu"`, whose `intermediate_size` is the width after the gate (DINOv2 giant).
        layerscale_value: initial LayerScale of both branches (arXiv:2103.17239, section 2; DeiT-III, DINOv2) or None.
        head_init_std: standard deviation of the classifier's kernel; None means `initializer_range`, 0 starts at zero.
        kwargs: what every transformers config takes, such as `num_labels`, `id2label` and `problem_type`.

    Raises:
        ValueError: a value that cannot work, or a keyword that is nearly one of the above.
    """

    model_type = "vit_simple"

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
        **kwargs,
    ):
        fields = {name: value for name, value in locals().items() if name in OWN_FIELDS}
        refuse_near_misses(kwargs)
        if not is_count(kwargs.get("num_labels", 1)):
            raise ValueError(f"ViTSimpleConfig.num_labels: expected a positive integer, got {kwargs['num_labels']!r}")
        for name, value in fields.items():
            setattr(self, name, value)
        if kwargs.get("id2label"):  # in the order of the outputs: JSON has its keys as strings
            names = kwargs["id2label"]
            kwargs["id2label"] = {int(index): names[index] for index in sorted(names, key=int)}
        # Complete and local whichever class saves, and wherever this config came from: a saved folder stands alone.
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        super().__init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As transformers' own, with `kwargs` that override fields; a near miss of a field is refused here, too."""
        refuse_near_misses(kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_variant(cls, variant: str, **kwargs) -> "ViTSimpleConfig":
        """A published size and a patch size, `"S/16"` or `"notebook/16"`; `kwargs` are further fields.

        Raises:
            ValueError: a variant that is not `NAME/PATCH` with a name in `VARIANTS`.
        """
        name, _, patch = str(variant).partition("/")
        if name not in VARIANTS or not patch.isdecimal():
            raise ValueError(f"variant: expected NAME/PATCH with NAME in {list(VARIANTS)}, got {variant!r}")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return cls(**{**dict(zip(names, VARIANTS[name])), "patch_size": int(patch), **kwargs})

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid, (H/P, W/P)."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def num_prefix_positions(self) -> int:
        """Tokens before the patches that have a learned position."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def check(self):
        """Checks every field; called again when a model is built, since overrides are set after `__init__`.

        Raises:
            ValueError: names the field, what was expected and what was got.
        """

        def expect(condition, field, expected):
            if not condition:
                raise ValueError(f"ViTSimpleConfig.{field}: expected {expected}, got {getattr(self, field)!r}")

        def is_number(value):
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            expect(is_count(getattr(self, field)), field, "a positive integer")
        expect(is_count(self.num_register_tokens, least=0), "num_register_tokens", "0 or a positive integer")
        expect(is_count(self.num_labels), "num_labels", "a positive integer")
        for field in ("image_size", "patch_size"):
            value = getattr(self, field)
            is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value))
            expect(is_count(value) or is_pair, field, "a positive integer or a (height, width) pair of them")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            value = getattr(self, field)
            expect(is_number(value) and 0 <= value < 1, field, "a number in [0, 1)")
        for field in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, field)
            expect(is_number(value) and 0 < value < float("inf"), field, "a positive number")
        for field in ("layerscale_value", "head_init_std"):
            value = getattr(self, field)
            valid = value is None or (is_number(value) and 0 <= value < float("inf"))
            expect(valid, field, "None or a number that is not negative")
        for field in ("qkv_bias", "use_class_token", "fc_norm", "no_embed_class", "pre_norm"):
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

        expect(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        several = self.problem_type != "single_label_classification" or self.num_labels > 1
        expect(several, "num_labels", "at least 2 for problem_type='single_label_classification'")
        multiple = all(size % patch == 0 for size, patch in zip(pair(self.image_size), pair(self.patch_size)))
        expect(multiple, "image_size", f"a multiple of patch_size={self.patch_size}")
        expect(self.pooling == "mean" or self.use_class_token, "pooling", "'mean' when use_class_token=False")
        expect(self.pooling == "mean" or not self.fc_norm, "pooling", "'mean' when fc_norm=True")
        expect(self.mlp == "mlp" or self.hidden_act == "silu", "hidden_act", "'silu' when mlp='swiglu'")
        quarter = self.position_embedding == "learned" or self.hidden_size % 4 == 0
        expect(quarter, "hidden_size", "a multiple of 4 for position_embedding='sincos2d'")


OWN_FIELDS = tuple(inspect.signature(ViTSimpleConfig.__init__).parameters)[1:-1]


def pair(value) -> tuple[int, int]:
    """An int for both sides, or (height, width), as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def is_count(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def label_maps(given: dict, stored: ViTSimpleConfig) -> dict:
    """`given` with both maps of the labels or none: one map tells the other, a new number gets new names."""
    given = dict(given)
    if "id2label" not in given and "label2id" in given:
        given["id2label"] = {index: name for name, index in given["label2id"].items()}
    if "id2label" not in given and is_count(given.get("num_labels")):
        count = given.pop("num_labels")
        if count != stored.num_labels:
            given["id2label"] = {index: f"LABEL_{index}" for index in range(count)}
    if "id2label" in given:
        given.setdefault("label2id", {name: int(index) for index, name in given["id2label"].items()})
    return given


def refuse_near_misses(keywords: dict):
    """Raises ValueError for a keyword that is nearly one of our fields: base classes take any, and would ignore it."""
    for key in keywords:
        near = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key, OWN_FIELDS, 1, cutoff=0.75)), None)
        if near and key not in OWN_FIELDS:
            raise ValueError(f"ViTSimpleConfig has no field {key!r}: did you mean {near!r}?")
