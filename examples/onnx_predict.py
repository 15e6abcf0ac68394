"""Classifies images with an exported checkpoint, without torch and transformers: onnxruntime, numpy and Pillow.

    python export.py outputs/digits --to onnx
    python examples/onnx_predict.py outputs/digits image.png

The steps are those of preprocessor_config.json, for every checkpoint of vit_simple that takes RGB images
and was not trained with --resize fit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def preprocess(image: Image.Image, config: dict) -> np.ndarray:
    """(1, 3, H, W) float32: resized, cropped to the center, scaled and normalized."""
    image, size = ImageOps.exif_transpose(image).convert("RGB"), config["size"]
    if config.get("do_pad"):
        raise SystemExit("this program does not pad images, as the model needs it; use the image processor")
    if edge := size.get("shortest_edge"):
        size = {side: edge * length // min(image.size) for side, length in zip(("width", "height"), image.size)}
    image = image.resize((size["width"], size["height"]), config["resample"])
    if config.get("do_center_crop"):
        crop = config["crop_size"]
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(image, np.float32) * config["rescale_factor"]
    pixels = (pixels - config["image_mean"]) / config["image_std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def scores(logits: np.ndarray, problem_type: str | None) -> np.ndarray:
    """Probabilities, or the numbers that a regression predicts."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or len(logits) == 1:
        return 1 / (1 + np.exp(-logits))
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def main():
    if len(sys.argv) < 3:
        raise SystemExit("usage: python examples/onnx_predict.py CHECKPOINT IMAGE...")
    folder, *files = sys.argv[1:]
    model = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    config = json.loads(Path(folder, "preprocessor_config.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(Path(folder, "onnx/model.onnx"))
    for file in files:
        (logits,) = session.run(["logits"], {"pixel_values": preprocess(Image.open(file), config)})
        found = scores(logits[0], model.get("problem_type"))
        best = int(found.argmax())
        print(f"{file}: {model['id2label'][str(best)]} {found[best]:.4f}")


if __name__ == "__main__":
    main()
