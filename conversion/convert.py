"""Opens a plain ViT of timm or transformers and writes it as this repository, timm or transformers has it.

python convert_checkpoint.py google/vit-base-patch16-224 outputs/vit-b16
python convert_checkpoint.py outputs/vit-b16 outputs/vit-b16-timm --to timm
"""

import argparse
import json
import pickle
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from vit_simple import ViTSimpleConfig
from vit_simple.card import PLACEHOLDER, build_card, inherited
from vit_simple.configuration_vit_simple import pair
from vit_simple.layout_timm import from_timm, to_timm
from vit_simple.layout_transformers import check_type, from_transformers, to_transformers
from vit_simple.layouts import Tensors, gather, listed
from vit_simple.options import ROOT
from vit_simple.processors import FAMILIES, FAMILY_OF_TYPE, family_processor, fitted, for_timm, of_timm
from vit_simple.provenance import read_json, record

DESCRIPTION = ("config.json", "preprocessor_config.json", "processor_config.json", "README.md")
SAFETENSORS = ("model.safetensors", "model-?????-of-?????.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin")
WEIGHTS = (*SAFETENSORS, "*.safetensors", *PICKLES, "*.bin", "*.pth")  # the first of these that are there


@dataclass
class Checkpoint:
    """A network as this repository has it, its image processor as JSON, and what its card inherits."""

    config: ViTSimpleConfig
    tensors: Tensors
    processor: dict
    card: dict


def find(source: str) -> tuple[Path | None, list[Path]]:
    """The folder that describes a checkpoint and its files of weights; what is no path comes from the Hub.

    A file of another name than those of folders stands alone: what lies beside it may be of another checkpoint.
    """
    path = Path(source)
    if path.is_file():
        return path.parent if any(path.match(pattern) for pattern in (*SAFETENSORS, *PICKLES)) else None, [path]
    if not path.exists():
        try:
            path = Path(snapshot_download(source, allow_patterns=[*DESCRIPTION, *SAFETENSORS]))
            if not list(path.glob("*.safetensors")):
                path = Path(snapshot_download(source, allow_patterns=[*DESCRIPTION, *PICKLES]))
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a file, a folder or a repository of the Hub, got {source}: {error}") from error
    for pattern in WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) > 1 and "?" not in pattern:
            raise ValueError(f"expected one file of weights in {path}, got {listed(file.name for file in files)}")
        if files:
            return path, files
    raise ValueError(
        f"expected a file of weights in {path}, got {listed(sorted(file.name for file in path.iterdir()))}"
    )


def load_tensors(files: list[Path]) -> Tensors:
    """The tensors of files, in the memory of the files themselves; no pickle is run."""
    tensors = {}
    for file in files:
        found = load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file)
        if both := tensors.keys() & found.keys():
            raise ValueError(f"{file}: expected another part of a checkpoint, got {listed(both)} a second time")
        tensors |= found
    return tensors


def load_safetensors(file: Path) -> Tensors:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: expected a whole file of safetensors: {error}") from error


def load_pickle(file: Path) -> Tensors:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"there is {code[1]} in it, which is not loaded" if code else "it is damaged or something else"
        raise ValueError(f"{file}: expected a file of nothing but tensors: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    entries = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in entries):
        raise ValueError(f"{file}: expected names and tensors, got {type(loaded).__name__} with other things in it")
    return dict(loaded)


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
    tensors, content, processor, card = load_tensors(files), {}, {}, {}
    if folder is not None:
        content, processor = (read_json(folder / name) for name in DESCRIPTION[:2])
        processor = processor or read_json(folder / "processor_config.json").get("image_processor", {})
        card = inherited(folder)
    kind, pretrained = content.get("model_type"), content.get("pretrained_cfg") or {}
    if kind is not None and (num_attention_heads or hidden_act):
        raise ValueError("--num_attention_heads and --hidden_act: expected neither, since config.json tells both")
    if kind is None:
        config, tensors = from_timm(content, tensors, notes, num_attention_heads, hidden_act)
        card = ({"license": pretrained["license"]} if pretrained.get("license") else {}) | card
    elif kind == ViTSimpleConfig.model_type:
        config = ViTSimpleConfig.from_pretrained(folder)
        tensors = gather(tensors, {}, config)
    else:
        config, tensors = from_transformers(open_config(folder, kind), tensors, notes)

    usual = FAMILY_OF_TYPE.get(kind, "clip" if config.pre_norm else None)
    if family is None and pretrained:
        processor = of_timm(pretrained, pair(config.image_size), notes)
    elif family is not None or not processor:
        if not (family or usual):
            raise ValueError(
                f"--family: expected one of {', '.join(FAMILIES)}, since no file tells how pixels are scaled"
            )
        if family is None:
            notes.append(f"took the image processor of {usual}, since no file tells of another")
        processor = family_processor(family or usual, pair(config.image_size))
    if not Path(source).exists():
        card["base_model"] = source
    if base_model is not None:
        card["base_model"] = base_model
    return Checkpoint(config, tensors, fitted(processor, config, notes), card)


def open_config(folder: Path, kind: str) -> PretrainedConfig:
    """The config that transformers makes of config.json."""
    check_type(kind)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


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


def write_card(checkpoint: Checkpoint, config: PretrainedConfig | dict, folder: Path, notes: list[str]):
    """Writes README.md of a folder for another library: where its weights come from, and how to open it."""
    name, library = f"{PLACEHOLDER}/{folder.name}", "timm" if isinstance(config, dict) else "transformers"
    use, classes = f'timm.create_model("hf-hub:{name}", pretrained=True)', "head.weight" in checkpoint.tensors
    if library == "transformers":
        (kind,) = config.architectures
        classes = kind.endswith("ForImageClassification")
        options = ", add_pooling_layer=False" if kind == "ViTModel" else ""
        use = f'transformers.{kind}.from_pretrained("{name}"{options})'
    task = "image-classification" if classes else "image-feature-extraction"
    data = ModelCardData(library_name=library, pipeline_tag=task, **checkpoint.card)
    origin = checkpoint.card.get("base_model", "another checkpoint")
    origin = ", ".join(origin) if isinstance(origin, list) else origin
    lines = [f"# {folder.name}", f"The weights of {origin}:", f"```python\nimport {library}\n\nmodel = {use}\n```"]
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
            write_card(checkpoint, config, folder, notes)
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
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_checkpoint.py: error: {error}") from error
    print("\n".join([*notes, f"saved in {options['out']}"]))


if __name__ == "__main__":
    main()
