"""What a model looks at, as numbers: attention, rollout, relevance, patch components and position similarity.

L blocks, h heads, T tokens = prefix (class token, registers) + N, N patches = rows x columns, D hidden_size. Every
function takes one image, (1, C, H, W), of any height and width that are multiples of the patch size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..configuration_vit_simple import ViTSimpleConfig, pair


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model is in evaluation mode and can return its attention; then it is as it was."""
    implementation, modes = model.config._attn_implementation, [(module, module.training) for module in model.modules()]
    try:
        model.config._attn_implementation = "eager"
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # no compilation for one image
            yield
    finally:
        model.config._attn_implementation = implementation
        for module, training in modes:
            module.training = training


def grid_of(pixel_values: torch.Tensor, config: ViTSimpleConfig) -> tuple[int, int]:
    """Rows and columns of the patches of an image."""
    (height, width), (patch_height, patch_width) = pixel_values.shape[2:], pair(config.patch_size)
    return height // patch_height, width // patch_width


class Look(NamedTuple):
    """What a model computes for an image: the attention of each block, whose rows sum to 1, the final patch tokens and,
    if it has a head, the logits.
    """

    attention: tuple[torch.Tensor, ...]  # L x (h, T, T)
    patches: torch.Tensor  # (N, D)
    logits: torch.Tensor | None  # (K,)


@torch.no_grad()
def look(model: PreTrainedModel, pixel_values: torch.Tensor) -> Look:
    with eager_attention(model):
        output = model(pixel_values, interpolate_pos_encoding=True, output_attentions=True, output_hidden_states=True)
        patches = model.norm(output.hidden_states[-1])[0, model.config.num_prefix_tokens :]
    attention = tuple(weights[0] for weights in output.attentions)
    return Look(attention, patches, output.logits[0] if "logits" in output else None)


def patch_map(
    weights: torch.Tensor, config: ViTSimpleConfig, grid: tuple[int, int], patch: tuple[int, int] | None = None
) -> torch.Tensor:
    """Weights from tokens to tokens, (..., T, T), as a map of the patches for one reader, (..., rows, columns).

    The reader is what the head reads: the class token or, with mean pooling, the mean of all patches. `patch`, a row
    and a column, makes it that patch. The weights of class token and registers are left out, so a map of attention
    sums to less than 1.
    """
    prefix = config.num_prefix_tokens
    if patch is not None:
        reader = weights[..., prefix + patch[0] * grid[1] + patch[1], :]
    elif config.pooling == "cls":
        reader = weights[..., 0, :]
    else:
        reader = weights[..., prefix:, :].mean(dim=-2)
    return reader[..., prefix:].unflatten(-1, grid)


def rollout(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each input token reaches each output token, (T, T), whose rows sum to 1; from L x (h, T, T).

    Attention rollout (Abnar and Zuidema, arXiv:2005.00928, section 3): the product of the blocks' attention, each
    averaged over its heads and, for the residual, with the identity. Class token and registers pass on what they
    gathered.
    """
    result = identity = identity_like(attention[0])
    for weights in attention:
        result = (weights.mean(dim=0) + identity) / 2 @ result
    return result


def identity_like(weights: torch.Tensor) -> torch.Tensor:
    """The identity, (T, T), for weights (..., T, T)."""
    return torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)


def relevance(model: PreTrainedModel, pixel_values: torch.Tensor, label: int) -> torch.Tensor:
    """How much the attention from each token to each token raises the logit of a label, (T, T).

    The rule of Chefer, Gur and Wolf (arXiv:2103.15679, section 3, equations 5 and 6) for self-attention: the positive
    part of attention times gradient, averaged over heads, is added up over the blocks. The identity with which they
    begin is left out at the end.
    """
    with eager_attention(model), torch.enable_grad():
        pixel_values = pixel_values.detach().requires_grad_()  # so that there are gradients if all weights are frozen
        output = model(pixel_values, interpolate_pos_encoding=True, output_attentions=True)
        gradients = torch.autograd.grad(output.logits[0, label], output.attentions)
    result = identity = identity_like(gradients[0])
    for weights, gradient in zip(output.attentions, gradients):  # (1, h, T, T)
        result = result + (weights.detach() * gradient).relu().mean(dim=1)[0] @ result
    return result - identity


def principal_components(x: torch.Tensor, count: int) -> torch.Tensor:
    """The first principal components, (N, count), of vectors (N, D); those that do not exist are 0.

    Their sign is such that the value of each that is farthest from 0 is positive.
    """
    x = x.float() - x.float().mean(dim=0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:count]
    components = F.pad(x @ directions.T, (0, count - len(directions)))
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    return components * torch.where(largest < 0, -1, 1)


def patch_colors(patches: torch.Tensor, looked_at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colors that are alike where the model's patch tokens are alike, and which patches are the foreground.

    As DINOv2 shows its features (arXiv:2304.07193, figure 1): the first principal component separates foreground
    and background, and the first three of the foreground become red, green and blue.

    Args:
        patches: the final patch tokens, (N, D).
        looked_at: attention to each patch, (N,); the side of the first component with more of it is the foreground.

    Returns:
        Colors in [0, 1], (N, 3), black in the background, and the foreground, (N,). Without differences between the
        patches, all are the foreground.
    """
    first = principal_components(patches, 1)[:, 0]
    foreground = first > 0
    if looked_at[foreground].mean() < looked_at[~foreground].mean():
        foreground = ~foreground
    if not foreground.any():
        foreground = torch.ones_like(foreground)
    components = principal_components(patches[foreground], 3)
    low, high = components.quantile(torch.tensor([0.01, 0.99], device=patches.device), dim=0)
    colors = torch.zeros(len(patches), 3, device=patches.device)
    scaled = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colors[foreground] = torch.where(high > low, scaled, 0.5)  # gray if all are alike: black is the background
    return colors, foreground


@torch.no_grad()
def position_similarity(model: PreTrainedModel, grid: tuple[int, int]) -> torch.Tensor:
    """The cosine similarity of the positions of all patches, (rows, columns, rows, columns)."""
    positions = F.normalize(model.positions(*grid)[0, model.config.num_prefix_tokens :].float(), dim=-1)  # (N, D)
    return (positions @ positions.T).unflatten(1, grid).unflatten(0, grid)
