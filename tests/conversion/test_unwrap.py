"""Weights are found under the prefixes and entries that training programs leave."""

import argparse
import itertools
import json
import pathlib
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.conftest import tiny
from tests.conversion.parity import open_folder
from vit_simple.conversion.convert import open_checkpoint
from vit_simple.convert_checkpoint import convert
from vit_simple.files import UserError

OPTIONS = {"family": "augreg", "num_attention_heads": 4}
STATE = dict(tiny().state_dict())
BACKBONE = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}
OTHER = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
HEAD = {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)}


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_opened(file, expected: dict = STATE, **options) -> list[str]:
    checkpoint = open_checkpoint(str(file), **OPTIONS | options)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, checkpoint.tensors[name]) for name, tensor in expected.items())
    return checkpoint.report


@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_prefixes_are_removed_in_any_order(tmp_path, entry):
    for count in range(1, 4):
        for prefixes in itertools.permutations(["module", "_orig_mod", "model"], count):
            tensors = under(".".join(prefixes) + ".", STATE)
            torch.save({entry: tensors, "epoch": 3} if entry else tensors, tmp_path / "a.pth")
            report = assert_opened(tmp_path / "a.pth")
            assert report[0].startswith(f"took {len(STATE)} of {len(STATE)} tensors and removed the prefix ")
            assert all(prefix in report[0] for prefix in prefixes)


def test_prefixes_of_wrapped_blocks_are_removed(tmp_path):
    wrapped = {re.sub(r"^(blocks\.\d)", r"\1._orig_mod", name): tensor for name, tensor in STATE.items()}
    save_file(under("_fsdp_wrapped_module.", wrapped), tmp_path / "a.safetensors")
    assert "_fsdp_wrapped_module and _orig_mod" in assert_opened(tmp_path / "a.safetensors")[0]


@pytest.mark.parametrize(
    "content, expected, line",
    [
        (
            {"student": under("module.backbone.", OTHER), "teacher": under("backbone.", BACKBONE) | HEAD, "epoch": 1},
            BACKBONE,
            f"removed the prefix teacher.backbone; left out student ({len(OTHER)}), teacher.head (2)",
        ),
        (
            {"model": under("teacher.backbone.", BACKBONE) | under("student.backbone.", OTHER)},
            BACKBONE,
            f"removed the prefix model.teacher.backbone; left out model.student ({len(OTHER)})",
        ),
        (
            {"teacher": under("backbone.", BACKBONE) | HEAD, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
            BACKBONE,
            "removed the prefix teacher.backbone; left out teacher.head (2), optimizer (1)",
        ),
        ({"state_dict": OTHER, "state_dict_ema": under("module.", STATE), "arch": "vit"}, STATE, "state_dict_ema"),
        ({"state_dict": under("model.", STATE), "hyper_parameters": {"lr": 0.1}}, STATE, "prefix state_dict.model"),
    ],
)
def test_model_of_a_training_file_is_found(tmp_path, content, expected, line):
    torch.save(content, tmp_path / "a.pth")
    assert line in assert_opened(tmp_path / "a.pth", expected)[0]


def test_key_chooses_another_model_of_a_file(tmp_path):
    torch.save({"model": OTHER, "state_dict_ema": STATE}, tmp_path / "a.pth")
    assert_opened(tmp_path / "a.pth")
    assert_opened(tmp_path / "a.pth", OTHER, key="model")
    with pytest.raises(UserError, match="--key: expected a part of a prefix in the file, got ema; the file has model"):
        open_checkpoint(str(tmp_path / "a.pth"), **OPTIONS, key="ema")
    torch.save(under("left.", OTHER) | under("right.", STATE), tmp_path / "b.pth")
    assert_opened(tmp_path / "b.pth", key="right")
    with pytest.raises(UserError, match="--key is required, because the file has several models: left, right"):
        open_checkpoint(str(tmp_path / "b.pth"), **OPTIONS)


def test_options_of_a_training_are_allowed_beside_the_weights_and_nothing_else(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.1, names=["a"])}, tmp_path / "a.pth")
    assert_opened(tmp_path / "a.pth")
    for value in (pathlib.PurePosixPath("/"), argparse.Namespace(run=print), argparse.ArgumentParser):
        torch.save({"model": STATE, "args": value}, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"b.pth: expected a file of tensors: it contains \S+, which is not loaded"):
            open_checkpoint(str(tmp_path / "b.pth"), **OPTIONS)


