import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from tests.conftest import EVERY_SWITCH, TINY, tiny
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.modeling_vit_simple import Attention, Block

CLASSES = torch.tensor([0, 1, 2, 3, 4, 0])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5):
    """Equal within a fraction of the largest magnitude."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


# Against transformers' own ViT


def from_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of transformers' ViT classifier under our keys."""
    tensors = load_file(folder / "model.safetensors")
    ours = {"head.weight": tensors["classifier.weight"], "head.bias": tensors["classifier.bias"]}
    for key, tensor in tensors.items():
        key = key.removeprefix("vit.").replace("encoder.layer.", "blocks.")
        for theirs, our in {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "attention.output.dense": "attn.proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "layernorm": "norm",
        }.items():
            if theirs in key:
                key = key.replace(theirs, our)
                break
        if ".attention.attention." in key:
            continue
        ours[key] = tensor
    for block in range(TINY["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            prefix = f"vit.encoder.layer.{block}.attention.attention"
            parts = [tensors[f"{prefix}.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return {key: tensor for key, tensor in ours.items() if not key.startswith("classifier")}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_logits_and_gradients_equal_transformers_vit(tmp_path, pixels, attention):
    config = transformers.ViTConfig(**TINY, layer_norm_eps=1e-6, attn_implementation=attention)
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "weights")
    ours = tiny(attn_implementation=attention)
    ours.load_state_dict(from_transformers(tmp_path / "weights"))

    our_output, their_output = ours(pixels, labels=CLASSES), theirs(pixels, labels=CLASSES)
    assert_close(our_output.logits, their_output.logits)
    assert_close(our_output.loss, their_output.loss)
    tokens = ViTSimpleModel.forward(ours, pixels).last_hidden_state
    assert_close(tokens, theirs.vit(pixels).last_hidden_state)

    our_output.loss.backward()
    their_output.loss.backward()
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = from_transformers(tmp_path / "gradients")
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5 * largest.item(), msg=name)


# The notebook, and each of its six slips


def test_notebook_variant_runs_at_the_sizes_of_the_notebook():
    config = ViTSimpleConfig.from_variant("notebook/16", image_size=224, num_labels=10, hidden_dropout_prob=0.5)
    assert ViTSimpleForImageClassification(config)(torch.randn(10, 3, 224, 224)).logits.shape == (10, 10)


def small_attention() -> Attention:
    torch.manual_seed(0)
    config = ViTSimpleConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, attn_implementation="eager")
    attention = Attention(config).eval()
    attention.proj.weight.data, attention.proj.bias.data = torch.eye(8), torch.zeros(8)
    return attention


def small_model() -> ViTSimpleForImageClassification:
    torch.manual_seed(0)
    return ViTSimpleForImageClassification(ViTSimpleConfig(**TINY, attn_implementation="eager")).eval()


def key_and_value_have_their_own_projections():
    attention = small_attention()
    attention(torch.randn(1, 5, 8))[0].square().sum().backward()
    gradients = attention.qkv.weight.grad.chunk(3)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def attention_mixes_tokens_and_keeps_heads_apart():
    attention, x = small_attention(), torch.randn(1, 5, 8, requires_grad=True)
    attention(x)[0][0, 0].sum().backward()
    assert (x.grad[0, 1:].abs().amax(dim=-1) > 0).all(), "the first token must see every token"
    with torch.no_grad():
        before = attention(x)[0]
        attention.qkv.weight[4:8] += 1  # the queries of the second head
        after = attention(x)[0]
    assert torch.equal(before[..., :4], after[..., :4]) and not torch.equal(before[..., 4:], after[..., 4:])


def scores_are_scaled_by_the_width_of_a_head():
    attention, x = small_attention(), torch.randn(1, 5, 8)
    query, key, _ = attention.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = (query @ key.transpose(-2, -1) / 4**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention(x)[1], expected)


def positions_are_added():
    model, pixels = small_model(), torch.randn(1, 3, 16, 16)
    moved = pixels.unflatten(3, (4, 4)).roll(1, dims=3).flatten(3)  # the same patches at other positions
    assert not torch.allclose(model(pixels).logits, model(moved).logits)


def both_branches_of_a_block_reach_its_output():
    block, x = small_model().blocks[0], torch.randn(1, 17, 32)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        expected = x + block.attn(block.norm1(x))[0]
        torch.testing.assert_close(block(x)[0], expected)
    assert not torch.allclose(expected, x)


def tokens_and_positions_start_random():
    model = small_model()
    for parameter in (model.cls_token, model.pos_embed):
        assert 0.01 < parameter.std() < 0.03


def attention_with(projections=(0, 1, 2), heads_first=True, full_width=False):
    """A forward of Attention, without dropout, that can make the slips of the notebook."""

    def forward(self, x, num_queries=None):
        (B, T, D), h = x.shape, self.num_heads
        qkv = self.qkv(x).view(B, T, 3, h, D // h)
        query, key, value = (qkv[:, :, i].transpose(1, 2 if heads_first else 1) for i in projections)
        weights = (query @ key.transpose(-2, -1) * (D if full_width else D // h) ** -0.5).softmax(dim=-1)
        x = (weights @ value).transpose(1, 2 if heads_first else 1)
        return self.proj(x.flatten(2)), weights

    return forward


def block_that_loses_attention(self, x, num_queries=None):
    attended, weights = self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x + attended)), weights


def init_weights_with_zeros(self, module, init_weights=ViTSimpleModel._init_weights):
    init_weights(self, module)
    if module is self:
        for parameter in (self.cls_token, self.pos_embed):
            torch.nn.init.zeros_(parameter)


SLIPS = {  # the check that sees the slip, and the method that makes it
    "key_and_value_from_the_query_projection": (
        key_and_value_have_their_own_projections,
        (Attention, "forward", attention_with(projections=(0, 0, 0))),
    ),
    "heads_not_moved_in_front_of_the_tokens": (
        attention_mixes_tokens_and_keeps_heads_apart,
        (Attention, "forward", attention_with(heads_first=False)),
    ),
    "scores_scaled_by_the_full_width": (
        scores_are_scaled_by_the_width_of_a_head,
        (Attention, "forward", attention_with(full_width=True)),
    ),
    "positions_never_added": (
        positions_are_added,
        (ViTSimpleModel, "positions", lambda self, rows, columns: torch.zeros(())),
    ),
    "second_residual_adds_the_input_of_the_block": (
        both_branches_of_a_block_reach_its_output,
        (Block, "forward", block_that_loses_attention),
    ),
    "class_token_and_positions_start_at_zero": (
        tokens_and_positions_start_random,
        (ViTSimpleModel, "_init_weights", init_weights_with_zeros),
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_notebook_slip_is_absent(slip):
    SLIPS[slip][0]()


@pytest.mark.parametrize("slip", SLIPS)
def test_notebook_slip_is_seen_when_put_back(slip, monkeypatch):
    check, slipped = SLIPS[slip]
    monkeypatch.setattr(*slipped)
    with pytest.raises(AssertionError):
        check()


def test_notebook_attention_without_slips_is_attention():
    attention, x = small_attention(), torch.randn(1, 5, 8)
    for ours, expected in zip(attention(x), attention_with()(attention, x)):
        torch.testing.assert_close(ours, expected)


# Parameters


def test_state_dict_has_the_keys_of_timm():
    keys = {re.sub(r"^blocks\.\d+", "blocks.N", key) for key in tiny(**EVERY_SWITCH).state_dict()}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", *(f"blocks.N.{name}" for name in block), "norm", "head"]
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert keys == expected | {"cls_token", "reg_token", "pos_embed", "blocks.N.ls1.gamma", "blocks.N.ls2.gamma"}


def test_parameters_are_all_initialized():
    config = ViTSimpleConfig(**{**TINY, "hidden_size": 128}, num_register_tokens=8, layerscale_value=1e-5)
    for name, parameter in ViTSimpleForImageClassification(config).named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-5).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.mean()) < 0.006 and 0.015 < parameter.std() < 0.025, name


def test_initializer_range_and_head_init_std_are_obeyed():
    model = ViTSimpleForImageClassification(ViTSimpleConfig(**TINY, initializer_range=0.1, head_init_std=0.0))
    assert (model.head.weight == 0).all() and 0.09 < model.patch_embed.proj.weight.std() < 0.11


@pytest.mark.parametrize("fields", [{}, EVERY_SWITCH, {"position_embedding": "sincos2d"}, {"qkv_bias": False}])
def test_saved_model_gives_the_same_logits_bit_for_bit(tmp_path, pixels, fields):
    model = tiny(**fields)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert (again.config.label2id, list(again.state_dict())) == (model.config.label2id, list(model.state_dict()))


def test_weight_file_serves_backbone_and_classifier(tmp_path, pixels):
    classifier = tiny(**EVERY_SWITCH)
    classifier.save_pretrained(tmp_path / "classifier")
    backbone, info = AutoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(classifier.head(backbone(pixels).pooler_output), classifier(pixels).logits)

    backbone.save_pretrained(tmp_path / "backbone")
    path = tmp_path / "backbone"
    again, info = AutoModelForImageClassification.from_pretrained(path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"head.weight", "head.bias"}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in backbone.state_dict().items())
    assert (again.head.bias == 0).all() and 0.01 < again.head.weight.std() < 0.03


def test_num_labels_replaces_only_the_head(tmp_path):
    model = tiny(**EVERY_SWITCH)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert again.head.weight.shape == (3, 32) and 0.01 < again.head.weight.std() < 0.03
    kept = [name for name in model.state_dict() if not name.startswith("head")]
    assert all(torch.equal(again.state_dict()[name], model.state_dict()[name]) for name in kept)


def test_blocks_can_live_on_disk(tmp_path, pixels):
    model = tiny(**EVERY_SWITCH)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path, device_map="auto").pos_embed, model.pos_embed)
    names = {name for name, _ in model.named_children()} | {"cls_token", "reg_token", "pos_embed"}
    places = dict.fromkeys(names - {"blocks"}, "cpu") | {"blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"}
    again = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(again(pixels).logits, model(pixels).logits)


