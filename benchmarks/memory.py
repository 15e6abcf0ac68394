"""The memory that an evaluation of phone-sized images takes: the peak of all processes, and images per second.

    python -m benchmarks.memory --images 500

writes 20 JPEG files of 4000x3000 pixels, hard-linked under as many names as there are images, and a Ti/16 checkpoint,
and runs train.py --eval_only on them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import label_maps
from vit_simple.files import ROOT
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

FILES, SIZE = 20, (4000, 3000)


def write_images(folder: Path, count: int):
    """A folder of `count` images in two classes, all of them in validation."""
    for number in range(FILES):
        noise = np.random.default_rng(number).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
        PIL.Image.fromarray(noise).resize(SIZE, PIL.Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    for split, images in ("train", 2), ("validation", count):
        for number in range(images):
            path = folder / "images" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / f"{number % FILES}.jpg", path)


def write_checkpoint(folder: Path):
    config = ViTSimpleConfig.from_variant("Ti/16", **label_maps(["a", "b"]))
    ViTSimpleForImageClassification(config).save_pretrained(folder)
    content = processor_content(TrainConfig(), (224, 224), cropped=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def peak_memory(command: list[str]) -> tuple[int, float]:
    """The most bytes that a command and its child processes held at the same time, and its seconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            peak = max(peak, sum(each.memory_info().rss for each in [parent, *parent.children(recursive=True)]))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--train", default=str(ROOT / "train.py"), help="another version of train.py, to compare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, arguments.images)
        write_checkpoint(folder / "checkpoint")
        options = ["--dataset_name", str(folder / "images"), "--model_name_or_path", str(folder / "checkpoint")]
        options += ["--eval_only", "--per_device_eval_batch_size", "8", "--cache_images", "off"]
        peak, seconds = peak_memory([sys.executable, arguments.train, *options])
    print(f"{arguments.images} images: {peak / 2**20:.0f} MiB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
