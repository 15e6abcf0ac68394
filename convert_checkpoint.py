"""Convert a plain ViT of timm or transformers to a vit_simple checkpoint, or back.

python convert_checkpoint.py google/vit-base-patch16-224 outputs/vit-b16
python convert_checkpoint.py outputs/vit-b16 outputs/vit-b16-timm --to timm
"""

import argparse
from pathlib import Path

from vit_simple.conversion.convert import new_folder, open_checkpoint, write_checkpoint
from vit_simple.conversion.processors import FAMILIES, INTERPOLATIONS
from vit_simple.conversion.timm import HIDDEN_ACTS
from vit_simple.files import command_errors, terminal_text
from vit_simple.sharing.converted import write_card


def convert(source: str | Path, out: str | Path, to: str = "vit_simple", **options) -> list[str]:
    """Writes the new folder `out`; returns a report of what was dropped or assumed (options: see open_checkpoint)."""
    with new_folder(Path(out)) as folder:
        checkpoint = open_checkpoint(str(source), **options)
        write_checkpoint(checkpoint, folder, to)
        write_card(checkpoint, folder, to)
    return checkpoint.report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("convert_checkpoint.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="weight file, checkpoint folder or Hub repository")
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    libraries = ("vit_simple", "timm", "transformers")
    parser.add_argument("--to", choices=libraries, default="vit_simple", help="output format (default: vit_simple)")
    preset = "preprocessing of this family instead of the checkpoint's; docs/conversion.md explains the values"
    parser.add_argument("--family", choices=FAMILIES, help=preset)
    parser.add_argument("--num_attention_heads", type=int, help="number of attention heads, if there is no config.json")
    act = "activation of a file whose config.json does not state it (default: gelu; CLIP has gelu or quick_gelu)"
    parser.add_argument("--hidden_act", choices=HIDDEN_ACTS, help=act)
    parser.add_argument("--key", help="which model of a file with several: an entry, such as state_dict_ema or student")
    own = "overrides --family and the checkpoint's preprocessing: "
    for name in ("image_mean", "image_std"):
        parser.add_argument(f"--{name}", type=float, nargs="+", metavar="X", help=own + "one number per channel")
    parser.add_argument(
        "--interpolation", choices=INTERPOLATIONS, help=own + "how images are resized (if unknown: bicubic)"
    )
    crop = "fraction of the short side that the center crop keeps (if unknown: 0.875)"
    parser.add_argument("--crop_pct", type=float, metavar="X", help=own + crop)
    parser.add_argument("--base_model", help="Hub id of the base model, for the model card and the image processor")
    return parser


def main(argv: list[str] | None = None):
    options = vars(build_parser().parse_args(argv))
    with command_errors("convert_checkpoint.py"):
        print("\n".join(map(terminal_text, [*convert(**options), f"saved in {options['out']}"])))


if __name__ == "__main__":
    main()
