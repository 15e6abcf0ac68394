"""Opens a plain ViT of timm or transformers and writes it as this repository, timm or transformers has it.

python convert_checkpoint.py google/vit-base-patch16-224 outputs/vit-b16
python convert_checkpoint.py outputs/vit-b16 outputs/vit-b16-timm --to timm
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from vit_simple.conversion.convert import in_layout_of, open_checkpoint
from vit_simple.conversion.processors import FAMILIES
from vit_simple.files import ROOT
from vit_simple.sharing.card import build_card, write_card
from vit_simple.sharing.record import record


def convert(source: str, out: str | Path, to: str = "vit_simple", **options) -> list[str]:
    """Writes the folder `out` from a file, a folder or a repository of the Hub; returns what a user should be told.

    Args:
        to: "vit_simple", "timm" or "transformers", who is to open the folder.
        options: as for `open_checkpoint`.

    Raises:
        ValueError: the source is no plain ViT or is damaged, `to` cannot hold it, or `out` exists. Nothing is written.
    """
    out, notes = Path(out), []
    if out.exists():
        raise ValueError(f"OUT: expected a folder that is not there yet, got {out}")
    checkpoint = open_checkpoint(str(source), notes, **options)
    config, tensors = in_layout_of(checkpoint, to, notes)
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
