import pytest
import torch

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.modeling_vit_simple import sincos2d
from vit_simple.training.config import TrainConfig
from vit_simple.training.initialization import initialize_mimetic

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZE |= {"image_size": 16, "patch_size": 4, "num_labels": 3}


def test_mimetic_attention_products_lie_near_a_diagonal():
    torch.manual_seed(0)
    model = ViTSimpleForImageClassification(ViTSimpleConfig(**SIZE))
    initialize_mimetic(model)
    for block in model.blocks:
        query, key, value = block.attn.qkv.weight.detach().view(3, 2, 32, 64)  # (heads, d, D) each
        for product in query.mT @ key:
            noise = product - torch.diag(product.diag())
            assert product.diag().mean() > 0.2 and noise.mean().abs() < 0.02
        product = block.attn.proj.weight.detach() @ value.flatten(0, 1)
        assert abs(product.diag().mean() + 0.4) < 0.03
        noise = product - torch.diag(product.diag())
        assert abs(noise.std() - 0.4 / 64**0.5) < 0.01
    assert torch.equal(model.pos_embed[:, 1:], sincos2d(4, 4, 64, torch.device("cpu")))


def test_mimetic_initialization_of_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="--initialization cannot be combined with --model_name_or_path"):
        TrainConfig(model_name_or_path="somewhere", initialization="mimetic")
