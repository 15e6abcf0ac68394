"""Opens a plain ViT of timm or transformers and writes it as this repository, timm or transformers has it.

python convert_checkpoint.py google/vit-base-patch16-224 outputs/vit-b16
python convert_checkpoint.py outputs/vit-b16 outputs/vit-b16-timm --to timm
"""

import argparse
import json
import math
import pickle
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import safetensors
import torch
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from vit_simple import ViTSimpleConfig
from vit_simple.card import PLACEHOLDER, build_card, inherited, read_json, record
from vit_simple.configuration_vit_simple import pair
from vit_simple.layout_timm import from_timm, to_timm
from vit_simple.layout_transformers import from_transformers, to_transformers
from vit_simple.layouts import Tensors, gather, listed
from vit_simple.options import ROOT
from vit_simple.prepare import open_processor, stock_processor

WEIGHTS = (  # files of a folder, the first kind that is there; those with a dash are parts of one checkpoint
    *("model.safetensors", "model-*.safetensors", "*.safetensors"),
    *("pytorch_model.bin", "pytorch_model-*.bin", "*.bin", "*.pth"),
)
BILINEAR, BICUBIC = PIL.Image.Resampling.BILINEAR.value, PIL.Image.Resampling.BICUBIC.value
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FAMILIES = {  # resampling, part of the short side that the crop keeps (None: all is squashed), mean and deviation
    "google": (BILINEAR, None, HALF),
    "augreg": (BICUBIC, 0.9, HALF),
    "deit": (BICUBIC, 0.875, IMAGENET),
    "deit3": (BICUBIC, 0.9, IMAGENET),
    "dino": (BICUBIC, 0.875, IMAGENET),
    "dinov2": (BICUBIC, 0.875, IMAGENET),
    "mae": (BICUBIC, 0.875, IMAGENET),
    "clip": (BICUBIC, 1.0, OPENAI),
}
FAMILY_OF_TYPE = {"vit_mae": "mae", "dinov2": "dinov2", "dinov2_with_registers": "dinov2"}


@dataclass
class Checkpoint:
    """A network as this repository has it, its image processor as JSON, and what its card inherits."""

    config: ViTSimpleConfig
    tensors: Tensors
    processor: dict
    card: dict


def find(source: str) -> tuple[Path, list[Path]]:
    """The folder of a checkpoint, fetched from the Hub if it is no path here, and its files of weights."""
    folder = Path(source)
    if folder.is_file():
        return folder.parent, [folder]
    if not folder.exists():
        described = ["config.json", "preprocessor_config.json", "README.md"]
        try:
            folder = Path(snapshot_download(source, allow_patterns=[*described, *WEIGHTS[:2]]))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(source, allow_patterns=[*described, *WEIGHTS[3:5]]))
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a file, a folder or a repository of the Hub, got {source}: {error}") from error
    for pattern in WEIGHTS:
        files = sorted(folder.glob(pattern))
        if len(files) > 1 and "-" not in pattern:
            raise ValueError(f"expected one file of weights in {folder}, got {listed(file.name for file in files)}")
        if files:
            return folder, files
    raise ValueError(f"expected a file of weights in {folder}, got {listed(sorted(p.name for p in folder.iterdir()))}")


def load_tensors(files: list[Path]) -> Tensors:
    """The tensors of files, in the memory of the files themselves; no pickle is run."""
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, "pt") as opened:
                    tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                continue
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file}: expected a whole file of nothing but tensors: {error}") from error
        for wrapper in ("model", "state_dict"):
            loaded = loaded.get(wrapper, loaded) if isinstance(loaded, dict) else loaded
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ValueError(f"{file}: expected names and tensors, got {type(loaded).__name__} with other things in it")
        tensors |= loaded
    return tensors


