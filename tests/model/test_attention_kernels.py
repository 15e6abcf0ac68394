"""A config.json cannot make transformers download and run attention kernels of the Hub; a caller still can."""

import json
import shutil

import pytest
import transformers

from tests.conftest import DIGITS, environment_without_package, run_python, tiny
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import ATTENTION_KEYS, refuse_kernels
from vit_simple.convert_checkpoint import convert
from vit_simple.sharing.verify import check
from vit_simple.train import main

KERNEL = "kernels-community/flash-attn"
KERNELS = """
from unittest.mock import MagicMock

fetched = []

def get_kernel(repo_id, **options):
    fetched.append(repo_id)
    raise OSError("this package downloads nothing")

def __getattr__(name):  # whatever else transformers imports from it
    return MagicMock()
"""
DOORS = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import kernels, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

kernel, file, remote = sys.argv[3], Path(sys.argv[2]) / "config.json", {"trust_remote_code": True}
content = json.loads(file.read_text())
doors = [auto.from_pretrained for auto in (AutoConfig, AutoModel, AutoModelForImageClassification)]
doors.append(lambda folder, **options: pipeline("image-classification", model=str(folder), **options))
for key in sys.argv[4:]:
    file.write_text(json.dumps(content | {key: kernel}))
    for door in doors:
        try:
            door(file.parent, **remote)
        except ValueError as error:
            assert f"expected no repository of kernels in {key!r}, got {kernel!r}" in str(error), error
        else:
            raise AssertionError(f"{door} took {key}")
assert kernels.fetched == []

file.write_text(json.dumps(content))
for auto in (AutoModel, AutoModelForImageClassification):
    try:
        auto.from_pretrained(file.parent, attn_implementation=kernel, **remote)
    except (OSError, ValueError) as error:
        assert "this package downloads nothing" in str(error), error
assert kernels.fetched == [kernel, kernel]
print(transformers.__version__)
"""


@pytest.fixture
def folder(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "checkpoint")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.slow
def test_remote_code_refuses_kernels_of_the_file_and_takes_those_of_the_caller(folder, tmp_path, version):
    stub = tmp_path / "stub"
    (stub / "kernels-0.18.2.dist-info").mkdir(parents=True)
    (stub / "kernels-0.18.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (stub / "kernels.py").write_text(KERNELS)
    python = environment_without_package(tmp_path / "environment", version)
    printed = run_python(python, tmp_path / "work", DOORS, stub, folder, KERNEL, *ATTENTION_KEYS)
    assert version in (None, printed.strip())


@pytest.mark.parametrize("key", ATTENTION_KEYS)
def test_the_package_refuses_kernels_of_the_file_at_every_door(folder, tmp_path, key):
    change_config(folder, **{key: KERNEL})
    message = f"config.json: expected no repository of kernels in '{key}', got '{KERNEL}'"
    for door in (
        ViTSimpleConfig.from_pretrained,
        ViTSimpleForImageClassification.from_pretrained,
        transformers.AutoConfig.from_pretrained,
        transformers.AutoModel.from_pretrained,
        lambda folder: ViTSimpleConfig.from_json_file(folder / "config.json"),
        check,  # before a push
        lambda folder: convert(folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message):
            door(folder)
    with pytest.raises(SystemExit, match=message):
        main(["--dataset_name", DIGITS, "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_checkpoint_of_another_library_that_names_kernels_is_not_converted(tmp_path, library):
    tiny().save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "other", to=library, family="google")
    change_config(tmp_path / "other", nested=[{"_attn_implementation_internal": KERNEL}])
    with pytest.raises(
        ValueError, match=f"no repository of kernels in '_attn_implementation_internal', got '{KERNEL}'"
    ):
        convert(tmp_path / "other", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "content", [{"vision_config": {"attn_implementation": KERNEL}}, {"_attn_implementation": {"": f"paged|{KERNEL}"}}]
)
def test_kernels_are_found_at_any_depth(content):
    with pytest.raises(ValueError, match="expected no repository of kernels"):
        refuse_kernels(content)


def test_what_names_no_repository_or_comes_from_the_caller_is_left_alone(folder):
    assert ViTSimpleConfig.from_pretrained(folder, attn_implementation=KERNEL)._attn_implementation == KERNEL
    assert ViTSimpleConfig(attn_implementation=KERNEL)._attn_implementation == KERNEL
    change_config(folder, _attn_implementation="eager", _name_or_path="user/digits")
    assert ViTSimpleConfig.from_pretrained(folder)._attn_implementation == "eager"
