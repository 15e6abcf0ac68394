"""Show what a model looks at in images: attention, rollout, relevance, patch features, positions and the patch grid.

python explain.py docs/images/astronaut.jpg --model outputs/vit-b16 --output_dir outputs/explain
python explain.py 7.png --model outputs/digits --output_dir outputs/explain --label 7 --json
"""

import argparse

from vit_simple.files import command_errors, terminal_text
from vit_simple.inference.explain import explain


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("explain.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file; each gets a folder of its name")
    parser.add_argument("--model", required=True, metavar="CHECKPOINT", help="folder or Hub id of a checkpoint")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the figures")
    patch = "patch whose attention is shown, counted from 0 (default: what the head reads)"
    parser.add_argument("--patch", nargs=2, type=int, metavar=("ROW", "COLUMN"), help=patch)
    parser.add_argument("--label", help="name or number of the label for the relevance (default: the predicted one)")
    parser.add_argument("--json", action="store_true", dest="save_json", help="also write the numbers as JSON")
    return parser


def main(argv: list[str] | None = None):
    with command_errors("explain.py"):
        for file in explain(**vars(build_parser().parse_args(argv))):
            print(terminal_text(str(file)))


if __name__ == "__main__":
    main()
