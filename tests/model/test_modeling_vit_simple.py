import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from tests.conftest import EVERY_SWITCH, TINY, tiny
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple import modeling_vit_simple as modeling

CLASSES = torch.tensor([0, 1, 2, 3, 4, 0])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5):
    """Equal within a part of the largest magnitude."""
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


# The notebook, and each of its slips


def test_the_notebook_forward_at_its_own_sizes():
    config = ViTSimpleConfig.from_variant("notebook/16", image_size=224, num_labels=10, hidden_dropout_prob=0.5)
    assert ViTSimpleForImageClassification(config)(torch.randn(10, 3, 224, 224)).logits.shape == (10, 10)


def attention_of(module):
    torch.manual_seed(0)
    config = ViTSimpleConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, attn_implementation="eager")
    attention = module.Attention(config).eval()
    attention.proj.weight.data, attention.proj.bias.data = torch.eye(8), torch.zeros(8)
    return attention


def key_and_value_have_their_own_projections(module):
    attention = attention_of(module)
    attention(torch.randn(1, 5, 8))[0].square().sum().backward()
    gradients = attention.qkv.weight.grad.chunk(3)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def attention_mixes_tokens_and_keeps_heads_apart(module):
    attention, x = attention_of(module), torch.randn(1, 5, 8, requires_grad=True)
    attention(x)[0][0, 0].sum().backward()
    assert (x.grad[0, 1:].abs().amax(dim=-1) > 0).all(), "the first token must see every token"
    first_head = attention_of(module)
    with torch.no_grad():
        before = first_head(x)[0]
        first_head.qkv.weight[4:8] += 1  # the queries of the second head
        after = first_head(x)[0]
    assert torch.equal(before[..., :4], after[..., :4]) and not torch.equal(before[..., 4:], after[..., 4:])


def scores_are_scaled_by_the_width_of_a_head(module):
    attention, x = attention_of(module), torch.randn(1, 5, 8)
    query, key, _ = attention.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = (query @ key.transpose(-2, -1) / 4**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention(x)[1], expected)


def network_of(module):
    config = ViTSimpleConfig(**TINY, attn_implementation="eager")
    torch.manual_seed(0)
    return module.ViTSimpleForImageClassification(config).eval()


def positions_are_added(module):
    model, pixels = network_of(module), torch.randn(1, 3, 16, 16)
    patches = pixels.unflatten(3, (4, 4)).roll(1, dims=3).flatten(3)  # the same patches in other places
    assert not torch.allclose(model(pixels).logits, model(patches).logits)


def both_branches_of_a_block_reach_its_output(module):
    block, x = network_of(module).blocks[0], torch.randn(1, 17, 32)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        expected = x + block.attn(block.norm1(x))[0]
        torch.testing.assert_close(block(x)[0], expected)
    assert not torch.allclose(expected, x)


def tokens_and_positions_start_random(module):
    model = network_of(module)
    for parameter in (model.cls_token, model.pos_embed):
        assert 0.01 < parameter.std() < 0.03