def read(
    source: str,
    notes: list[str],
    family: str | None = None,
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
    base_model: str | None = None,
) -> Checkpoint:
    """A checkpoint of any layout; the options tell what its files do not, and `notes` gets a line for each guess.

    Raises:
        ValueError: it is no plain ViT, does not fit together, or is not described well enough.
    """
    folder, files = find(source)
    tensors, content = load_tensors(files), read_json(folder / "config.json")
    pretrained, kind = content.get("pretrained_cfg", {}), content.get("model_type")
    if kind == ViTSimpleConfig.model_type:
        config = ViTSimpleConfig.from_pretrained(folder)
        tensors = gather(tensors, {}, config)
    elif kind is not None:
        try:
            theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except StrictDataclassError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        config, tensors = from_transformers(theirs, tensors, notes)
    else:
        config, tensors = from_timm(content, tensors, notes, num_attention_heads, hidden_act)

    image_size, processor = pair(config.image_size), read_json(folder / "preprocessor_config.json")
    family = family or FAMILY_OF_TYPE.get(kind, "clip" if config.pre_norm else None)
    if pretrained:
        processor = of_timm(pretrained, image_size)
    elif not processor and family is not None:
        resample, part, scale = FAMILIES[family]
        processor = stock_processor(image_size, part and math.floor(min(image_size) / part), resample) | scale
    elif not processor:
        raise ValueError(f"--family: expected one of {', '.join(FAMILIES)}, since no file tells how pixels are scaled")
    known = {"license": pretrained.get("license"), "base_model": pretrained.get("hf_hub_id")} | inherited(folder)
    card = {name: value for name, value in known.items() if value}
    if not Path(source).exists():
        card["base_model"] = source
    if base_model is not None:
        card["base_model"] = base_model
    return Checkpoint(config, tensors, fitted(processor, config, notes), card)


