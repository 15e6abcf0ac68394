"""How often a compiled model, in float32, bfloat16 or int8, predicts the same class as the eager model.

python -m benchmarks.agreement outputs/cifar10 --dataset_name uoft-cs/cifar10 --image_column_name img
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor

from benchmarks.measure import RESULTS, describe, machine, write_report
from vit_simple import ViTSimpleForImageClassification
from vit_simple.inference.compiling import compile_inference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--image_column_name", default="image")
    arguments = parser.parse_args()
    model = ViTSimpleForImageClassification.from_pretrained(arguments.checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.checkpoint)
    rows = load_dataset(arguments.dataset_name, split="test")
    labels = torch.tensor(rows["label"])
    report = {**machine(), "images": len(rows)}
    print(describe(report))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = {
            "eager": model,
            "aot": compile_inference(model, Path(folder) / "float32.pt2"),
            "bf16": compile_inference(copy.deepcopy(model).to(torch.bfloat16), Path(folder) / "bfloat16.pt2"),
            "int8": compile_inference(model, Path(folder) / "int8.pt2", int8=True),
        }
        predictions = {name: [] for name in models}
        for batch in rows.iter(256):
            pixels = processor(batch[arguments.image_column_name], return_tensors="pt").pixel_values
            for name, compiled in models.items():
                logits = compiled(pixels.bfloat16() if name == "bf16" else pixels).logits
                predictions[name].append(logits.argmax(-1))
    predictions = {name: torch.cat(batches) for name, batches in predictions.items()}
    for name, predicted in predictions.items():
        correct = (predicted == labels).float().mean().item()
        same = (predicted == predictions["eager"]).float().mean().item()
        report[name] = {"right": correct, "same": same}
        print(f"  {name:<6} {correct:.2%} correct, {same:.2%} the same as the eager model")
    write_report(report, RESULTS / "agreement.json")


if __name__ == "__main__":
    main()
