import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import classes, tiny
from vit_simple.data.processors import open_processor
from vit_simple.files import UserError
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.devices import build_loader_context
from vit_simple.training.setup import build_model, build_model_config, processor_content

NAMES = ["a", "b", "c"]


def test_model_config_has_the_size_of_the_variant():
    config = build_model_config(TrainConfig(), classes("cat", "dog"))
    assert (config.hidden_size, config.patch_size, config.image_size, config.num_labels) == (384, 16, 224, 2)
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}
    assert build_model_config(TrainConfig(drop_path_rate=0.3), classes(*NAMES)).drop_path_rate == 0.3


def test_recipe_values_that_yaml_misreads_are_understood(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "mixed_precision: no\ncache_images: off\nmodel: {layerscale_value: 1e-5, pooling: mean}\n"
    )
    config = parse_config([str(tmp_path / "recipe.yaml")])
    model_config = build_model_config(config, classes("a", "b"))
    assert (config.mixed_precision, config.cache_images) == ("no", "off")
    assert (model_config.layerscale_value, model_config.pooling) == (1e-5, "mean")


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny(num_labels=3, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    model.save_pretrained(tmp_path / "checkpoint")
    return model, str(tmp_path / "checkpoint")


def test_checkpoint_of_the_same_classes_keeps_its_head(checkpoint):
    model, path = checkpoint
    fine_tuned = build_model(TrainConfig(model_name_or_path=path, drop_path_rate=0.2), classes(*NAMES))
    for (name, parameter), loaded in zip(model.named_parameters(), fine_tuned.parameters()):
        assert torch.equal(parameter, loaded), name
    assert fine_tuned.config.drop_path_rate == 0.2 and fine_tuned.dtype == torch.float32


def test_checkpoint_with_weights_in_a_pickle_only_is_refused(checkpoint):
    model, path = checkpoint
    torch.save(model.state_dict(), Path(path) / "pytorch_model.bin")
    (Path(path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model_name_or_path: .* cannot be read: .*no file named model\.safetensors"):
        build_model(TrainConfig(model_name_or_path=path), classes(*NAMES))


@pytest.mark.parametrize("names", [["x", "y", "z"], ["a", "b"]])
def test_checkpoint_of_other_classes_gets_a_head_drawn_by_seed(checkpoint, names):
    model, path = checkpoint
    first, again, other = (
        build_model(TrainConfig(model_name_or_path=path, seed=seed), classes(*names)) for seed in (0, 0, 1)
    )
    assert first.head.weight.shape == (len(names), 32) and first.config.id2label == dict(enumerate(names))
    assert first.config.num_labels == len(names) and torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(first.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(UserError, match=r"--eval_only: expected the labels of the checkpoint, \['a', 'b', 'c'\]"):
        build_model(TrainConfig(model_name_or_path=path, eval_only=True), classes("a", "b"))
    with pytest.raises(UserError, match=r"--model_name_or_path: .*nowhere cannot be read"):
        build_model(TrainConfig(model_name_or_path=str(tmp_path / "nowhere")), classes(*NAMES))
    with pytest.raises(UserError, match=r"it has no image processor: .*preprocessor_config"):
        processor_content(TrainConfig(model_name_or_path=path), (16, 16), cropped=False)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="expected the model type vit_simple, got vit"):
        build_model(TrainConfig(model_name_or_path=str(tmp_path)), classes(*NAMES))


def test_freeze_backbone_trains_only_the_head(checkpoint):
    model = build_model(TrainConfig(model_name_or_path=checkpoint[1], freeze_backbone=True), classes(*NAMES))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_evaluation_crops_the_center_if_training_crops_at_random():
    from PIL import Image

    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (16, 0, 48, 32))  # white in the middle
    for cropped, crop_pct, white in ((True, None, True), (False, 1.0, True), (False, None, False)):
        processor = open_processor(processor_content(TrainConfig(crop_pct=crop_pct), (16, 16), cropped))
        pixels = processor(image, return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 16, 16) and (pixels[..., 1:-1, 1:-1] == 1).all() == white
    assert processor_content(TrainConfig(), (224, 224), True)["size"] == {"shortest_edge": 256}
    with pytest.raises(UserError, match=r"--crop_pct needs a square image_size, got \(16, 32\)"):
        processor_content(TrainConfig(crop_pct=0.9), (16, 32), cropped=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 100_000}, "100000x100000 pixels: at least .* GiB of memory are needed, this machine has"),
        ({"crop_padding": 1_000_000}, "--crop_padding 1000000: at least 1,430,"),
        ({"model": {"num_hidden_layers": 10**9}}, "a model of 1000000000 blocks of width 768"),
    ],
)
def test_model_and_batch_that_cannot_fit_into_memory_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_model(TrainConfig(**options), classes(*NAMES))


def test_workers_that_cannot_fit_into_memory_are_refused():
    with pytest.raises(UserError, match="--dataloader_num_workers 1000000: at least 97,656 GiB of memory are needed"):
        build_loader_context(TrainConfig(dataloader_num_workers=1_000_000), Accelerator(cpu=True))
    assert build_loader_context(TrainConfig(dataloader_num_workers=8), Accelerator(cpu=True)).num_workers == 8


@pytest.mark.parametrize(
    "field, value",
    [
        *(("image_std", value) for value in ([0.5, 0, 0.5], [0.5, math.inf, 0.5], "0.5", ["a"])),
        *(("image_mean", value) for value in ([math.nan] * 3, {"r": 0.5})),
        *(("rescale_factor", value) for value in (1e40, 0, math.nan, "1/255")),
        *(("size", value) for value in ({"height": 10**6, "width": 10**6}, {"height": 0, "width": 16}, "16", [16, 16])),
        *(("do_resize", value) for value in ("yes", 1)),
        *(("resample", value) for value in ("bilinear", 2.5)),
        ("image_processor_type", 3),
    ],
)
def test_image_processor_with_a_wrong_value_names_file_and_field(field, value):
    content = processor_content(TrainConfig(), (16, 16), cropped=False)
    with pytest.raises(UserError, match=rf"^preprocessor_config\.json: expected {field}"):
        open_processor({**content, field: value})


def test_image_processor_of_an_unknown_type_is_refused():
    content = processor_content(TrainConfig(), (16, 16), cropped=False)
    with pytest.raises(UserError, match=r"^preprocessor_config\.json: Unrecognized image processor"):
        open_processor({**content, "image_processor_type": "NoSuchProcessor"})
