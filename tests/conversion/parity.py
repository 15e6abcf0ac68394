"""Helpers of the parity tests: random models of other libraries, and their outputs."""

import json

import torch
import transformers

import vit_simple

IMAGES = {size: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)) for size in (16, 24)}


def random(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode, with weights that are all far from zero and from each other."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def outputs(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens after the last LayerNorm and the logits (None without a head) of a model of any library."""
    if not hasattr(model, "config"):  # timm's
        tokens = model.forward_features(images)
        return tokens, model.forward_head(tokens) if model.num_classes else None
    model_type, resized = model.config.model_type, {"interpolate_pos_encoding": True}
    if model_type == "vit_simple":
        output = model(images, output_hidden_states=True, **resized)
        return model.norm(output.hidden_states[-1]), getattr(output, "logits", None)
    if model_type.startswith("clip"):
        encoder = getattr(model, "vision_model", model)
        features = encoder(images, **resized)
        head = getattr(model, "visual_projection", None)
        logits = None if head is None else head(features.pooler_output)
        return encoder.post_layernorm(features.last_hidden_state), logits
    if model_type == "vit_mae":
        in_order = torch.arange(images[0, 0].numel() // 16.0).expand(len(images), -1)
        return model.base_model(images, noise=in_order, **resized).last_hidden_state, None
    if model_type.startswith("dinov2"):
        resized = {}  # always
    logits = model(images, **resized).logits if hasattr(model, "classifier") else None
    return model.base_model(images, **resized).last_hidden_state, logits


def assert_alike(outputs: tuple, expected: tuple):
    """Tokens and, if both models have a head, logits are equal to 1e-5 of the largest value."""
    for ours, theirs in zip(outputs, expected, strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def open_folder(folder):
    """The model of the class that the config names; all of its tensors must be in the file, and no others."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name, None) or getattr(vit_simple, name), {}
    model, info = model.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"]) and not info["unexpected_keys"], info
    return model.eval()
