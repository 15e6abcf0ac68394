"""First weights of a model that is trained from scratch."""

from typing import Any

import torch

from ..modeling_vit_simple import ViTSimpleForImageClassification, sincos2d


def factors(like_identity: float, noise: float, dim: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices (dim, rank) whose product, left times right transposed, is nearest to noise plus a diagonal."""
    left, values, right = torch.linalg.svd(noise * torch.randn(dim, dim) / dim**0.5 + like_identity * torch.eye(dim))
    scale = values[:rank].sqrt()
    return left[:, :rank] * scale, right[:rank].T * scale


@torch.no_grad()
def initialize_mimetic(model: ViTSimpleForImageClassification):
    """Gives attention the look of trained attention (Trockman & Kolter, 2023, arXiv:2305.09828, section 3).

    In each head, queries and keys start alike, so that tokens attend to similar tokens; values and projection together
    start near a negative diagonal; learned positions start at sine and cosine.
    """
    config = model.config
    D, heads, prefix = config.hidden_size, config.num_attention_heads, config.num_prefix_positions
    blocks: Any = model.blocks
    for block in blocks:
        query, key, value = block.attn.qkv.weight.chunk(3)  # (D, D) each, a view; d rows for each head
        for rows_of_query, rows_of_key in zip(query.chunk(heads), key.chunk(heads)):
            left, right = factors(0.7, 0.7, D, D // heads)
            rows_of_query.copy_(left.T)
            rows_of_key.copy_(right.T)
        left, right = factors(-0.4, 0.4, D, D)
        block.attn.proj.weight.copy_(left)
        value.copy_(right.T)
    if model.pos_embed is not None:
        rows, columns = config.position_grid_size
        model.pos_embed[:, prefix:] = sincos2d(rows, columns, D, model.pos_embed.device)
