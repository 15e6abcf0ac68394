"""Training images per second: this repository's way beside per-image transforms in a DataLoader, in one run.

    pip install --target peers --no-deps torchvision    # one that fits your torch, in a folder of its own
    PYTHONPATH=peers python -m benchmarks.data --small SET --photographs SET

The other side is what transformers' example for image classification does: `with_transform` with torchvision's
RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize for each image, stacked by a collate function, in a
DataLoader with its default of no workers. Every side decodes JPEG with Pillow and has one thread; they take turns, and
a ratio is that of medians. Small images are delivered as float batches by both sides. Photographs leave the host as
uint8 here; what the device does with them then (flip, normalise) is measured on the same core, too.
"""

import argparse
import statistics
import time
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader

from benchmarks.measure import machine, write_report
from vit_simple.data.augment import Augment
from vit_simple.data.dataloader import LoaderContext, MapStyleSplit
from vit_simple.data.decoding import Decoder
from vit_simple.data.loading import load_image_data
from vit_simple.data.processors import open_processor
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content


def per_image(name: str, size: int, batch_size: int):
    """The example's batches, without end."""
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    normalize = Normalize([0.5] * 3, [0.5] * 3)
    transform = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalize])
    rows = datasets.load_dataset(name, split="train")

    def preprocess(rows):
        rows["pixel_values"] = [transform(image.convert("RGB")) for image in rows["image"]]
        return rows

    def collate(rows):
        pixel_values = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["label"] for row in rows])}

    loader = DataLoader(rows.with_transform(preprocess), batch_size, shuffle=True, collate_fn=collate)
    while True:
        for batch in loader:
            yield batch["pixel_values"], batch["labels"]


def ours(name: str, size: int, batch_size: int, kept: bool, device_part: bool = True):
    """Batches as train.py makes them: kept decoded, moved and flipped; or decoded, cropped and then flipped."""
    data = load_image_data(name, validation_fraction=0)
    processor = open_processor(processor_content(TrainConfig(), (size, size), cropped=not kept))
    decode = Decoder(processor, (3, size, size), crop_min_area=0.0 if kept else 0.08)
    images = MapStyleSplit(data, "train", decode, LoaderContext(torch.device("cpu")))
    if kept:
        images.cache(quiet=True)
    augment = Augment(processor, len(data.labels.class_names), crop_padding=4 if kept else 0, horizontal_flip=0.5)
    for pixels, labels in images.training(batch_size, accumulation=1, first_step=0):
        yield augment(pixels, labels) if device_part else (pixels, labels)


def rates(sides: dict, batch_size: int, batches: dict, rounds: int) -> dict[str, list[float]]:
    """Images per second of each side in every round, the sides taking turns; the first batch of a turn is not timed."""
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            next(side)
            start = time.perf_counter()
            for _ in range(batches[name]):
                next(side)
            found[name].append(batches[name] * batch_size / (time.perf_counter() - start))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="data set of equal small images with 'image' and 'label', as CIFAR-10")
    parser.add_argument("--photographs", help="data set of photographs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    report = machine()
    cases = [(arguments.small, 32, 256, True), (arguments.photographs, 224, 50, False)]
    for name, size, batch_size, kept in cases:
        if name is None:
            print(f"{size} px: no data set was named")
            continue
        sides = {"ours": ours(name, size, batch_size, kept), "per image": per_image(name, size, batch_size)}
        if not kept:
            sides = {"ours, on the host": ours(name, size, batch_size, kept, device_part=False), **sides}
        batches = {side: 80 if kept and side == "ours" else 4 for side in sides}
        found = rates(sides, batch_size, batches, arguments.rounds)
        medians = {side: statistics.median(speeds) for side, speeds in found.items()}
        way = "kept decoded" if kept else "decoded and cropped"
        print(f"{size} px, batches of {batch_size}, {way}:")
        for side, speeds in found.items():
            ratio = medians[side] / medians["per image"]
            spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
            print(f"  {side:<18} {medians[side]:8,.0f} images/s, {ratio:5.2f} times per image   ({spread})")
        report[way] = {"size": size, "batch_size": batch_size, "images_per_second": found}
    if arguments.output:
        write_report(report, arguments.output)


if __name__ == "__main__":
    main()
