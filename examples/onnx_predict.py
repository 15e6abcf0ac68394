"""Classifies images with an exported checkpoint, without torch and transformers: onnxruntime, numpy and Pillow.

    python export.py outputs/digits --to onnx
    python examples/onnx_predict.py outputs/digits image.png

The steps are those of preprocessor_config.json, for every checkpoint of vit_simple that takes RGB images, resizes,
rescales and normalizes them, and was not trained with --resize fit. A regression prints its numbers instead of a
probability.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def preprocess(image: Image.Image, config: dict) -> np.ndarray:
    """(1, 3, H, W) float32: resized, cropped to the center, scaled and normalized."""
    if config.get("do_pad") or not all(config.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")):
        raise SystemExit("this program resizes, rescales and normalizes, and does not pad; use the image processor")
    image, size = ImageOps.exif_transpose(image).convert("RGB"), config["size"]
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


def probabilities(logits: np.ndarray, problem_type: str | None) -> np.ndarray:
    """What a pipeline makes of the logits (K,); the numbers of a regression stay as they are."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification" or len(logits) == 1:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="checkpoint with the file onnx/model.onnx")
    parser.add_argument("images", nargs="+")
    options = parser.parse_args()
    read = lambda name: json.loads(Path(options.folder, name).read_text(encoding="utf-8"))  # noqa: E731
    try:
        config, processor = read("config.json"), read("preprocessor_config.json")
        session = onnxruntime.InferenceSession(Path(options.folder, "onnx/model.onnx").read_bytes())
        if "logits" not in [output.name for output in session.get_outputs()]:
            parser.error(f"{options.folder}: this model has no head, so it predicts nothing")
        for file in options.images:
            (logits,) = session.run(["logits"], {"pixel_values": preprocess(Image.open(file), processor)})
            scores, names = probabilities(logits[0], config.get("problem_type")), config["id2label"]
            shown = range(len(scores)) if config.get("problem_type") == "regression" else [scores.argmax()]
            print(f"{file}: {', '.join(f'{names[str(label)]} {scores[label]:.4f}' for label in shown)}")
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
