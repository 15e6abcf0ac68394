"""How often a compiled network, in float32, bfloat16 or int8, gives the answer of the network itself on test images.

python -m benchmarks.agreement outputs/cifar10 --dataset_name uoft-cs/cifar10 --image_column_name img
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor

from benchmarks.measure import RESULTS, machine, told, write_report
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
    print(told(report))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sides = {
            "eager": model,
            "fast": compile_inference(model, Path(folder) / "float32.pt2"),
            "bf16": compile_inference(copy.deepcopy(model).to(torch.bfloat16), Path(folder) / "bfloat16.pt2"),
            "int8": compile_inference(model, Path(folder) / "int8.pt2", int8=True),
        }
        answers = {side: [] for side in sides}
        for batch in rows.iter(256):
            pixels = processor(batch[arguments.image_column_name], return_tensors="pt").pixel_values
            for side, network in sides.items():
                answers[side].append(network(pixels.bfloat16() if side == "bf16" else pixels).logits.argmax(-1))
    for side, parts in answers.items():
        answer, expected = torch.cat(parts), torch.cat(answers["eager"])
        right, same = ((answer == other).float().mean().item() for other in (labels, expected))
        report[side] = {"right": right, "same": same}
        print(f"  {side:<6} {right:.2%} right, {same:.2%} as the network itself")
    write_report(report, RESULTS / "agreement.json")


if __name__ == "__main__":
    main()
