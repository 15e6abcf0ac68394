"""Saves the features of images: one vector for each image and one for each patch, the latter arranged as a map.

    python examples/extract_features.py
    python examples/extract_features.py --model your-name/your-vit --dataset path/to/images --count 100

The file has `vectors` (N, D), the pooled features, and `maps` (N, D, rows, columns), the patch features of --layer.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--dataset", default="data/digits", help="dataset with the column image")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=16, help="number of images")
    parser.add_argument("--layer", type=int, default=-1, help="0: the input of the first block; -1: the last block")
    parser.add_argument("--output", default="outputs/features.safetensors")
    return parser.parse_args()


@torch.no_grad()
def main():
    options = parse_arguments()
    images = load_dataset(options.dataset, split=options.split).select(range(options.count))["image"]
    processor = AutoImageProcessor.from_pretrained(options.model)
    backbone = AutoModel.from_pretrained(options.model, trust_remote_code=True)

    pixel_values = processor(list(images), return_tensors="pt").pixel_values
    output = backbone(pixel_values, output_hidden_states=True)
    tokens = output.hidden_states[options.layer]  # (N, T, D)
    patches = tokens[:, backbone.config.num_prefix_tokens :]  # without class token and registers
    maps = patches.unflatten(1, backbone.config.grid_size).permute(0, 3, 1, 2)  # (N, D, rows, columns)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": output.pooler_output, "maps": maps.contiguous()}, options.output)
    print(f"{options.output}: vectors {tuple(output.pooler_output.shape)}, maps {tuple(maps.shape)}")


if __name__ == "__main__":
    main()