def test_dictionary_that_contains_itself_is_read_to_an_end(tmp_path):
    content = {"model": STATE, "epoch": 3}
    content["again"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"--key is required, because the file has several models: model, again\.model"):
        open_checkpoint(str(tmp_path / "a.pth"), **OPTIONS)
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b.pth: expected a dictionary of names and tensors, got a dict without"):
        open_checkpoint(str(tmp_path / "b.pth"), **OPTIONS)


@pytest.mark.parametrize("content", [tiny(), torch.zeros(3)], ids=["model", "tensor"])
def test_file_of_something_else_than_a_state_dict_says_how_to_save_one(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: expected .*torch\.save\(model\.state_dict\(\), file\)"):
        open_checkpoint(str(tmp_path / "a.pth"), **OPTIONS)


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    torch.save(dict(tiny(pre_norm=False).state_dict()), tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        open_checkpoint(str(tmp_path / "a.pth"))
    assert all(option in str(error.value) for option in ("--num_attention_heads", "--family", "--image_mean"))


def test_preprocessing_of_a_training_of_ones_own_is_kept(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    report = convert(tmp_path / "a.pth", tmp_path / "own", num_attention_heads=4, **given)
    assert "assumed interpolation=bicubic, crop_pct=0.875, the default of timm" in report
    given |= {"interpolation": "bilinear", "crop_pct": 0.8}
    for name, family in {"mean and std": None, "family": "clip"}.items():
        convert(tmp_path / "a.pth", tmp_path / name, family=family, num_attention_heads=4, **given)
        processor = AutoImageProcessor.from_pretrained(tmp_path / name)
        assert (list(processor.image_mean), list(processor.image_std)) == (given["image_mean"], given["image_std"])
        assert (int(processor.resample), processor.size["shortest_edge"]) == (2, 20)
    with pytest.raises(UserError, match="--image_std: expected 3 numbers"):
        open_checkpoint(str(tmp_path / "a.pth"), **OPTIONS, image_std=[0.5])


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"image_mean": [123, 117, 104]}, r"--image_mean: expected numbers in \[0, 1\].*they are 0.4824 0.4588 0.4078"),
        ({"image_std": [58, 57, 57]}, r"--image_std: expected numbers in \(0, 1\].*they are 0.2275 0.2235 0.2235"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"--image_std: expected numbers in \(0, 1\], .*got \[0.5, 0.0, 0.5\]$"),
    ],
)
def test_preprocessing_for_other_pixels_than_from_0_to_1_is_refused(tmp_path, given, reason):
    torch.save(STATE, tmp_path / "a.pth")
    with pytest.raises(UserError, match=reason):
        open_checkpoint(str(tmp_path / "a.pth"), **OPTIONS, **given)


def test_checkpoint_of_trainer_takes_the_image_processor_of_its_base_model(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "base", **OPTIONS, image_mean=[0.1, 0.2, 0.3])
    AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=3).save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="has no image processor: give --base_model"):
        open_checkpoint(str(tmp_path / "run"))
    with pytest.raises(UserError, match="--base_model no/where has none either or cannot be reached; give another"):
        open_checkpoint(str(tmp_path / "run"), base_model="no/where")
    report = convert(tmp_path / "run", tmp_path / "out", base_model=str(tmp_path / "base"))
    assert report[0].startswith("took the image processor of the base model")
    written = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3] and open_folder(tmp_path / "out").config.num_labels == 3
