"""Images per second, bytes per second and peak memory of a stream and of the same files read from the disk.

    python -m benchmarks.stream --large SET

Writes the images again and again into a temporary folder: 2,000 rows as parquet shards and as tar shards (WebDataset),
and 20,000 rows as parquet shards. Rates are of one thread that reads, decodes and crops batches of 50 images to 224
pixels; the loaders are measured in turn, and a ratio is that of medians. Peak memory is that of one epoch with one
worker, summed over both processes, in a new process for each number of rows; the memory before the first image is
reported, too. A training step (S/16, float32, forward and backward) is measured on the same core.
"""

import argparse
import io
import itertools
import resource
import statistics
import tarfile
import tempfile
from pathlib import Path

import datasets
import torch
from datasets import Image, load_dataset

from benchmarks.data import measure
from benchmarks.measure import flops_per_image, in_new_process, machine, resident, write_report
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.data.dataloader import ImageSplit, LoaderContext, MapStyleSplit
from vit_simple.data.decoding import Decoder
from vit_simple.data.loading import load_image_data
from vit_simple.data.processors import open_processor
from vit_simple.data.streaming import StreamingSplit
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

SIZE, BATCH = 224, 50
ROWS_PER_SHARD = 250
SMALL, LARGE = 2_000, 20_000  # rows of the datasets


def write_shards(dataset: str, folder: Path, num_rows: int, extension: str):
    """Writes the training images as parquet or tar shards, repeated up to that number of rows."""
    rows = load_dataset(dataset, split="train").cast_column("image", Image(decode=False))
    folder.mkdir()
    num_shards = num_rows // ROWS_PER_SHARD
    for number in range(num_shards):
        file = folder / f"train-{number:05d}-of-{num_shards:05d}.{extension}"
        shard = rows.select([(number * ROWS_PER_SHARD + row) % len(rows) for row in range(ROWS_PER_SHARD)])
        if extension == "parquet":
            shard.cast_column("image", Image()).to_parquet(file)
            continue
        with tarfile.open(file, "w") as tar:
            for number_in_shard, row in enumerate(shard):
                for suffix, data in (("jpg", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    info = tarfile.TarInfo(f"{number_in_shard:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def open_split(folder: Path, streaming: bool, num_workers: int = 0) -> ImageSplit:
    data = load_image_data(str(folder), validation_fraction=0, streaming=streaming)
    processor = open_processor(processor_content(TrainConfig(), (SIZE, SIZE), cropped=True))
    decode = Decoder(processor, (3, SIZE, SIZE), crop_min_area=0.08, sources=data.sources)
    split_class = StreamingSplit if streaming else MapStyleSplit
    return split_class(data, "train", decode, LoaderContext(torch.device("cpu"), num_workers))


def batches(folder: Path, streaming: bool):
    return open_split(folder, streaming).training(BATCH, accumulation=1, first_step=0)


def undecoded(folder: Path):
    """Endless batches that are not decoded, as their number of bytes."""
    stream = open_split(folder, streaming=True)
    while True:
        rows = stream.undecoded(0, stream.shards)
        for _ in range(SMALL // BATCH):
            yield sum(len(image["bytes"]) for _, image, _ in itertools.islice(rows, BATCH))


def peak_memory(folder: Path, num_rows: int):
    """Bytes of memory at the peak of one epoch of a stream, and before its first image."""
    torch.set_num_threads(1)
    split = open_split(folder, streaming=True, num_workers=1)
    before = resident("VmRSS")
    loader = split.training(BATCH, accumulation=1, first_step=0)
    for _ in range(num_rows // BATCH):
        next(loader)
    loader.close()  # ends the worker, so that its peak memory is known
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"before": before, "peak": resident("VmHWM") + child}


def step_config() -> ViTSimpleConfig:
    return ViTSimpleConfig.from_variant("S/16", image_size=SIZE, num_labels=1000, pooling="mean")


def step(batch: int = 8):
    """Endless training steps of S/16."""
    model = ViTSimpleForImageClassification(step_config())
    images, labels = torch.randn(batch, 3, SIZE, SIZE), torch.zeros(batch, dtype=torch.long)
    while True:
        model(images, labels=labels).loss.backward()
        yield batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", required=True, help="dataset of large images with 'image' and 'label'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        small, large, tar = (Path(folder) / name for name in ("small", "large", "tar"))
        write_shards(arguments.large, small, SMALL, "parquet")
        write_shards(arguments.large, large, LARGE, "parquet")
        write_shards(arguments.large, tar, SMALL, "tar")
        bytes_per_image = sum(file.stat().st_size for file in small.iterdir()) / SMALL
        memory = {
            SMALL: in_new_process(peak_memory, small, SMALL),
            LARGE: in_new_process(peak_memory, large, LARGE),
        }
        decoded = {
            "on disk": batches(small, streaming=False),
            "stream, parquet": batches(small, streaming=True),
            "stream, tar": batches(tar, streaming=True),
        }
        raw = {"undecoded, parquet": undecoded(small), "undecoded, tar": undecoded(tar)}
        rates = measure(decoded, BATCH, dict.fromkeys(decoded, 4), arguments.rounds)
        rates |= measure(raw, BATCH, dict.fromkeys(raw, 20), arguments.rounds)
        rates |= measure({"step of S/16": step()}, 8, {"step of S/16": 2}, max(3, arguments.rounds // 3))

    medians = {loader: statistics.median(speeds) for loader, speeds in rates.items()}
    print(f"{bytes_per_image:,.0f} bytes per image")
    for loader, speeds in rates.items():
        ratio = f", {medians[loader] / medians['on disk']:.2f} times on disk" if loader.startswith("stream") else ""
        print(f"  {loader:<20} {medians[loader]:8,.1f} images/s ({min(speeds):,.1f} to {max(speeds):,.1f}){ratio}")
    for num_rows, usage in memory.items():
        peak, before = usage["peak"] / 2**20, usage["before"] / 2**20
        print(f"  one epoch of {num_rows:,} rows: peak {peak:,.0f} MiB ({before:,.0f} before)")
    print(f"  {memory[LARGE]['peak'] / memory[SMALL]['peak']:.3f} times the memory for {LARGE // SMALL} times the rows")
    reached = flops_per_image(step_config(), training=True) * medians["step of S/16"]
    print(f"  a step reaches {reached / 1e9:.0f} GFLOP/s here")
    if arguments.output:
        report = {
            **machine(),
            "bytes_per_image": bytes_per_image,
            "images_per_second": rates,
            "peak_memory": memory,
        }
        write_report(report, arguments.output)


if __name__ == "__main__":
    main()
