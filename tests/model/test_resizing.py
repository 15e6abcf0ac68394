"""Loading a checkpoint at another image size, with other channels, patches and labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForImageClassification

from tests.conftest import EVERY_SWITCH, TINY, tiny
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.configuration_vit_simple import label_maps
from vit_simple.modeling_vit_simple import resample_kernel, resample_positions, resize


@pytest.fixture
def saved(tmp_path):
    def save(**fields) -> tuple[ViTSimpleForImageClassification, str]:
        model = tiny(**fields)
        model.save_pretrained(tmp_path / "checkpoint")
        return model, str(tmp_path / "checkpoint")

    return save


def assert_config_describes(model):
    """A model built from the config has the same shapes and gives the same outputs."""
    again = type(model)(ViTSimpleConfig(**model.config.to_dict()))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    size, channels = model.config.image_size, model.config.num_channels
    images = torch.randn(2, channels, *((size, size) if isinstance(size, int) else size))
    output = model.eval()(images)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images)[0], output[0])


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification, ViTSimpleForImageClassification])
@pytest.mark.parametrize(
    "fields, change",
    [
        ({"image_size": 24}, "positions (4, 4) to (6, 6)"),
        ({"image_size": (16, 32)}, "positions (4, 4) to (4, 8)"),
        ({"num_channels": 1}, "patches 3 x 4 to 1 x 4"),
        ({"num_channels": 6}, "patches 3 x 4 to 6 x 4"),
        ({"patch_size": 8}, "patches 3 x 4 to 3 x 8, positions (4, 4) to (2, 2)"),
        ({"image_size": 32, "patch_size": 8}, "patches 3 x 4 to 3 x 8"),
        ({"num_labels": 7}, "a new head for 7 labels instead of 5"),
        ({}, None),
    ],
)
def test_checkpoint_is_resized_by_every_class(saved, caplog, auto_class, fields, change):
    model, path = saved(**EVERY_SWITCH)
    opened = auto_class.from_pretrained(path, **fields)
    assert_config_describes(opened)
    if auto_class is AutoModel and "num_labels" in fields:
        change = None  # it has no head
    assert [record.getMessage() for record in caplog.records if "resized" in record.getMessage()] == (
        [f"{path} was resized: {change}"] if change else []
    )
    for name, value in fields.items():
        assert getattr(opened.config, name) == value
    changed = {"pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"}
    for name, tensor in opened.state_dict().items():
        if name not in changed or not change:
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_resized_model_can_be_saved_and_loaded(saved, tmp_path):
    _, path = saved()
    resized = AutoModelForImageClassification.from_pretrained(path, image_size=24, num_channels=4, num_labels=2)
    resized.save_pretrained(tmp_path / "resized")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "resized")
    assert again.config.to_dict() == {**resized.config.to_dict(), "_name_or_path": again.config._name_or_path}
    for name, tensor in resized.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_positions_of_another_size_are_resampled_once_for_the_size_that_is_asked_for(saved):
    model, path = saved(image_size=24, pretrain_image_size=16, interpolate_antialias=False, interpolate_offset=0.1)
    assert model.pos_embed.shape == (1, 17, 32)
    same, larger = ViTSimpleModel.from_pretrained(path), ViTSimpleModel.from_pretrained(path, image_size=32)
    assert torch.equal(same.pos_embed, model.pos_embed) and same.config.pretrain_image_size == 16
    assert larger.pos_embed.shape == (1, 65, 32) and larger.config.pretrain_image_size is None
    images = torch.randn(2, 3, 32, 32)
    expected = same(images, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(larger(images).last_hidden_state, expected)


def test_labels_of_the_same_number_keep_the_head(saved):
    model, path = saved()
    names = {number: f"class {number}" for number in range(5)}
    opened = AutoModelForImageClassification.from_pretrained(path, **label_maps(names.values()))
    assert opened.config.id2label == names and torch.equal(opened.head.weight, model.head.weight)


@pytest.mark.parametrize("auto_class", [AutoModelForImageClassification, ViTSimpleForImageClassification])
def test_label_map_sets_the_other_one_and_num_labels_resets_both(saved, caplog, auto_class):
    _, path = saved(
        num_labels=11, id2label={"10": "k", "2": "c", "0": "a", "1": "b"} | {str(n): f"x{n}" for n in range(3, 10)}
    )
    stored = ViTSimpleConfig.from_pretrained(path)
    assert list(stored.id2label.values()) == ["a", "b", "c", *(f"x{n}" for n in range(3, 10)), "k"]
    for given in ({"id2label": {0: "yes", 1: "no"}}, {"label2id": {"yes": 0, "no": 1}}):
        config = auto_class.from_pretrained(path, **given).config
        assert (config.id2label, config.label2id) == ({0: "yes", 1: "no"}, {"yes": 0, "no": 1})
    config = auto_class.from_pretrained(path, num_labels=3).config
    assert list(config.id2label.values()) == list(config.label2id) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert auto_class.from_pretrained(path, num_labels=11).config.id2label == stored.id2label
    assert all("was resized" in record.getMessage() for record in caplog.records), caplog.text  # no other warning


def test_from_pretrained_keeps_its_other_options(saved):
    _, path = saved()
    config = ViTSimpleConfig.from_pretrained(path, image_size=24, num_labels=3)
    opened, info = ViTSimpleForImageClassification.from_pretrained(
        path, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert opened.dtype == torch.bfloat16 and opened.head.weight.dtype == opened.pos_embed.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert config.image_size == 24 and opened.head.weight.shape == (3, 32)
    dropping = ViTSimpleForImageClassification.from_pretrained(path, drop_path_rate=0.2, image_size=24)
    assert dropping.config.drop_path_rate == 0.2 and dropping.blocks[-1].drop_path.rate == 0.2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 18}, "image_size: expected a multiple of patch_size=4, got 18"),
        ({"num_channels": 0}, "num_channels: expected a positive integer, got 0"),
        ({"patch_size": 3}, "image_size: expected a multiple of patch_size=3, got 16"),
    ],
)
def test_size_that_cannot_work_is_refused(saved, fields, message):
    _, path = saved()
    for auto_class in (AutoModel, ViTSimpleForImageClassification):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(path, **fields)


def test_resample_kernel_sums_or_repeats_channels():
    kernel = torch.randn(5, 3, 4, 4)
    assert torch.allclose(resample_kernel(kernel, (4, 4), 1), kernel.sum(1, keepdim=True))
    six = resample_kernel(kernel, (4, 4), 6)
    assert torch.allclose(six[:, :3], kernel / 2) and torch.equal(six[:, :3], six[:, 3:])
    gray = torch.randn(2, 1, 4, 4)
    images = (gray, gray.expand(-1, 3, -1, -1), gray.expand(-1, 6, -1, -1))
    tokens = [F.conv2d(image, resample_kernel(kernel, (4, 4), image.shape[1])) for image in images]
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5) and torch.allclose(tokens[1], tokens[2], atol=1e-5)


def test_resample_kernel_gives_a_resized_patch_the_same_token():
    kernel, image = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
    resized = F.interpolate(image, (8, 8), mode="bicubic", antialias=True)
    tokens = F.conv2d(image, kernel), F.conv2d(resized, resample_kernel(kernel, (8, 8), 3))
    assert torch.allclose(*tokens, atol=1e-4)


def test_resample_positions_keeps_a_smooth_function():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    table = torch.stack([y, x, x * y]).flatten(1).T[None]
    prefix = torch.randn(1, 2, 3)
    config = ViTSimpleConfig(**{**TINY, "image_size": 56, "num_register_tokens": 1})
    larger = resample_positions(torch.cat([prefix, table], 1), config, (28, 20))
    assert torch.equal(larger[:, :2], prefix)
    expected = F.interpolate(table.transpose(1, 2).unflatten(2, (14, 14)), (28, 20), mode="bilinear")
    assert torch.allclose(larger[:, 2:].transpose(1, 2).unflatten(2, (28, 20)), expected, atol=0.05)


@pytest.mark.parametrize("fields", [{}, EVERY_SWITCH, {"no_embed_class": True}])
def test_pooled_features_survive_another_size(fields):
    """From 224 to 384 pixels, with smooth positions, the features of a resized image hardly change direction."""
    torch.manual_seed(0)
    config = ViTSimpleConfig(**{**TINY, "image_size": 224, "patch_size": 16, **fields})
    small = ViTSimpleForImageClassification(config).eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    waves = torch.stack([(x * (i % 4) + y * (i // 4)).cos() for i in range(32)], -1).view(1, 196, 32)
    small.pos_embed.data[:, config.num_prefix_positions :] = 0.1 * waves
    large = copy.deepcopy(small)
    resize(large, ViTSimpleConfig(**{**config.to_dict(), "image_size": 384}))
    images = F.interpolate(torch.randn(4, 3, 12, 12), 224, mode="bicubic")
    resized = F.interpolate(images, 384, mode="bicubic", antialias=True)
    with torch.no_grad():
        features = [
            ViTSimpleModel.forward(small, images).pooler_output,
            ViTSimpleModel.forward(large, resized).pooler_output,
        ]
    assert F.cosine_similarity(*features).min() > 0.95


def test_peft_adapter_for_other_labels_loads_with_the_auto_class(saved, tmp_path, pixels):
    _, folder = saved()
    base = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    adapted = get_peft_model(base, LoraConfig(target_modules=["qkv"], modules_to_save=["head"])).eval()
    for parameter in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
        torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    torch.testing.assert_close(loaded(pixels).logits, adapted(pixels).logits)


def test_offloaded_weights_are_not_resized(saved, tmp_path):
    model, path = saved()
    places = {name: "cpu" for name, _ in model.named_children()} | {"cls_token": "cpu", "pos_embed": "cpu"}
    del places["blocks"]
    places |= {"blocks.0": "cpu", "blocks.1": "disk", "blocks.2": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="offloaded weights cannot be resized, load them without device_map"):
        ViTSimpleForImageClassification.from_pretrained(path, image_size=24, **options)


def test_state_dict_without_a_checkpoint_is_loaded(saved):
    model, _ = saved()
    opened = ViTSimpleForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
