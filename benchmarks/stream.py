"""A stream beside the same files read from the disk: images per second, peak memory, bytes per second, in one run.

    python -m benchmarks.stream --photographs SET

Writes two data sets of parquet shards and one of tar shards (WebDataset) into a temporary folder, the photographs over
and over: 2,000 rows, and 20,000. Rates are for one thread that reads, decodes and crops batches of 50 images to 224
pixels, the sides taking turns; a ratio is that of medians. Peak memory is that of one whole pass with one decoding
process, added for both processes, in a process of its own for each size; what is left of it without images is measured,
too. What it says about a step is measured on the same core: S/16, float32, forward and backward.
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

from benchmarks.data import rates
from benchmarks.measure import flops_per_image, in_a_process, machine, resident, write_report
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.data.dataloader import ImageSplit, LoaderContext, MapStyleSplit
from vit_simple.data.decoding import Decoder
from vit_simple.data.loading import load_image_data
from vit_simple.data.processors import open_processor
from vit_simple.data.streaming import StreamingSplit
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

SIZE, BATCH = 224, 50
SHARD = 250  # rows
FEW, MANY = 2_000, 20_000  # rows


def write_shards(photographs: str, folder: Path, count: int, kind: str):
    rows = load_dataset(photographs, split="train")
    raw = rows.cast_column("image", Image(decode=False))
    folder.mkdir()
    for number in range(count // SHARD):
        name = folder / f"train-{number:05d}-of-{count // SHARD:05d}.{kind}"
        part = raw.select([(number * SHARD + row) % len(raw) for row in range(SHARD)])
        if kind == "parquet":
            part.cast_column("image", Image()).to_parquet(name)
            continue
        with tarfile.open(name, "w") as tar:
            for row, value in enumerate(part):
                for ending, data in (("jpg", value["image"]["bytes"]), ("cls", str(value["label"]).encode())):
                    info = tarfile.TarInfo(f"{row:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def reading(folder: Path, streaming: bool, workers: int = 0) -> ImageSplit:
    data = load_image_data(str(folder), validation_fraction=0, streaming=streaming)
    processor = open_processor(processor_content(TrainConfig(), (SIZE, SIZE), cropped=True))
    decode = Decoder(processor, (3, SIZE, SIZE), crop_min_area=0.08)
    return (StreamingSplit if streaming else MapStyleSplit)(
        data, "train", decode, LoaderContext(torch.device("cpu"), workers)
    )


def batches(folder: Path, streaming: bool):
    return reading(folder, streaming).training(BATCH, accumulation=1, first_step=0)


def undecoded(folder: Path):
    """The bytes of batches of rows, again and again, in the order of the shards."""
    stream = reading(folder, streaming=True)
    while True:
        rows = stream.undecoded(0, stream.shards)
        for _ in range(FEW // BATCH):
            yield sum(len(value["bytes"]) for _, value, _ in itertools.islice(rows, BATCH))


def peak_memory(folder: Path, count: int):
    """The bytes that one pass of a stream takes at most, and those before the first image."""
    torch.set_num_threads(1)
    read = reading(folder, streaming=True, workers=1)
    before = resident("VmRSS")
    images = read.training(BATCH, accumulation=1, first_step=0)
    for _ in range(count // BATCH):
        next(images)
    images.close()  # ends the decoding process, whose memory is then known
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"before": before, "peak": resident("VmHWM") + child}


def step_config() -> ViTSimpleConfig:
    return ViTSimpleConfig.from_variant("S/16", image_size=SIZE, num_labels=1000, pooling="mean")


def step(batch: int = 8):
    """Steps of S/16, without end."""
    network = ViTSimpleForImageClassification(step_config())
    images, labels = torch.randn(batch, 3, SIZE, SIZE), torch.zeros(batch, dtype=torch.long)
    while True:
        network(images, labels=labels).loss.backward()
        yield batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True, help="data set of photographs with 'image' and 'label'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        few, many, tar = Path(folder) / "few", Path(folder) / "many", Path(folder) / "tar"
        write_shards(arguments.photographs, few, FEW, "parquet")
        write_shards(arguments.photographs, many, MANY, "parquet")
        write_shards(arguments.photographs, tar, FEW, "tar")
        bytes_per_image = sum(file.stat().st_size for file in few.iterdir()) / FEW
        memory = {count: in_a_process(peak_memory, path, count) for count, path in ((FEW, few), (MANY, many))}
        sides = {
            "on disk": batches(few, streaming=False),
            "stream, parquet": batches(few, streaming=True),
            "stream, tar": batches(tar, streaming=True),
        }
        found = rates(sides, BATCH, dict.fromkeys(sides, 4), arguments.rounds)
        raw = {"undecoded, parquet": undecoded(few), "undecoded, tar": undecoded(tar)}
        found |= rates(raw, BATCH, dict.fromkeys(raw, 20), arguments.rounds)
        found |= rates({"step of S/16": step()}, 8, {"step of S/16": 2}, max(3, arguments.rounds // 3))

    medians = {side: statistics.median(speeds) for side, speeds in found.items()}
    print(f"{bytes_per_image:,.0f} bytes an image")
    for side, speeds in found.items():
        ratio = f", {medians[side] / medians['on disk']:.2f} times on disk" if side.startswith("stream") else ""
        print(f"  {side:<20} {medians[side]:8,.1f} images/s ({min(speeds):,.1f} to {max(speeds):,.1f}){ratio}")
    for count, row in memory.items():
        peak, before = (row[name] / 2**20 for name in ("peak", "before"))
        print(f"  one pass over {count:,} rows: at most {peak:,.0f} MiB ({before:,.0f} before)")
    print(f"  {memory[MANY]['peak'] / memory[FEW]['peak']:.3f} times the memory for {MANY // FEW} times the rows")
    reached = flops_per_image(step_config(), training=True) * medians["step of S/16"]
    print(f"  a step reaches {reached / 1e9:.0f} GFLOP/s here")
    if arguments.output:
        report = {
            **machine(),
            "bytes_per_image": bytes_per_image,
            "images_per_second": found,
            "peak_memory": memory,
        }
        write_report(report, arguments.output)


if __name__ == "__main__":
    main()