# Forward


def test_pooling_takes_the_class_token_or_the_mean_of_the_patches_only(pixels):
    output = ViTSimpleModel.forward(tiny(num_register_tokens=2), pixels)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    output = ViTSimpleModel.forward(tiny(num_register_tokens=2, pooling="mean"), pixels)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 3:].mean(dim=1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling, tokens", [("cls", 1), ("mean", 19)])
def test_class_token_shortcut_skips_patch_tokens_in_the_last_block_of_a_classifier(pixels, pooling, tokens, attention):
    model, seen = tiny(**{**EVERY_SWITCH, "pooling": pooling}, attn_implementation=attention), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(output.shape[1]))
    logits = model(pixels).logits
    assert seen == [19, 19, tokens]
    whole = ViTSimpleModel.forward(model, pixels)
    assert whole.last_hidden_state.shape == (6, 19, 32)
    assert_close(logits, model.head(whole.pooler_output))
    assert_close(logits, model(pixels, output_hidden_states=True).logits)
    assert seen[3:] == [19] * 6


def test_registers_stand_between_class_token_and_patches(pixels):
    model = tiny(num_register_tokens=2)
    tokens = model(pixels, output_hidden_states=True).hidden_states[0]
    assert tokens.shape == (6, 1 + 2 + 16, 32)
    assert torch.equal(tokens[0, 1:3], model.reg_token[0] + model.pos_embed[0, 1:3])


