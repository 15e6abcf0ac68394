"""Images per second of predict.py, of a pipeline, and of the forward pass alone, for the same JPEG images.

    python -m benchmarks.predict --variants S/16 Ti/16 --images 2000 --rounds 10 --name predict

The images are generated: 1152 x 864 pixels (1 MP), about 270 KB each. In each round, the three sides take turns with
the same part of them, in random order. The model has 1,000 labels and random weights, in float32, and predicts batches
of 16 images. The forward pass takes batches that are in memory already. A ratio is that of medians.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm
from transformers import pipeline

from benchmarks.measure import RESULTS, describe, interleave, machine, write_report
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.data.processors import stock_processor
from vit_simple.inference.images import find_images
from vit_simple.inference.predicting import Predictions, open_predictor

SIZE, BATCH_SIZE, WARM_UP = (1152, 864), 16, 3


def write_images(folder: Path, count: int):
    """Blurred noise with some grain."""
    for number in tqdm(range(count), "writing images", leave=False):
        rng = np.random.default_rng(number)
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (27, 36, 3), np.uint8))
        smooth = np.asarray(coarse.resize(SIZE, PIL.Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-9, 10, smooth.shape, np.int16)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=90)


def write_checkpoint(folder: Path, variant: str):
    ViTSimpleForImageClassification(ViTSimpleConfig.from_variant(variant, num_labels=1000)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(stock_processor((224, 224), 256)))


class Sides:
    """What is compared: each call takes the next part of the images, after some calls for warming up.

    Args:
        parts: lists of files.
    """

    def __init__(self, checkpoint: Path, parts: list[list[str]], output: Path):
        self.parts, self.output = parts, output
        self.predictor = open_predictor(str(checkpoint), find_images(parts[0]))
        self.pipeline = pipeline("image-classification", str(checkpoint), device=self.predictor.model.device)
        self.pixels = torch.randn(BATCH_SIZE, 3, 224, 224, device=self.predictor.model.device)
        self.calls = {"predict.py": 0, "pipeline": 0, "forward pass": 0}
        self.probabilities = {"predict.py": [], "pipeline": []}

    def next_part(self, side: str) -> list[str]:
        number = max(self.calls[side] - WARM_UP, 0)
        self.calls[side] += 1
        return self.parts[number]

    def predict(self):
        self.predictor.images.paths = self.next_part("predict.py")
        self.output.unlink(missing_ok=True)
        table = Predictions(self.predictor, self.output, BATCH_SIZE).run()
        self.probabilities["predict.py"] += table["probability"].to_pylist()

    def pipe(self):
        answers = self.pipeline(self.next_part("pipeline"), batch_size=BATCH_SIZE)
        self.probabilities["pipeline"] += [answer[0]["score"] for answer in answers]

    @torch.no_grad()
    def forward(self):
        for start in range(0, len(self.next_part("forward pass")), BATCH_SIZE):
            self.predictor.model(self.pixels[: len(self.parts[0]) - start]).logits.sum().item()

    @property
    def functions(self) -> dict[str, Callable[[], None]]:
        return {"predict.py": self.predict, "pipeline": self.pipe, "forward pass": self.forward}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["S/16", "Ti/16"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", help="of the file in benchmarks/results to write")
    arguments = parser.parse_args()
    report = machine()
    print(describe(report))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "images").mkdir()
        write_images(folder / "images", arguments.images)
        files = find_images([str(folder / "images")]).paths
        parts = [files[number :: arguments.rounds] for number in range(arguments.rounds)]
        parts = [part[: len(parts[-1])] for part in parts]
        for variant in arguments.variants:
            write_checkpoint(folder / "model", variant)
            sides = Sides(folder / "model", parts, folder / "predictions.csv")
            times = interleave(sides.functions, arguments.rounds, torch.device("cpu"))
            rates = {side: [len(parts[0]) / each for each in found] for side, found in times.items()}
            difference = np.abs(np.subtract(*sides.probabilities.values())).max()
            report[variant] = {"images_per_second": rates, "largest_difference": float(difference)}
            medians = {side: statistics.median(speeds) for side, speeds in rates.items()}
            print(f"{variant}: probabilities differ by at most {difference:.1e}")
            for side, median in medians.items():
                ratios = [f"{medians['predict.py'] / medians[other]:.2f} times the {other}" for other in medians]
                text = f": {', '.join(ratios[1:])}" if side == "predict.py" else ""
                print(f"  {side:<12} {median:6.1f} images/s{text}")
    if arguments.name:
        write_report(report, RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
