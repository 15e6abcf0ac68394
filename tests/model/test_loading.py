"""Saved folders, loaded by every Auto class, with and without the package, in every supported transformers."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from tests.conftest import EVERY_SWITCH, environment_without_package, run_python, tiny
from vit_simple import ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import label_maps
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

OPEN = """
import json, sys, torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

image, remote = Image.open(sys.argv[1]), {"trust_remote_code": True} if sys.argv[2] == "remote" else {}

def show(folder):
    config = AutoConfig.from_pretrained(folder, **remote)
    processor = AutoImageProcessor.from_pretrained(folder, **remote)
    backbone = AutoModel.from_pretrained(folder, **remote)
    model = AutoModelForImageClassification.from_pretrained(folder, **remote)
    pixels = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixels).logits
        from_backbone = model.head(backbone(pixels).pooler_output)
    scores = pipeline("image-classification", model=folder, top_k=1000, **remote)(image)
    scores = {score["label"]: score["score"] for score in scores}
    print(json.dumps({
        "version": transformers.__version__,
        "module": type(model).__module__,
        "labels": list(config.id2label.values()),
        "logits": logits[0].tolist(),
        "from_backbone": from_backbone[0].tolist(),
        "pipeline": [scores[label] for label in config.id2label.values()],
    }))

for folder in sys.argv[3:]:
    show(folder)
"""

SAVE_AGAIN = """
import shutil

for number, folder in enumerate(sys.argv[3:]):
    model = AutoModelForImageClassification.from_pretrained(folder, **remote)
    model.save_pretrained(f"classifier-{number}")
    shutil.copy(f"{folder}/preprocessor_config.json", f"classifier-{number}")

    AutoModel.from_pretrained(folder, **remote).save_pretrained("backbone")
    headless = AutoModelForImageClassification.from_pretrained("backbone", **remote)
    other_labels = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, **remote)
    assert other_labels.head.weight.shape[0] == 3
    size = [4 * side for side in other_labels.config.grid_size]  # patches of four pixels
    other_fields = {"image_size": size, "patch_size": 4, "num_channels": 1}
    resized = AutoModel.from_pretrained(folder, **other_fields, **remote)
    assert resized(torch.randn(2, 1, *size)).pooler_output.shape == (2, model.config.hidden_size)
    for other in (headless, other_labels):
        assert other.head.weight.abs().max() > 0 and other.head.bias.abs().max() == 0
        for name, tensor in model.state_dict().items():
            assert name.startswith("head.") or torch.equal(other.state_dict()[name], tensor), name
    show(f"classifier-{number}")
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "gray.png"
    Image.effect_noise((21, 34), 60).save(path)
    return path


@pytest.fixture(scope="module")
def folders(run_folder, tmp_path_factory):
    """The folder of a run, and one of a model with LayerScale, registers and fixed positions."""
    folder = tmp_path_factory.mktemp("switches") / "every-switch"
    fields = {**EVERY_SWITCH, "pooling": "cls", "position_embedding": "sincos2d"}
    tiny(**fields, **label_maps("abcde")).save_pretrained(folder)
    content = processor_content(TrainConfig(), (16, 16), cropped=True)  # unlike the run
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return [run_folder, folder]


def check(printed: str, folders: list, image) -> list[dict]:
    """Compares what OPEN printed with the outputs of the installed package."""
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    for result, folder in zip(results, folders, strict=True):
        model = ViTSimpleForImageClassification.from_pretrained(folder)
        backend = "pil" if result["version"].startswith("4.") else None  # transformers 4 uses Pillow; 5 has a default
        processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        pixels = processor(Image.open(image), return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = model(pixels).logits[0]
        assert result["logits"] == logits.tolist()
        torch.testing.assert_close(torch.tensor(result["from_backbone"]), logits)
        assert result["labels"] == list(model.config.id2label.values())
        torch.testing.assert_close(torch.tensor(result["pipeline"]), logits.softmax(dim=0))
    return results


def test_auto_classes_give_the_same_logits_without_the_package(tmp_path, folders, image, version):
    python = environment_without_package(tmp_path / "environment", version)
    printed = run_python(python, tmp_path / "work", OPEN + SAVE_AGAIN, image, "remote", *folders)
    saved = [tmp_path / f"work/classifier-{number}" for number in range(len(folders))]
    results = check(printed, [*folders, *saved], image)
    assert all(result["module"].startswith("transformers_modules.") for result in results)
    assert all(version in (None, result["version"]) for result in results)
    for folder, again in zip(folders, saved):
        for name in ("modeling_vit_simple.py", "configuration_vit_simple.py"):
            assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_auto_classes_need_no_remote_code_once_the_package_is_imported(tmp_path, folders, image):
    printed = run_python(sys.executable, tmp_path / "open", "import vit_simple\n" + OPEN, image, "local", *folders)
    modules = {result["module"] for result in check(printed, folders, image)}
    assert modules == {"vit_simple.modeling_vit_simple"}