def test_layerscale_scales_both_branches(pixels):
    model = tiny(layerscale_value=0.1)
    block, x = model.blocks[0], torch.randn(2, 17, 32)
    attended = x + block.ls1.gamma * block.attn(block.norm1(x))[0]
    torch.testing.assert_close(block(x)[0], attended + block.ls2.gamma * block.mlp(block.norm2(attended)))


def test_drop_path_rises_linearly_from_zero_and_drops_whole_samples():
    model = tiny(drop_path_rate=0.5)
    assert [block.drop_path.rate for block in model.blocks] == [0, 0.25, 0.5]
    drop_path, x = model.blocks[2].drop_path, torch.rand(10_000, 3, 4) + 1
    assert torch.equal(drop_path(x), x)
    factors = drop_path.train()(x) / x
    assert torch.equal(factors, factors[:, :1, :1].expand_as(factors))
    assert set(factors.unique().tolist()) == {0.0, 2.0} and abs(factors.mean() - 1) < 0.05
    assert [block.drop_path.rate for block in tiny(num_hidden_layers=1, drop_path_rate=0.5).blocks] == [0]


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_acts_in_training_only(pixels, field, attention):
    model = tiny(**{field: 0.5}, attn_implementation=attention)
    assert torch.equal(model(pixels).logits, tiny(attn_implementation=attention)(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_image_size_and_patch_size_need_not_be_square():
    model = tiny(image_size=(8, 24), patch_size=(2, 4))
    assert model.config.grid_size == (4, 6) and model.pos_embed.shape == (1, 25, 32)
    assert model(torch.randn(2, 3, 8, 24)).logits.shape == (2, 5)
    with pytest.raises(
        ValueError, match=r"expected height and width \(8, 24\), or interpolate_pos_encoding=True, got \(24, 8\)"
    ):
        model(torch.randn(2, 3, 24, 8))


@pytest.mark.parametrize("fields", [{}, {"num_register_tokens": 2}, {"use_class_token": False, "pooling": "mean"}])
def test_positions_are_resampled_for_any_grid(fields, pixels):
    model = tiny(**fields)
    assert torch.equal(model(pixels, interpolate_pos_encoding=True).logits, model(pixels).logits)
    prefix = model.config.num_prefix_tokens
    positions = model.positions(3, 7)
    assert torch.equal(positions[:, :prefix], model.pos_embed[:, :prefix])
    grid = model.pos_embed[0, prefix:].view(4, 4, 32).permute(2, 0, 1)
    expected = F.interpolate(grid[None], size=(3, 7), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(positions[0, prefix:], expected[0].permute(1, 2, 0).reshape(21, 32))
    assert model(torch.randn(2, 3, 12, 28), interpolate_pos_encoding=True).logits.shape == (2, 5)
    half = model.bfloat16().positions(3, 7)
    assert half.dtype == torch.bfloat16


def test_sincos2d_positions_are_those_of_the_paper():
    model = tiny(position_embedding="sincos2d", num_register_tokens=1)
    assert "pos_embed" not in model.state_dict()
    positions = model.positions(3, 2)[0]
    assert (positions[:2] == 0).all()
    for row in range(3):
        for column in range(2):
            for i in range(8):
                frequency = 1 / 10_000 ** (i / 7)
                expected = [torch.tensor(place * frequency) for place in (column, column, row, row)]
                expected = [expected[0].sin(), expected[1].cos(), expected[2].sin(), expected[3].cos()]
                torch.testing.assert_close(positions[2 + row * 2 + column, i::8], torch.stack(expected))


def test_hidden_states_and_attentions_of_every_block(pixels):
    model = tiny(attn_implementation="eager")
    output = model(pixels, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert_close(output.attentions[0].sum(dim=-1), torch.ones(6, 4, 17))
    normed = model.norm(output.hidden_states[-1])
    assert torch.equal(normed, ViTSimpleModel.forward(model, pixels).last_hidden_state)


@pytest.mark.parametrize("kind", [ViTSimpleModel, ViTSimpleForImageClassification])
def test_return_dict_of_the_call_and_of_the_config_give_a_tuple(pixels, kind):
    model = kind(ViTSimpleConfig(**TINY)).eval()
    output = model(pixels, output_hidden_states=True)
    for options, by_config in [({"return_dict": False}, True), ({}, False), ({"return_dict": None}, False)]:
        model.config.return_dict = by_config
        values = model(pixels, output_hidden_states=True, **options)
        assert isinstance(values, tuple) and len(values) == len(output)
        assert torch.equal(values[0], output[0]) and len(values[-1]) == 4
    assert not isinstance(model(pixels, return_dict=True), tuple)


def test_forward_has_the_signature_of_transformers():
    """And no **kwargs: with them, Trainer leaves the division by its accumulation steps to the model."""
    flags = ["interpolate_pos_encoding", "output_attentions", "output_hidden_states", "return_dict"]
    assert list(inspect.signature(ViTSimpleModel.forward).parameters) == ["self", "pixel_values", *flags]
    classifier = inspect.signature(ViTSimpleForImageClassification.forward).parameters
    assert list(classifier) == ["self", "pixel_values", "labels", *flags]


def test_attention_can_be_switched_and_eager_agrees_with_sdpa(pixels):
    model = tiny(attn_implementation="sdpa")
    sdpa = model(pixels).logits
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(pixels, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(pixels, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(6, 4, 17, 17)] * 3
    assert_close(model(pixels).logits, sdpa)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(pixels, reentrant):
    plain, checkpointed = tiny(drop_path_rate=0.3).train(), tiny(drop_path_rate=0.3).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    for model in (plain, checkpointed):
        for block in model.blocks:
            block.norm1.register_forward_hook(lambda *_: runs.append(1))
        torch.manual_seed(0)
        model(pixels, labels=CLASSES).loss.backward()
    assert len(runs) == 3 + 2 * 3
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_compile_makes_one_graph_of_a_training_step(pixels):
    model = tiny(drop_path_rate=0.1, hidden_dropout_prob=0.1).train()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model, backend=count, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(pixels, labels=CLASSES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1
    other = torch.randn(6, 3, 8, 24)
    assert torch.compile(model.eval(), backend="eager", fullgraph=True)(
        other, interpolate_pos_encoding=True
    ).logits.equal(model(other, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_export_with_any_batch_size(pixels, pooling):
    model = tiny(**{**EVERY_SWITCH, "pooling": pooling})
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (pixels,), dynamic_shapes=shapes)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16)
        assert_close(program.module()(x).logits, model(x).logits)


def test_bfloat16_weights_accept_float32_pixels(pixels):
    model = tiny()
    logits = model(pixels).logits
    half = model.bfloat16()(pixels, labels=CLASSES)
    assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    assert_close(half.logits.float(), logits, tolerance=0.1)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((3, 16, 16), torch.float32, r"expected floating-point pixels of shape \(batch, 3, height, width\)"),
        ((1, 1, 16, 16), torch.float32, r"\(batch, 3, height, width\).* got torch.float32 of shape \(1, 1, 16, 16\)"),
        ((1, 3, 16, 16), torch.uint8, "from AutoImageProcessor, got torch.uint8"),
        ((1, 3, 32, 16), torch.float32, r"expected height and width \(16, 16\), or interpol.*, got \(32, 16\)"),
    ],
)
def test_pixel_values_that_cannot_work_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape, dtype=dtype))


def test_image_size_that_is_no_multiple_of_the_patch_size_is_refused():
    for size in [(18, 16), (16, 0)]:
        with pytest.raises(ValueError, match=r"expected height and width in multiples of \(4, 4\), got"):
            tiny()(torch.zeros(1, 3, *size), interpolate_pos_encoding=True)


# Loss


def test_loss_follows_problem_type(pixels):
    soft, scores = torch.rand(6, 5).softmax(dim=1), torch.randn(6, 5)
    logits = tiny()(pixels).logits
    for problem, labels, expected in [
        (None, CLASSES, F.cross_entropy(logits, CLASSES)),
        ("single_label_classification", CLASSES, F.cross_entropy(logits, CLASSES)),
        ("single_label_classification", soft, -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()),
        ("multi_label_classification", soft, F.binary_cross_entropy(logits.sigmoid(), soft)),
        ("regression", scores, (logits - scores).square().mean()),
    ]:
        model = tiny(problem_type=problem)
        torch.testing.assert_close(model(pixels, labels=labels).loss, expected)
        assert model.config.problem_type == problem


def test_regression_with_one_value_accepts_flat_labels(pixels):
    model, labels = tiny(num_labels=1, problem_type="regression"), torch.randn(6)
    expected = (model(pixels).logits[:, 0] - labels).square().mean()
    torch.testing.assert_close(model(pixels, labels=labels).loss, expected)
    assert torch.equal(model(pixels, labels=labels).loss, model(pixels, labels=labels[:, None]).loss)


@pytest.mark.parametrize(
    "fields, labels, message",
    [
        ({}, torch.rand(6, 5), r"config.problem_type one of \['single_label_classification', 'multi"),
        ({}, CLASSES.int(), "expected torch.int64 classes .* got torch.int32"),
        ({}, CLASSES[:5], r"expected shape \(6,\), got \(5,\)"),
        ({}, CLASSES[:, None], r"expected shape \(6,\), got \(6, 1\)"),
        ({"problem_type": "multi_label_classification"}, CLASSES, "got torch.int64, problem_type='multi_label"),
        ({"problem_type": "multi_label_classification"}, torch.rand(6), r"expected shape \(6, 5\), got \(6,\)"),
        ({"problem_type": "regression"}, torch.rand(6), r"expected shape \(6, 5\), got \(6,\)"),
        ({"num_labels": 1}, CLASSES, "got torch.int64, problem_type=None and num_labels=1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(pixels, fields, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)(pixels, labels=labels)
