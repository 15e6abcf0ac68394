"""What parity tests share: random networks of others, and what they make of images."""

import json

import torch
import transformers

import vit_simple

IMAGES = {size: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)) for size in (16, 24)}


def random(model: torch.nn.Module) -> torch.nn.Module:
    """The network in evaluation mode with weights that are all far from zero and from each other."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def outputs(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens behind the last LayerNorm and, where there is a head, its logits; whosever class it is."""
    if not hasattr(model, "config"):  # timm's
        tokens = model.forward_features(images)
        return tokens, model.forward_head(tokens) if model.num_classes else None
    kind, resized = model.config.model_type, {"interpolate_pos_encoding": True}
    if kind == "vit_simple":
        output = model(images, output_hidden_states=True, **resized)
        return model.norm(output.hidden_states[-1]), getattr(output, "logits", None)
    if kind.startswith("clip"):
        tower = getattr(model, "vision_model", model)
        features = tower(images, **resized)
        head = getattr(model, "visual_projection", None)
        logits = None if head is None else head(features.pooler_output)
        return tower.post_layernorm(features.last_hidden_state), logits
    if kind == "vit_mae":
        in_order = torch.arange(images[0, 0].numel() // 16.0).expand(len(images), -1)
        return model.base_model(images, noise=in_order, **resized).last_hidden_state, None
    if kind.startswith("dinov2"):
        resized = {}  # they always do
    logits = model(images, **resized).logits if hasattr(model, "classifier") else None
    return model.base_model(images, **resized).last_hidden_state, logits


def assert_alike(found: tuple, expected: tuple):
    """Tokens and, where both have a head, logits are equal to 1e-5 of the largest."""
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def open_folder(folder):
    """The network of the class that the config names, which finds all of its tensors there."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name, None) or getattr(vit_simple, name), {}
    model, info = model.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"]) and not info["unexpected_keys"], info
    return model.eval()
