import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# Before the libraries read it: no test reaches for the Hub, and each of the processes that run tests takes one core.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import settings

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.data.dataloader import LoaderContext, MapStyleSplit
from vit_simple.data.decoding import Decoder
from vit_simple.data.labels import Labels
from vit_simple.data.loading import ImageData
from vit_simple.data.processors import open_processor
from vit_simple.export import main as export_main
from vit_simple.files import ROOT
from vit_simple.train import main
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

torch.set_num_threads(1)  # even if these libraries were imported before this file, as pytest imports the package
huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True

settings.register_profile("here", database=None, deadline=None)  # no folder is left, nothing is timed
settings.load_profile("here")

DIGITS = str(ROOT / "data/digits")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
EVERY_SWITCH = {"num_register_tokens": 2, "layerscale_value": 0.1, "drop_path_rate": 0.2, "pooling": "mean"}


def tiny(**fields) -> ViTSimpleForImageClassification:
    """A small classifier in evaluation mode whose parameters are all far from zero and from each other."""
    torch.manual_seed(0)
    model = ViTSimpleForImageClassification(ViTSimpleConfig(**{**TINY, **fields})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="moments at which tests/training/test_resume.py kills a run")
    older = "versions of transformers that tests/model opens checkpoints with, beside the one installed"
    parser.addoption("--older", default="4.57.6", help=older + "; 5.0.0 is supported, too")
    parser.addoption(
        "--pushes", type=int, default=10, help="pushes of tests/sharing/test_upload.py under random faults"
    )


def pytest_generate_tests(metafunc):
    """Runs a test with an argument `version` with the installed transformers (None), then with the older ones."""
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", [None, *metafunc.config.getoption("--older").split(",")])


def pytest_collection_modifyitems(items):
    """Marks as slow the files that start processes, train or compile throughout; other tests are marked one by one."""
    slow = {"data/test_label_kinds", "inference/test_compiling", "model/test_loading", "sharing/test_upload"}
    slow |= {"training/test_resume", "training/test_old_run", "test_examples", "test_package"}
    for item in items:
        if item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix() in slow:
            item.add_marker("slow")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """What `python train.py` leaves behind, after one epoch."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    main(["--output_dir", str(folder), "--num_train_epochs", "1"])
    return folder


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory) -> Path:
    """The run with its ONNX files, which also give the attention weights."""
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("exported") / "digits"))
    export_main([str(folder), "--to", "onnx", "--attentions"])
    return folder


def photographs(folder, sizes=((90, 60), (60, 90), (120, 120), (300, 200))) -> list[str]:
    """Files of smooth JPEG pictures, of which no two are alike."""
    files = []
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width] / max(width, height)
        pixels = np.stack([x * 200, y * 200, np.full_like(x, 20 * number)], -1)
        files.append(str(folder / f"{number}.jpg"))
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(files[-1], quality=95)
    return files


def processor(size: int, cropped: bool = False):
    return open_processor(processor_content(TrainConfig(), (size, size), cropped))


def classes(*names: str) -> Labels:
    return Labels("label", "class", list(names), {number: number for number in range(len(names))})


def data_of(files: list[str | None], labels: list[int]) -> ImageData:
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": files, "label": labels}, features)
    sizes, folder = {"train": len(rows), "test": len(rows)}, os.path.dirname(files[0] or "/")
    sources = (os.path.realpath(folder),)
    return ImageData({"train": rows, "test": rows}, "image", classes("a", "b"), sizes, sources=sources)


def images_of(data: ImageData, split: str, processor, size, area=0.0, on_bad_image="error", seed=0) -> MapStyleSplit:
    decode = Decoder(processor, (data.channels, *size), data.array_shape is not None, area, seed, data.sources)
    return MapStyleSplit(data, split, decode, LoaderContext(torch.device("cpu")), on_bad_image, seed)


def run_python(python: Path, work: Path, code: str, *arguments) -> str:
    """Runs code in a fresh process with empty caches, in an empty folder; returns what it printed."""
    work.mkdir()
    caches = {"HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=work, env={**os.environ, **caches}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def environment_without_package(folder: Path, transformers: str | None = None) -> Path:
    """The Python of a fresh virtual environment that has the packages of this one, but not vit_simple."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    # Python reads no .pth file of a folder that is named in one, so an editable install stays out of sight.
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "vit_simple.py").write_text("raise ImportError('not installed here')\n")  # hides a plain install
    if transformers is not None:
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        subprocess.run([*pip, f"transformers=={transformers}"], check=True)
    return python
