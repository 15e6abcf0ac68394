import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import classes, data_of, tiny
from vit_simple import ViTSimpleModel
from vit_simple.conversion.processors import processor_output, processor_to_timm
from vit_simple.data.labels import Labels
from vit_simple.data.loading import ImageData
from vit_simple.data.processors import open_processor, stock_processor
from vit_simple.files import UserError
from vit_simple.training.base import open_base
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.devices import build_loader_context
from vit_simple.training.setup import (
    build_model,
    build_model_config,
    default_crop_area,
    denormalize_head,
    processor_content,
    with_resize_of,
)

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


def write_processor(folder):
    content = stock_processor((16, 16), 18, resample=3) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny(num_labels=3, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    model.save_pretrained(tmp_path / "checkpoint")
    write_processor(tmp_path / "checkpoint")
    return model, str(tmp_path / "checkpoint")


def opened(labels, **options):
    """The model of a run that starts from a checkpoint."""
    config = TrainConfig(**options)
    return build_model(config, labels, base=open_base(config))


def test_checkpoint_of_the_same_classes_keeps_its_head(checkpoint):
    model, path = checkpoint
    fine_tuned = opened(classes(*NAMES), model_name_or_path=path, drop_path_rate=0.2)
    for (name, parameter), loaded in zip(model.named_parameters(), fine_tuned.parameters()):
        assert torch.equal(parameter, loaded), name
    assert fine_tuned.config.drop_path_rate == 0.2 and fine_tuned.dtype == torch.float32
    assert fine_tuned.blocks[-1].drop_path.rate == 0.2


@pytest.mark.parametrize("names", [["x", "y", "z"], ["a", "b"]])
def test_checkpoint_of_other_classes_gets_a_head_drawn_by_seed(checkpoint, names):
    model, path = checkpoint
    first, again, other = (opened(classes(*names), model_name_or_path=path, seed=seed) for seed in (0, 0, 1))
    assert first.head.weight.shape == (len(names), 32) and first.config.id2label == dict(enumerate(names))
    assert first.config.num_labels == len(names) and torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(first.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(UserError, match=r"--eval_only: expected the labels of the checkpoint, \['a', 'b', 'c'\]"):
        opened(classes("a", "b"), model_name_or_path=path, eval_only=True)
    with pytest.raises(UserError, match=r"image_size: expected a multiple of patch_size=4, got 30"):
        opened(classes(*NAMES), model_name_or_path=path, image_size=30)
    with pytest.raises(UserError, match=r"--model_name_or_path: .*nowhere cannot be read"):
        opened(classes(*NAMES), model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--conversion: 'famly' is not known, did you mean 'family'"):
        opened(classes(*NAMES), model_name_or_path=path, conversion={"famly": "google"})
    with pytest.raises(UserError, match=r"--conversion: expected family to be one of google, .*, got gogle"):
        opened(classes(*NAMES), model_name_or_path=path, conversion={"family": "gogle"})
    with pytest.raises(UserError, match=r"--conversion: expected hidden_act to be one of gelu, .*, got swish"):
        opened(classes(*NAMES), model_name_or_path=path, conversion={"hidden_act": "swish"})
    with pytest.raises(UserError, match=r"--conversion: expected image_mean to be list or nothing, got 0.5"):
        opened(classes(*NAMES), model_name_or_path=path, conversion={"image_mean": 0.5})
    (tmp_path / "checkpoint/preprocessor_config.json").unlink()
    with pytest.raises(
        UserError, match=r"has no image processor.*; train.py takes them as --conversion '\{family: VALUE\}'"
    ):
        opened(classes(*NAMES), model_name_or_path=path)


def test_checkpoint_follows_the_image_size_with_its_own_preprocessing(checkpoint):
    model, path = checkpoint
    config = TrainConfig(model_name_or_path=path, image_size=24)
    base = open_base(config)
    larger = build_model(config, classes("x", "y"), base=base)
    expected = type(model).from_pretrained(path, image_size=24)
    assert torch.equal(larger.pos_embed, expected.pos_embed) and larger.config.image_size == 24
    assert base.report[0] == "vit_simple checkpoint: 0.0 M parameters, head dropped, 24 px"
    content = processor_content(config, (24, 24), cropped=True, base=base)
    assert content["size"] == {"shortest_edge": 27} and content["crop_size"] == {"height": 24, "width": 24}
    assert (content["image_mean"], content["resample"]) == ([0.1, 0.2, 0.3], 3)
    cropped = processor_content(TrainConfig(model_name_or_path=path, crop_pct=0.9), (16, 16), True, base=base)
    assert cropped["size"] == {"shortest_edge": 17} and cropped["image_mean"] == [0.1, 0.2, 0.3]


def test_checkpoint_without_head_cannot_be_evaluated(checkpoint, tmp_path):
    model, path = checkpoint
    backbone = ViTSimpleModel(model.config)
    backbone.save_pretrained(path)
    with pytest.raises(UserError, match="--eval_only: expected a checkpoint with a head for these labels"):
        opened(classes(*NAMES), model_name_or_path=path, eval_only=True)
    trained = opened(classes(*NAMES), model_name_or_path=path)
    assert torch.equal(trained.pos_embed, backbone.pos_embed) and trained.head.weight.std() > 0


def test_checkpoint_without_class_names_is_evaluated_by_number(tmp_path):
    model = tiny(num_labels=3)
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    evaluated = opened(classes(*NAMES), model_name_or_path=str(tmp_path), eval_only=True)
    assert torch.equal(evaluated.head.weight, model.head.weight)
    assert evaluated.config.id2label == dict(enumerate(NAMES))


def test_regression_without_a_name_is_evaluated_in_the_unit_of_the_labels(tmp_path):
    model = tiny(num_labels=1, problem_type="regression")
    model.save_pretrained(tmp_path)
    write_processor(tmp_path)
    labels = Labels("size", "number", ["size"], mean=3.0, std=2.0)
    evaluated = opened(labels, model_name_or_path=str(tmp_path), eval_only=True)
    assert evaluated.config.id2label == {0: "size"}
    weights = denormalize_head(evaluated.state_dict(), labels)
    assert torch.allclose(weights["head.weight"], model.head.weight)
    assert torch.allclose(weights["head.bias"], model.head.bias)


def test_checkpoint_of_other_channels_says_what_image_files_become(tmp_path):
    tiny(num_channels=1).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor((16, 16))))
    with pytest.raises(UserError, match=r"for 3 channels, since image files become RGB, got one for 1; .*uint8 arrays"):
        opened(classes(*NAMES), model_name_or_path=str(tmp_path))


def test_freeze_backbone_trains_only_the_head(checkpoint):
    model = opened(classes(*NAMES), model_name_or_path=checkpoint[1], freeze_backbone=True)
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
    assert processor_content(TrainConfig(crop_pct=0.95), (224, 224), True)["size"] == {"shortest_edge": 235}  # in timm
    with pytest.raises(UserError, match=r"--crop_pct needs a square image_size, got \(16, 32\)"):
        processor_content(TrainConfig(crop_pct=0.9), (16, 32), cropped=False)


def test_resize_fit_pads_and_never_crops(checkpoint):
    path = checkpoint[1]
    config = TrainConfig(resize="fit")
    assert default_crop_area(config, data_of([None], [0]), (3, 16, 16)) == 0
    base = open_base(TrainConfig(model_name_or_path=path))
    for options, given in (({}, None), ({"model_name_or_path": path}, base)):
        config = TrainConfig(resize="fit", **options)
        content = processor_content(config, (24, 24), cropped=False, base=given)
        assert content["do_pad"] and content["size"] == {"height": 24, "width": 24} and not content["do_center_crop"]
        assert content["image_mean"] == ([0.5] * 3 if given is None else [0.1, 0.2, 0.3])
    assert processor_output(content) == (24, 24)  # another run can start from it
    with pytest.raises(UserError, match="timm pads in another color"):
        processor_to_timm(content, base.config)
    with pytest.raises(UserError, match="cannot be combined with arrays"):
        processor_content(config, (16, 16), False, array_shape=(3, 16, 16))
    for name in ("random_resized_crop", "crop_pct"):
        with pytest.raises(UserError, match="nothing is cropped"):
            TrainConfig(resize="fit", **{name: 0.5})


def test_arrays_are_not_resized_by_the_image_processor_of_a_checkpoint(checkpoint):
    base = open_base(TrainConfig(model_name_or_path=checkpoint[1]))
    content = processor_content(TrainConfig(), (16, 16), cropped=False, array_shape=(3, 16, 16), base=base)
    array = np.random.default_rng(0).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    made = open_processor(content)(array, input_data_format="channels_first", return_tensors="np").pixel_values[0]
    mean, std = (np.array(content[name])[:, None, None] for name in ("image_mean", "image_std"))
    assert np.allclose(made, (array / 255 - mean) / std, atol=1e-6)


def test_fine_tuning_pads_images_if_the_checkpoint_does(checkpoint):
    base = open_base(TrainConfig(model_name_or_path=checkpoint[1]))
    content = processor_content(TrainConfig(resize="fit"), (24, 24), cropped=False, base=base)
    for processor, options, shape, expected in (
        (content, [], None, "fit"),
        (content, ["--random_resized_crop", "0.5"], None, "auto"),
        (content, ["--crop_pct", "0.9"], None, "auto"),
        (content, [], (3, 24, 24), "auto"),
        (base.processor, [], None, "auto"),
    ):
        config = parse_config(["--model_name_or_path", checkpoint[1], *options])
        images = ImageData({}, "image", classes(*NAMES), {}, shape)
        changed = with_resize_of(replace(base, processor=processor), config, images)
        assert changed.resize == expected and changed.undecided == config.undecided


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
