"""Training images per second from this repository's data loading and from per-image transforms in a DataLoader.

    pip install --target peers --no-deps torchvision    # one that fits your torch, in a folder of its own
    PYTHONPATH=peers python -m benchmarks.data --small SET --large SET

The per-image transforms are those of transformers' example for image classification: `with_transform` with
torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, a collate function that stacks, and a
DataLoader with its default of no workers. Both decode JPEG with Pillow in one thread. They are measured in turn, and a
ratio is that of medians. Both deliver small images as float batches. Large images leave the host as uint8 here;
flipping and normalizing them, which is the device's work, is also measured on the same core.
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
    """Endless batches of the example."""
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


def ours(name: str, size: int, batch_size: int, cached: bool, augmented: bool = True):
    """Endless batches of train.py: cached, cropped with padding and flipped; or decoded, cropped and flipped."""
    data = load_image_data(name, validation_fraction=0)
    processor = open_processor(processor_content(TrainConfig(), (size, size), cropped=not cached))
    decode = Decoder(processor, (3, size, size), crop_min_area=0.0 if cached else 0.08, sources=data.sources)
    images = MapStyleSplit(data, "train", decode, LoaderContext(torch.device("cpu")))
    if cached:
        images.cache(quiet=True)
    augment = Augment(processor, len(data.labels.class_names), crop_padding=4 if cached else 0, horizontal_flip=0.5)
    for pixels, labels in images.training(batch_size, accumulation=1, first_step=0):
        yield augment(pixels, labels) if augmented else (pixels, labels)


def measure(loaders: dict, batch_size: int, num_batches: dict, rounds: int) -> dict[str, list[float]]:
    """Images per second of each loader in every round; the first batch of a round is not timed."""
    rates = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            next(loader)
            start = time.perf_counter()
            for _ in range(num_batches[name]):
                next(loader)
            rates[name].append(num_batches[name] * batch_size / (time.perf_counter() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", help="dataset of small images of one size with 'image' and 'label', as CIFAR-10")
    parser.add_argument("--large", help="dataset of large images")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    report = machine()
    cases = [(arguments.small, 32, 256, True), (arguments.large, 224, 50, False)]
    for name, size, batch_size, cached in cases:
        if name is None:
            print(f"{size} px: skipped, no dataset was named")
            continue
        loaders = {"ours": ours(name, size, batch_size, cached), "per image": per_image(name, size, batch_size)}
        if not cached:
            loaders = {"ours, on the host": ours(name, size, batch_size, cached, augmented=False), **loaders}
        num_batches = {loader: 80 if cached and loader == "ours" else 4 for loader in loaders}
        rates = measure(loaders, batch_size, num_batches, arguments.rounds)
        medians = {loader: statistics.median(speeds) for loader, speeds in rates.items()}
        case = "cached" if cached else "decoded and cropped"
        print(f"{size} px, batches of {batch_size}, {case}:")
        for loader, speeds in rates.items():
            ratio = medians[loader] / medians["per image"]
            extremes = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
            print(f"  {loader:<18} {medians[loader]:8,.0f} images/s, {ratio:5.2f} times per image   ({extremes})")
        report[case] = {"size": size, "batch_size": batch_size, "images_per_second": rates}
    if arguments.output:
        write_report(report, arguments.output)


if __name__ == "__main__":
    main()
