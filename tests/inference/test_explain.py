"""Maps of attention and relevance show what the model computes, at the right place of the image."""

import copy
import itertools
import json

import datasets
import matplotlib.text
import numpy as np
import PIL.Image
import pytest
import torch

from tests.conftest import DIGITS, processor, tiny
from vit_simple import ViTSimpleModel, explain
from vit_simple.data.processors import open_processor, padding_fields, stock_processor
from vit_simple.files import UserError
from vit_simple.inference.attention import (
    eager_attention,
    look,
    patch_colors,
    patch_map,
    position_similarity,
    relevance,
    rollout,
)
from vit_simple.inference.explain import explain_image
from vit_simple.inference.explanation import explain_pixels
from vit_simple.inference.figures import box_of, draw_grid, draw_positions, spread
from vit_simple.inference.opening import open_model
from vit_simple.train import main

FAMILIES = [
    {},
    {"num_register_tokens": 2, "no_embed_class": True, "layerscale_value": 0.1},
    {"use_class_token": False, "pooling": "mean", "position_embedding": "sincos2d"},
    {"pooling": "mean", "fc_norm": True, "num_register_tokens": 3},
    {"pre_norm": True, "mlp": "swiglu", "hidden_act": "silu"},
]


def watcher(patch: tuple[int, int] | None = None):
    """A model of one block and a grid of 4 x 4 whose class token attends to one patch or, without it, to white ones.

    What the class token finds there raises label 3 and lowers label 4.
    """
    model = tiny(num_hidden_layers=1, num_attention_heads=1)
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, "norm" in name and name.endswith("weight"))
    attention, width = model.blocks[0].attn, model.config.hidden_size
    with torch.no_grad():
        model.cls_token[..., 1] = 2
        if patch is None:
            model.patch_embed.proj.weight[0] = 1 / 48  # the mean brightness of 3 x 4 x 4 values, from -1 to 1
            model.patch_embed.proj.bias[0] = 1
        else:
            model.pos_embed[0, 1 + 4 * patch[0] + patch[1], 0] = 2
        attention.qkv.weight[0, 1] = attention.qkv.weight[width, 0] = 3  # the query of the class token, the key
        attention.qkv.weight[2 * width + 2, 0] = 1  # the value, which goes to channel 2
        attention.proj.weight[2, 2] = 1
        model.head.weight[3, 2], model.head.weight[4, 2] = 1, -1
    return model


# The numbers


@pytest.mark.parametrize("fields", FAMILIES)
def test_attention_rows_sum_to_1_for_every_family_and_size(fields):
    model, pixel_values = tiny(**fields), torch.randn(1, 3, 12, 24)
    prefix, grid = model.config.num_prefix_tokens, (3, 6)
    found = look(model, pixel_values)
    assert [tuple(weights.shape) for weights in found.attention] == [(4, prefix + 18, prefix + 18)] * 3
    for matrix in (*found.attention, rollout(found.attention)):
        torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(matrix.shape[:-1]))
    explained = explain_pixels(model, pixel_values, np.zeros((12, 24, 3), np.uint8), (0, 0, 24, 12))
    assert explained.attention.shape == (3, 4, *grid) and explained.colors.shape == (*grid, 3)
    assert explained.rollout.shape == explained.relevance.shape == explained.foreground.shape == grid
    expected = model(pixel_values, interpolate_pos_encoding=True).logits[0].softmax(dim=-1)
    assert explained.prediction == expected.argmax() and explained.confidence == pytest.approx(expected.max().item())
    backbone = ViTSimpleModel(model.config)
    backbone.load_state_dict(model.state_dict(), strict=False)
    expected = backbone.eval()(pixel_values, interpolate_pos_encoding=True).last_hidden_state[0, prefix:]
    torch.testing.assert_close(found.patches, expected)