def fitted(content: dict, config: ViTSimpleConfig, notes: list[str]) -> dict:
    """preprocessor_config.json with nothing left to defaults, for images of the size that the network takes."""
    processor, wanted = open_processor(content), pair(config.image_size)
    cropped = bool(getattr(processor, "do_center_crop", False))
    sizes = {"size": dict(processor.size)} | ({"crop_size": dict(processor.crop_size)} if cropped else {})
    made = list(sizes.values())[-1]
    made = made.get("height", made.get("shortest_edge")), made.get("width", made.get("shortest_edge"))
    if made != wanted:
        notes.append(f"the image processor makes {wanted} pixels, as the network takes, in the place of {made}")
        for size in sizes.values():
            for side, length in size.items():
                axis = int(side == "width")
                size[side] = round(length * wanted[axis] / made[axis])
    return {
        "image_processor_type": re.sub("(Fast|Pil)$", "", type(processor).__name__),
        "do_convert_rgb": config.num_channels == 3,  # pipelines send RGB whatever this says, and need it said
        "do_resize": processor.do_resize,
        **sizes,
        "resample": int(processor.resample),
        "do_center_crop": cropped,
        "do_rescale": processor.do_rescale,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


def of_timm(pretrained: dict, image_size: tuple[int, int]) -> dict:
    """preprocessor_config.json for what timm's `pretrained_cfg` does to images.

    Raises:
        ValueError: a crop or an interpolation that no image processor has.
    """
    height, width = image_size
    part, mode = pretrained.get("crop_pct", 0.875), pretrained.get("crop_mode", "center")
    resample = getattr(PIL.Image.Resampling, pretrained.get("interpolation", "bicubic").upper(), None)
    squash = part == 1 and (mode == "squash")
    if resample is None or not (squash or (mode == "center" and height == width)):
        raise ValueError(
            "pretrained_cfg: expected an interpolation of pillow, and crop_mode center of square images or squash with "
            f"crop_pct 1.0, got {pretrained.get('interpolation')}, {mode} and {part} for {image_size} pixels"
        )
    content = stock_processor(image_size, None if squash else math.floor(height / part), resample.value)
    return content | {"image_mean": list(pretrained["mean"]), "image_std": list(pretrained["std"])}


def for_timm(processor: dict, config: ViTSimpleConfig) -> dict:
    """timm's `pretrained_cfg` for what an image processor does.

    Raises:
        ValueError: steps that timm does not take, or leaves that it always takes.
    """
    size, (height, width) = processor["size"], pair(config.image_size)
    if not (processor["do_resize"] and processor["do_rescale"] and math.isclose(processor["rescale_factor"], 1 / 255)):
        raise ValueError(f"--to timm: expected images that are resized and scaled by 1 / 255, got {processor}")
    longer = size.get("shortest_edge", size.get("height"))
    # The shortest number that timm cuts down to the same edge.
    part = next(
        part for digits in range(1, 17) if math.floor(height / (part := round(height / longer, digits))) == longer
    )
    normal = processor["do_normalize"]
    return {
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "interpolation": PIL.Image.Resampling(processor["resample"]).name.lower(),
        "crop_pct": part,
        "crop_mode": "center" if "shortest_edge" in size else "squash",
        "mean": processor["image_mean"] if normal else [0.0] * config.num_channels,
        "std": processor["image_std"] if normal else [1.0] * config.num_channels,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def described(checkpoint: Checkpoint, to: str, notes: list[str]) -> tuple[PretrainedConfig | dict, Tensors]:
    """Config and tensors as the library named has them.

    Raises:
        ValueError: the network or the image processor has what that library has not.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if to == "timm":
        content, tensors = to_timm(config, tensors, notes)
        licence = {name: value for name, value in checkpoint.card.items() if name == "license"}
        classes = {"num_classes": content["num_classes"]}
        return content | {"pretrained_cfg": for_timm(checkpoint.processor, config) | classes | licence}, tensors
    if to == "transformers":
        config, tensors = to_transformers(config, tensors)
    else:
        config.architectures = ["ViTSimpleForImageClassification" if "head.weight" in tensors else "ViTSimpleModel"]
    config.dtype = next(iter(tensors.values())).dtype
    return config, tensors


def write_card(checkpoint: Checkpoint, to: str, folder: Path, notes: list[str]):
    """Writes README.md of a folder for another library: where its weights come from, and how to open it."""
    kind = "ForImageClassification" if "head.weight" in checkpoint.tensors else ""
    use = {
        "transformers": f'transformers.AutoModel{kind}.from_pretrained("{PLACEHOLDER}/{folder.name}")',
        "timm": f'timm.create_model("hf-hub:{PLACEHOLDER}/{folder.name}", pretrained=True)',
    }
    task = "image-classification" if kind else "image-feature-extraction"
    data = ModelCardData(library_name=to, pipeline_tag=task, **checkpoint.card)
    origin = checkpoint.card.get("base_model", "another checkpoint")
    lines = [f"# {folder.name}", f"The weights of {origin}:", f"```python\nimport {to}\n\nmodel = {use[to]}\n```"]
    text = "\n\n".join([*lines, *(f"- {note}" for note in notes)])
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}\n", encoding="utf-8")


def convert(source: str, out: str | Path, to: str = "vit_simple", **options) -> list[str]:
    """Writes the folder `out` from a file, a folder or a repository of the Hub; returns what a user should be told.

    Args:
        to: "vit_simple", "timm" or "transformers", who is to open the folder.
        options: as for `read`.

    Raises:
        ValueError: the source is no plain ViT or is damaged, `to` cannot hold it, or `out` exists. Nothing is written.
    """
    out, notes = Path(out), []
    if out.exists():
        raise ValueError(f"OUT: expected a folder that is not there yet, got {out}")
    checkpoint = read(str(source), notes, **options)
    config, tensors = described(checkpoint, to, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        files = {"config.json": config} if to == "timm" else {"preprocessor_config.json": checkpoint.processor}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if to != "timm":
            config.save_pretrained(folder)
        if to == "vit_simple":
            for name in ("modeling_vit_simple.py", "configuration_vit_simple.py"):
                shutil.copy(ROOT / name, folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        if to == "vit_simple":
            record(folder, remarks=notes, **checkpoint.card)
            (folder / "README.md").write_text(build_card(folder), encoding="utf-8")
        else:
            write_card(checkpoint, to, folder, notes)
        folder.rename(out)
    for name, what in (("license", "licence"), ("base_model", "base model")):
        if name not in checkpoint.card:
            notes.append(f"no {what} is known: the card, README.md, names none")
    return notes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("convert_checkpoint.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder or a repository of the Hub")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must not exist")
    parser.add_argument(
        "--to", choices=("vit_simple", "timm", "transformers"), default="vit_simple", help="who opens it"
    )
    parser.add_argument("--family", choices=FAMILIES, help="whose preprocessing it had, where no file tells")
    parser.add_argument("--num_attention_heads", type=int, help="for a file of unusual width without a config")
    parser.add_argument("--hidden_act", help="of the MLP, for a CLIP file without a config: gelu or quick_gelu")
    parser.add_argument("--base_model", help="for the card: the repository that the weights come from")
    return parser


def main(arguments: list[str] | None = None):
    options = vars(build_parser().parse_args(arguments))
    try:
        notes = convert(**options)
    except ValueError as error:
        raise SystemExit(f"convert_checkpoint.py: error: {error}") from error
    print("\n".join([*notes, f"saved in {options['out']}"]))


if __name__ == "__main__":
    main()
