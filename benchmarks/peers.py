"""The same plain ViT from other libraries, with our weights if they fit.

    pip install --target peers --no-deps timm vit-pytorch einops torchvision    # a torchvision that fits your torch
    PYTHONPATH=peers python -m benchmarks.model

The models of timm, transformers and torchvision take our weights. The ViT and SimpleViT of vit-pytorch have random
ones: their patch embedding differs and their attention has no bias, and SimpleViT has no class token.
"""

from torch import nn

from vit_simple import ViTSimpleForImageClassification
from vit_simple.conversion.state_dict import export_state_dict, their_keys
from vit_simple.conversion.transformers import VIT

PEERS = ("transformers", "timm", "torchvision", "vit-pytorch ViT", "vit-pytorch SimpleViT")
TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "blocks.*.norm1": "encoder.layers.encoder_layer_*.ln_1",
    "blocks.*.attn.qkv.weight": "encoder.layers.encoder_layer_*.self_attention.in_proj_weight",
    "blocks.*.attn.qkv.bias": "encoder.layers.encoder_layer_*.self_attention.in_proj_bias",
    "blocks.*.attn.proj": "encoder.layers.encoder_layer_*.self_attention.out_proj",
    "blocks.*.norm2": "encoder.layers.encoder_layer_*.ln_2",
    "blocks.*.mlp.fc1": "encoder.layers.encoder_layer_*.mlp.0",
    "blocks.*.mlp.fc2": "encoder.layers.encoder_layer_*.mlp.3",
    "norm": "encoder.ln",
    "head": "heads.head",
}


def build(name: str, ours: ViTSimpleForImageClassification) -> nn.Module:
    """A peer's model of the same size as ours, on the CPU in float32.

    Raises:
        ImportError: the library is not installed.
    """
    config, state = ours.config, ours.state_dict()
    size, patch, width, depth = config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers
    heads, inner, classes = config.num_attention_heads, config.intermediate_size, config.num_labels
    if name == "transformers":
        from transformers import ViTConfig, ViTForImageClassification

        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
        same = {field: getattr(config, field) for field in (*fields, "patch_size", "layer_norm_eps")}
        theirs = ViTConfig(**same, num_labels=classes)
        # In transformers 5 parameters have other names in memory than in files; from_pretrained knows both.
        return ViTForImageClassification.from_pretrained(
            None, config=theirs, state_dict=export_state_dict(state, VIT, "vit.")
        )
    if name == "timm":
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(size, patch, 3, classes, embed_dim=width, depth=depth, num_heads=heads)
        model.load_state_dict(state)
    elif name == "torchvision":
        from torchvision.models import VisionTransformer

        model = VisionTransformer(size, patch, depth, heads, width, inner, num_classes=classes)
        model.load_state_dict({their_keys(ours, TORCHVISION)[0]: tensor for ours, tensor in state.items()})
    else:
        from vit_pytorch import SimpleViT, ViT

        model_class = {"vit-pytorch ViT": ViT, "vit-pytorch SimpleViT": SimpleViT}[name]
        shape = {"image_size": size, "patch_size": patch, "num_classes": classes, "dim": width, "depth": depth}
        model = model_class(**shape, heads=heads, mlp_dim=inner, dim_head=width // heads)
    return model