def test_model_is_as_it_was_after_it_was_explained():
    model = tiny(attention_probs_dropout_prob=0.5).train()
    model.blocks[1].eval().requires_grad_(False)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ZeroDivisionError), eager_attention(model):
        assert not model.training
        raise ZeroDivisionError
    relevance(model, torch.randn(1, 3, 16, 16), 0)
    assert model.config._attn_implementation == "sdpa" and model.training and not model.blocks[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relevance_does_not_need_trainable_weights(pixels):
    model = tiny()
    expected = relevance(model, pixels[:1], 2)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(relevance(model, pixels[:1], 2), expected)


def test_patch_map_is_what_the_head_reads_or_a_patch():
    weights = torch.arange(81.0).view(9, 9)  # a class token, two registers and 2 x 3 patches
    cls, mean = tiny(num_register_tokens=2).config, tiny(num_register_tokens=2, pooling="mean").config
    assert patch_map(weights, cls, (2, 3)).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert patch_map(weights, mean, (2, 3)).tolist() == (weights[3:, 3:].sum(0) / 6).view(2, 3).tolist()
    assert patch_map(weights, cls, (2, 3), (1, 0)).tolist() == weights[6, 3:].view(2, 3).tolist()


def test_rollout_of_identity_attention_is_the_identity():
    assert torch.equal(rollout(torch.eye(5).expand(3, 2, 5, 5)), torch.eye(5))


def test_rollout_follows_its_formula(pixels):
    attention = look(tiny(num_register_tokens=2), pixels[:1]).attention
    expected = np.eye(19)
    for weights in attention:
        joint = 0.5 * weights.double().numpy().mean(axis=0) + 0.5 * np.eye(19)
        expected = (joint / joint.sum(axis=1, keepdims=True)) @ expected
    np.testing.assert_allclose(rollout(attention).numpy(), expected, atol=1e-6)


def test_relevance_follows_its_formula():
    """With gradients by finite differences: of a head's output, when one token attends more to one other."""
    model, label, step, T, d = tiny(image_size=8, num_hidden_layers=2, num_attention_heads=2).double(), 1, 1e-3, 5, 16
    pixel_values = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.eye(T, dtype=torch.double)
    with torch.no_grad():
        inputs = model(pixel_values, output_hidden_states=True).hidden_states
        for weights, block, x in zip(look(model, pixel_values).attention, model.blocks, inputs):
            value = block.attn.qkv(block.norm1(x))[0, :, 2 * model.config.hidden_size :].view(T, 2, d)
            gradient = torch.zeros(2, T, T, dtype=torch.double)
            for head, reader, token in np.ndindex(2, T, T):
                change = torch.zeros(1, T, 2, d, dtype=torch.double)
                change[0, reader, head] = step * value[token, head]
                logits = []
                for sign in (1, -1):
                    added = sign * change.flatten(2)
                    hook = block.attn.proj.register_forward_pre_hook(lambda _, args, added=added: args[0] + added)
                    logits.append(model(pixel_values, output_hidden_states=True).logits[0, label].item())
                    hook.remove()
                gradient[head, reader, token] = (logits[0] - logits[1]) / (2 * step)
            expected = expected + (weights * gradient).relu().mean(dim=0) @ expected
    expected = expected - torch.eye(T)
    assert expected.max() > 0.02
    torch.testing.assert_close(relevance(model, pixel_values, label), expected, atol=3e-5, rtol=1e-2)


@pytest.mark.parametrize("patch", [(1, 2), (3, 0)])
def test_model_that_looks_at_one_patch_is_seen_to_look_there(patch, pixels):
    model = watcher(patch)
    seen = explain_pixels(model, pixels[:1], np.zeros((16, 16, 3), np.uint8), (0, 0, 16, 16), label=3)
    assert seen.attention[0, 0][patch] > 0.99
    for values in (seen.rollout, seen.relevance):
        assert divmod(values.argmax().item(), 4) == patch
    assert patch_map(relevance(model, pixels[:1], 4), model.config, (4, 4))[patch] == 0  # it lowers this label


def test_patch_colors_separate_an_object_from_its_background():
    """Wherever the object is, and whichever sign the first component has."""
    for sign in (1, -1):
        patches = torch.randn(6, 6, 8, generator=torch.Generator().manual_seed(0)) * 0.1
        patches[2:4, 1:5, 0] += sign * 10
        patches[2:4, 1:3, 1], patches[2:4, 3:5, 1] = 3, -3
        looked_at = torch.full((6, 6), 0.01)
        looked_at[2:4, 1:5] = 0.1
        colors, foreground = (
            each.unflatten(0, (6, 6)) for each in patch_colors(patches.flatten(0, 1), looked_at.flatten())
        )
        assert foreground[2:4, 1:5].all() and foreground.sum() == 8 and not colors[~foreground].any()
        assert (colors[2:4, 1:3, 0] - colors[2:4, 3:5, 0]).abs().min() > 0.5  # its two halves


@pytest.mark.parametrize("fields", [{}, {"position_embedding": "sincos2d"}, {"num_register_tokens": 2}])
def test_position_similarity_is_the_cosine_of_two_patches(fields):
    model = tiny(**fields)
    positions = model.positions(4, 4)[0, model.config.num_prefix_tokens :].detach()
    found = position_similarity(model, (4, 4))
    expected = torch.nn.functional.cosine_similarity(positions[4 * 1 + 2], positions[4 * 3 + 0], dim=0)
    assert found[1, 2, 3, 0] == pytest.approx(expected.item(), abs=1e-5) and found[1, 2, 1, 2] == pytest.approx(1)


@pytest.mark.parametrize("problem, expected", [(None, torch.sigmoid), ("regression", torch.clone)])
def test_confidence_of_one_output_is_what_predict_says(problem, expected, pixels):
    model = tiny(num_labels=1, problem_type=problem)
    found = explain_pixels(model, pixels[:1], np.zeros((16, 16, 3), np.uint8), (0, 0, 16, 16))
    assert found.confidence == pytest.approx(expected(look(model, pixels[:1]).logits).item())


def test_regression_of_several_outputs_is_refused(pixels):
    model = tiny(num_labels=3, problem_type="regression")
    with pytest.raises(UserError, match="got one of 3 numbers"):
        explain_pixels(model, pixels[:1], np.zeros((16, 16, 3), np.uint8), (0, 0, 16, 16))


def test_patches_without_differences_are_the_foreground():
    for count in (1, 4):
        colors, foreground = patch_colors(torch.ones(count, 8), torch.full((count,), 0.1))
        assert foreground.all() and torch.equal(colors, torch.full((count, 3), 0.5))


# The figures


def text_overlaps(figure) -> list[tuple[str, ...]]:
    """Pairs of texts that cover each other, and texts that do not fit into the width of the figure."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for axis in figure.axes:
        texts += axis.findobj(matplotlib.text.Text) if axis.axison else [axis.title]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    pairs = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    return pairs + [(text,) for text, box in boxes if box.x0 < -2 or box.x1 > figure.bbox.x1 + 2]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (60, 600), (20, 20)])
def test_texts_of_figures_do_not_overlap(size, pixels):
    found = explain_pixels(tiny(), pixels[:1], np.zeros((size[1], size[0], 3), np.uint8), (0, 0, *size), label=1)
    found.prediction = 0
    figures = found.figures(["W" * 200, "a class with a very long name " * 4, *"cde"])
    for figure in (*figures.values(), draw_positions(torch.ones(1, 1, 1, 1))):
        assert text_overlaps(figure) == []
    assert min(figures["relevance"].axes[0].get_window_extent().size) > 50  # pixels of the image's shorter side


def test_grid_of_a_padded_image_shows_all_patches():
    axis = draw_grid(np.zeros((6, 80, 3), np.uint8), (0, -37, 80, 43), (4, 4)).axes[0]
    assert axis.get_xlim() == (-0.5, 79.5) and axis.get_ylim() == (42.5, -37.5)
    axis.figure.draw_without_rendering()
    extent = axis.get_window_extent()
    assert extent.width > 300 and extent.width == pytest.approx(extent.height, rel=0.01)


# The place


@pytest.mark.parametrize("is_cropped", [False, True])
@pytest.mark.parametrize("width, height", [(90, 60), (60, 90), (120, 120)])
def test_brightest_patch_lies_on_a_white_square(width, height, is_cropped):
    """The map moves with the square. A crop keeps 16 of the 18 pixels that the short side is resized to."""
    model, image_processor = watcher(), processor(16, is_cropped)
    kept = (round(16 / 18 * min(width, height)),) * 2 if is_cropped else (width, height)
    for row, column in np.ndindex(4, 4):
        x = width / 2 + (column - 1.5) * kept[0] / 4
        y = height / 2 + (row - 1.5) * kept[1] / 4
        image = np.zeros((height, width, 3), np.uint8)
        image[round(y) - 4 : round(y) + 5, round(x) - 4 : round(x) + 5] = 255
        seen = explain_image(model, image_processor, image, label=3)
        for values in (seen.attention[0, 0], seen.relevance):
            assert divmod(values.argmax().item(), 4) == (row, column)
            over = spread(values.numpy(), seen.box, height, width)
            brightest = np.argwhere(over == np.nanmax(over))
            assert np.abs(brightest.mean(axis=0) - (y, x)).max() < 2.5
            shown = seen.over(values).astype(int)
            assert (shown[..., 0] - shown[..., 2]).argmax() in np.flatnonzero(over == np.nanmax(over))  # yellow
        assert np.isnan(over).any() == is_cropped


def test_box_of_a_padded_image_reaches_beyond_its_edges():
    padded = open_processor(stock_processor((16, 16)) | padding_fields((16, 16)))
    assert box_of(padded, 40, 20) == (0, -10, 40, 30) and box_of(padded, 20, 40) == (-10, 0, 30, 40)


# The sanity check of Adebayo et al., arXiv:1810.03292


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([each.flatten().argsort().argsort().double() for each in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.slow
def test_relevance_depends_on_the_weights(tmp_path):
    main(["--output_dir", str(tmp_path / "run"), "--num_train_epochs", "6"])
    model, image_processor = open_model(tmp_path / "run")
    random = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in random.blocks.parameters():  # the same values in another order
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    found = []
    for row in datasets.load_dataset(DIGITS, split="test").select(range(50)):
        image = np.array(row["image"].convert("RGB"))
        maps = [explain_image(each, image_processor, image, label=row["label"]).relevance for each in (model, random)]
        found.append(rank_correlation(*maps))
    assert np.mean(found) < 0.5


# The command


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny()
    model.config.id2label = dict(enumerate(["cat", "dog", "$x^2$", "3", "4"]))
    model.save_pretrained(tmp_path / "model")
    content = json.dumps(stock_processor((16, 16), 18))
    (tmp_path / "model/preprocessor_config.json").write_text(content)
    return tmp_path / "model"


def test_explain_writes_figures_and_numbers(checkpoint, tmp_path, capsys):
    PIL.Image.effect_noise((40, 24), 50).save(tmp_path / "a.png")
    options = ["--label", "dog", "--patch", "1", "2", "--json"]
    explain.main([str(tmp_path / "a.png"), "--model", str(checkpoint), "--output_dir", str(tmp_path / "out"), *options])
    figures = {"grid", "attention", "attention_blocks", "rollout", "relevance", "components"}
    expected = {f"a/{figure}.png" for figure in figures} | {"a/numbers.json", "positions.png", "positions.json"}
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*")}
    assert files == expected and len(capsys.readouterr().out.splitlines()) == len(expected)
    for file in files:
        if file.endswith(".png"):
            PIL.Image.open(tmp_path / "out" / file).verify()
    numbers = json.loads((tmp_path / "out/a/numbers.json").read_text())
    assert numbers["size"] == [24, 40] and numbers["label"] == "dog" and np.shape(numbers["attention"]) == (3, 4, 4, 4)
    assert numbers["reader"] == "the patch in row 1, column 2" and 0 < np.sum(numbers["rollout"]) < 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--label", "bird"], "--label: expected a label of the model, or its number below 5, got 'bird'"),
        (["--patch", "4", "0"], "--patch: expected a row from 0 to 3 and a column from 0 to 3, got 4 and 0"),
        (["--patch", "0", "-1"], "a column from 0 to 3, got 0 and -1"),
        (["--model", "/dev/null"], "the model /dev/null cannot be read"),
    ],
)
def test_explain_refuses_what_it_cannot_show(checkpoint, tmp_path, capsys, options, message):
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    required = ["--model", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        explain.main([str(tmp_path / "a.png"), *required, *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "images, output_dir, message",
    [
        (["good.png", "text.png"], "out", "text.png cannot be used: not an image that Pillow knows"),
        (["good.png", "none.png"], "out", "none.png cannot be read: No such file or directory"),
        (["good.png", "b/good.jpg"], "out", "good.png and b/good.jpg need the same folder, good in --output_dir"),
        (["positions.png.png"], "out", "positions.png.png needs a folder positions.png in --output_dir"),
        (["good.png"], "text.png", "--output_dir: expected a folder, got the file text.png"),
        (["good.png"], "text.png/out", "--output_dir: expected a folder, got the file text.png"),
    ],
)
def test_explain_writes_nothing_if_an_image_or_its_folder_is_wrong(
    checkpoint, tmp_path, capsys, monkeypatch, images, output_dir, message
):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (20, 20)).save("good.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(SystemExit) as stop:
        explain.main([*images, "--model", str(checkpoint), "--output_dir", output_dir])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_explain_reads_a_file_once_with_the_bit_depth_of_the_checkpoint(checkpoint, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 2**12, (16, 16), np.uint16)
    PIL.Image.fromarray(pixels).save(tmp_path / "deep.png")
    PIL.Image.fromarray((pixels >> 4).astype(np.uint8)).save(tmp_path / "same.png")
    (checkpoint / "provenance.json").write_text('{"dataset": {"bit_depth": 12}}')
    images = [str(tmp_path / name) for name in ("deep.png", "same.png", "model/../same.png")]
    explain.main([*images, "--model", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--json"])
    assert sum(line.endswith("numbers.json") for line in capsys.readouterr().out.splitlines()) == 2
    deep, same = (json.loads((tmp_path / f"out/{name}/numbers.json").read_text()) for name in ("deep", "same"))
    assert deep["confidence"] == same["confidence"] and deep["attention"] == same["attention"]


def test_explain_of_a_checkpoint_without_a_head_has_no_relevance(checkpoint, tmp_path, capsys):
    ViTSimpleModel.from_pretrained(checkpoint).save_pretrained(checkpoint)
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    options = [str(tmp_path / "a.png"), "--model", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    explain.main([*options, "--json"])
    assert not (tmp_path / "out/a/relevance.png").exists() and (tmp_path / "out/a/rollout.png").exists()
    assert "label" not in json.loads((tmp_path / "out/a/numbers.json").read_text())
    with pytest.raises(SystemExit):
        explain.main([*options, "--label", "0"])
    assert "the checkpoint has no head" in capsys.readouterr().err
