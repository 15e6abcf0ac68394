"""The exported files of a checkpoint: written aside, measured on real images, then moved into its folder."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from transformers import PreTrainedModel

from ..files import ONNX_FILES, PREPROCESSOR, RECORD, RECORD_FIELDS, SAFETENSORS, UserError, read_json, terminal_text
from .compiling import AOT_FILES, open_compiled, write_compiled
from .measuring import BATCH_SIZE, EAGER, PACKAGED, Images, measure
from .onnx import open_onnx, require_onnx, write_onnx
from .opening import open_model, trained_bit_depth

WORST_AGREEMENT = 0.99
FILES = {"onnx": ONNX_FILES, "aot": AOT_FILES}
EXAMPLES = ("onnx/example-0.png", "onnx/example-1.png", "onnx/example-2.png")  # images of the model's own classes


def export_checkpoint(
    folder: Path,
    to: str,
    *,
    dynamic_size: bool = False,
    attentions: bool = False,
    force: bool = False,
    dataset: dict | None = None,
    max_eval_samples: int = 500,
) -> dict:
    """Writes the folder `onnx` or `aot` of a checkpoint, in place of an earlier one; returns what was measured.

    Args:
        to: "onnx" or "aot".
        dynamic_size, attentions: for ONNX: accept any image size, see `write_onnx`, and give the attention weights.
        force: also keep files that agree with PyTorch on less than 99% of the images.
        dataset: the arguments of `load_image_data`; by default the recorded dataset if it is on the Hub, otherwise the
            digits that come with this package.
        max_eval_samples: the number of images to measure on.

    Raises:
        UserError: the checkpoint, the dataset or the options cannot be used, or a package is missing.
    """
    if to == "onnx":
        require_onnx()
    elif dynamic_size or attentions:
        raise UserError("--dynamic_size and --attentions can only be combined with --to onnx")
    if not (folder / PREPROCESSOR).is_file():
        raise UserError(f"CHECKPOINT: expected a folder with config.json, weights and {PREPROCESSOR}, got {folder}")
    options = {"attn_implementation": "eager"} if attentions else {}
    model, processor = open_model(folder, any_channels=True, **options)
    model.config.output_attentions = attentions
    bit_depth = trained_bit_depth(str(folder)) or 16
    dataset = dataset or recorded_dataset(folder) or PACKAGED
    images = Images(dataset, model.config, processor, max_eval_samples, bit_depth)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{to}-") as work:
        new = Path(work) / to
        new.mkdir()
        if to == "onnx":
            write_onnx(model, new, dynamic_size)
            save_examples(images, Path(work))
        else:
            write_compiled(model, new)
        results = compare(folder, new, images, force)
        shutil.rmtree(folder / to, ignore_errors=True)
        new.rename(folder / to)
    return {
        "dataset": images.name,
        "split": images.split,
        "images": len(images),
        "batch_size": BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "models": results,
    }


def compare(folder: Path, new: Path, images: Images, force: bool) -> dict[str, dict]:
    """What `measure` finds of a checkpoint, of its new files and of its earlier ones of the other kind.

    New files that agree on too few images are deleted unless `force`.
    """
    model, _ = open_model(folder, any_channels=True)
    problem = model.config.problem_type if hasattr(model, "head") else "features"
    places = {name: (new.parent if name in FILES[new.name] else folder) / name for name in (*AOT_FILES, *ONNX_FILES)}
    places = {name: path for name, path in places.items() if path.exists()}
    exported = open_all(places, FILES[new.name])
    results = measure({EAGER: as_function(model), **exported}, images, problem)
    results[EAGER]["bytes"] = sum(path.stat().st_size for each in SAFETENSORS for path in folder.glob(each))
    for name in exported:
        results[name]["bytes"] = places[name].stat().st_size
        is_old = name not in FILES[new.name]
        results[name]["kept"] = is_old or force or results[name]["agreement"] >= WORST_AGREEMENT
        if not results[name]["kept"]:
            places[name].unlink()
    return results


def recorded_dataset(folder: Path) -> dict | None:
    """The dataset of the run as arguments of `load_image_data`, None unless it is on the Hub."""
    dataset = read_json(folder / RECORD, RECORD_FIELDS).get("dataset") or {}
    if not dataset.get("on_hub"):
        return None
    return {"name": dataset["name"], "config_name": dataset.get("config"), "revision": dataset.get("revision")}


def save_examples(images: Images, folder: Path):
    """Saves the first images for the page of a Space, if they are of the model's own classes."""
    if images.classes is not None and images.pixels.shape[1] == 3:
        for name, pixels in zip(EXAMPLES, images.pixels):
            PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)


def as_function(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model as a function of pixels (B, C, H, W) to its logits or, without a head, to its pooled vectors."""
    name = "logits" if hasattr(model, "head") else "pooler_output"
    return lambda pixels: model(pixels)[name]


def open_all(places: dict[str, Path], new: tuple[str, ...]) -> dict[str, Callable]:
    """The files as functions; an earlier one that this machine cannot open is left out, with a printed line."""
    functions = {}
    for name, path in places.items():
        try:
            functions[name] = (open_onnx if name in ONNX_FILES else open_compiled)(path)
        except (ImportError, RuntimeError) as error:  # no onnxruntime; another machine or version of torch
            if name in new:
                raise
            print(terminal_text(f"{name} is not compared, because it cannot be opened here: {error}"))
    return functions
