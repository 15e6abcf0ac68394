"""How far a checkpoint's answers differ between the two backends of image processors, Pillow and torchvision.

python -m benchmarks.backends outputs/digits --dataset_name data/digits --split test

Needs torchvision, and transformers 5.4 or newer, where `backend` chooses.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor

from vit_simple import ViTSimpleForImageClassification


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    model = ViTSimpleForImageClassification.from_pretrained(arguments.checkpoint).eval()
    rows = load_dataset(arguments.dataset_name, split=arguments.split)
    labels, logits, pixels = torch.tensor(rows["label"][:]), {}, {}
    for backend in ("pil", "torchvision"):
        processor = AutoImageProcessor.from_pretrained(arguments.checkpoint, backend=backend)
        batches = [processor(batch["image"], return_tensors="pt").pixel_values for batch in rows.iter(50)]
        with torch.no_grad():
            logits[backend] = torch.cat([model(batch).logits for batch in batches])
        pixels[backend] = torch.cat(batches)
        right = (logits[backend].argmax(-1) == labels).sum().item()
        print(f"{backend:<12} {right} of {len(labels)} correct")
    for name, sides in (("pixel_values", pixels), ("logits", logits)):
        one, other = sides.values()
        largest, mean = (one - other).abs().max().item(), (one - other).abs().mean().item()
        print(f"{name:<12} differ by {largest:.4f} at most and {mean:.5f} on average, of {one.abs().max().item():.2f}")
    one, other = (side.argmax(-1) for side in logits.values())
    print(f"{(one == other).sum().item()} of {len(labels)} answers are the same")


if __name__ == "__main__":
    main()