SLIPS = {
    "key and value from the query's projection": (
        key_and_value_have_their_own_projections,
        "query, key, value = (part.",
        "query = key = value = next(part.",
    ),
    "heads not moved in front of the tokens": (
        attention_mixes_tokens_and_keeps_heads_apart,
        "part.view(B, T, h, D // h).transpose(1, 2)",
        "part.view(B, T, h, D // h)",
    ),
    "scaled by the full width": (
        scores_are_scaled_by_the_width_of_a_head,
        "scaling=(D // h) ** -0.5",
        "scaling=D**-0.5",
    ),
    "positions never added": (
        positions_are_added,
        "self.dropout(x + self.positions(H // P_height, W // P_width))",
        "self.dropout(x)",
    ),
    "the second residual adds the block's input": (
        both_branches_of_a_block_reach_its_output,
        "        x = x[:, :Q] + self.drop_path(self.ls1(attended))\n        x = x + self.drop_path(",
        "        y = x[:, :Q] + self.drop_path(self.ls1(attended))\n        x = x + 0 * y + self.drop_path(",
    ),
    "class token and positions start at zero": (
        tokens_and_positions_start_random,
        '            if name == "bias":\n',
        '            if name in ("bias", "cls_token", "pos_embed"):\n',
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_the_notebook_is_absent(slip):
    SLIPS[slip][0](modeling)


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_that_is_put_back_is_seen(slip, tmp_path):
    check, right, wrong = SLIPS[slip]
    source = Path(modeling.__file__).read_text()
    assert source.count(right) == 1
    (tmp_path / "slipped.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("vit_simple.slipped", tmp_path / "slipped.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        with pytest.raises(AssertionError):
            check(module)
    finally:
        del sys.modules[spec.name]


# Parameters


def test_the_keys_are_timms():
    keys = {re.sub(r"^blocks\.\d+", "blocks.N", key) for key in tiny(**EVERY_SWITCH).state_dict()}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", *(f"blocks.N.{name}" for name in block), "norm", "head"]
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert keys == expected | {"cls_token", "reg_token", "pos_embed", "blocks.N.ls1.gamma", "blocks.N.ls2.gamma"}


def test_every_parameter_is_initialised():
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
def test_a_saved_model_gives_the_same_logits_bit_for_bit(tmp_path, pixels, fields):
    model = tiny(**fields)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert (again.config.label2id, list(again.state_dict())) == (model.config.label2id, list(model.state_dict()))


def test_one_file_serves_backbone_and_classifier(tmp_path, pixels):
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


def test_another_number_of_labels_replaces_the_head_alone(tmp_path):
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
def test_no_token_passes_the_last_block_for_nothing(pixels, pooling, tokens, attention):
    model, seen = tiny(**{**EVERY_SWITCH, "pooling": pooling}, attn_implementation=attention), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(output.shape[1]))
    spared = ViTSimpleModel.forward(model, pixels, pooled_only=True)
    logits = model(pixels).logits
    assert seen == [19, 19, tokens] * 2 and spared.last_hidden_state.shape == (6, tokens, 32)
    whole = ViTSimpleModel.forward(model, pixels)
    assert_close(spared.pooler_output, whole.pooler_output)
    assert_close(logits, model(pixels, output_hidden_states=True).logits)
    assert seen[6:] == [19] * 6 and whole.last_hidden_state.shape == (6, 19, 32)


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


def test_images_and_patches_need_not_be_square():
    model = tiny(image_size=(8, 24), patch_size=(2, 4))
    assert model.config.grid_size == (4, 6) and model.pos_embed.shape == (1, 25, 32)
    assert model(torch.randn(2, 3, 8, 24)).logits.shape == (2, 5)
    with pytest.raises(ValueError, match=r"expected height and width \(8, 24\), got \(24, 8\)"):
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


def test_hidden_states_attentions_and_tuples(pixels):
    model = tiny(attn_implementation="eager")
    output = model(pixels, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert_close(output.attentions[0].sum(dim=-1), torch.ones(6, 4, 17))
    normed = model.norm(output.hidden_states[-1])
    assert torch.equal(normed, ViTSimpleModel.forward(model, pixels).last_hidden_state)
    logits, hidden_states = model(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, output.logits) and len(hidden_states) == 4
    model.config.return_dict = False
    assert isinstance(model(pixels, labels=CLASSES), tuple)


def test_eager_and_sdpa_attention_agree_and_can_be_switched(pixels):
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


def test_a_training_step_compiles_into_one_graph_once(pixels):
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


def test_bfloat16_weights_take_float32_pixels(pixels):
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
        ((1, 3, 16, 16), torch.uint8, "AutoImageProcessor makes them, got torch.uint8"),
        ((1, 3, 32, 16), torch.float32, r"expected height and width \(16, 16\), got \(32, 16\).*interpolate_pos_enc"),
    ],
)
def test_pixels_that_cannot_work_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape, dtype=dtype))


def test_a_size_that_would_lose_pixels_is_refused():
    for size in [(18, 16), (16, 0)]:
        with pytest.raises(ValueError, match=r"expected height and width in multiples of \(4, 4\), got"):
            tiny()(torch.zeros(1, 3, *size), interpolate_pos_encoding=True)


# Loss


def test_losses_are_those_of_the_problem(pixels):
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


def test_regression_of_one_value_takes_flat_labels(pixels):
    model, labels = tiny(num_labels=1, problem_type="regression"), torch.randn(6)
    expected = (model(pixels).logits[:, 0] - labels).square().mean()
    torch.testing.assert_close(model(pixels, labels=labels).loss, expected)
    assert torch.equal(model(pixels, labels=labels).loss, model(pixels, labels=labels[:, None]).loss)


@pytest.mark.parametrize(
    "fields, labels, message",
    [
        ({}, torch.rand(6, 5), "config.problem_type set to 'single_label_classification' \\(soft targets\\)"),
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
