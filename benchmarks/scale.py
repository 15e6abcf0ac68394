"""What training at scale costs: the table of docs/scale.md, from the constants that `benchmarks.stream` has measured.

    python -m benchmarks.scale

Operations are counted on the network itself, decoding and bytes were measured; the device's speed is its peak times an
assumed utilisation. Everything in the table follows from these by division: it is computed, not measured.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.measure import flops_per_image
from vit_simple import ViTSimpleConfig

MEASURED = Path(__file__).parent / "results/stream.json"
SETS = {"ImageNet-1k, 90 epochs": 90 * 1_281_167, "ImageNet-21k, 30 epochs": 30 * 14_197_122, "a billion, once": 1e9}


def table(peak: float, utilisation: float, devices: int) -> str:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    decoded = statistics.median(measured["images_per_second"]["stream, parquet"])
    columns = ["network", "GFLOP an image", "images/s", "decoding cores", "MB/s read", *SETS]
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for variant in ("Ti/16", "S/16", "B/16", "L/16", "H/14"):
        config = ViTSimpleConfig.from_variant(variant, image_size=224, num_labels=1000, pooling="mean")
        flops = flops_per_image(config, training=True)
        speed = peak * utilisation / flops
        hours = [f"{images / speed / devices / 3600:,.1f} h" for images in SETS.values()]
        cells = [variant, f"{flops / 1e9:,.1f}", f"{speed:,.0f}", f"{speed / decoded:,.0f}"]
        lines.append(" | ".join([*cells, f"{speed * measured['bytes_per_image'] / 1e6:,.0f}", *hours]))
    return "\n".join(f"| {line} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989e12, help="operations per second of a device")
    parser.add_argument("--utilisation", type=float, default=0.4, help="the part of them that is reached")
    parser.add_argument("--devices", type=int, default=8)
    arguments = parser.parse_args()
    print(table(arguments.peak, arguments.utilisation, arguments.devices))


if __name__ == "__main__":
    main()
