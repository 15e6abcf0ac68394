"""Export a checkpoint to ONNX, or compile it ahead of time for this machine, and measure the result on real images.

python export.py outputs/digits --to onnx --attentions
python export.py outputs/digits --to aot
"""

import argparse
from pathlib import Path

from vit_simple.files import UserError, command_errors, terminal_text, write_atomically
from vit_simple.inference.exporting import export_checkpoint
from vit_simple.sharing.card import build_card
from vit_simple.sharing.exports import record_exports, report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("export.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder; the files go into its folder onnx or aot")
    formats = "onnx: for onnxruntime and browsers; aot: files for this kind of CPU"
    parser.add_argument("--to", choices=("onnx", "aot"), required=True, help=formats)
    parser.add_argument("--dynamic_size", action="store_true", help="onnx: accept any multiple of the patch size")
    parser.add_argument("--attentions", action="store_true", help="onnx: also give the attention weights of each block")
    parser.add_argument("--force", action="store_true", help="also write files with an agreement below 99%%")
    images = "dataset to measure on (default: the dataset of the run if it is on the Hub, otherwise data/digits)"
    parser.add_argument("--dataset_name", metavar="NAME", help=images)
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of the dataset")
    parser.add_argument("--image_column_name", metavar="NAME", help="column of the images, if there are several")
    parser.add_argument("--label_column_name", metavar="NAME", help="column of the labels, if there are several")
    parser.add_argument("--max_eval_samples", type=int, default=500, help="number of images (default: 500)")
    return parser


def export(checkpoint: str | Path, **options) -> dict:
    """Exports a checkpoint, adds what was measured to its record and model card, and returns it.

    Args:
        options: see `export_checkpoint`.
    """
    exports = record_exports(Path(checkpoint), export_checkpoint(Path(checkpoint), **options))
    write_atomically(Path(checkpoint) / "README.md", build_card(Path(checkpoint)))
    return exports


def main(argv: list[str] | None = None):
    options = vars(build_parser().parse_args(argv))
    names = {"name": "dataset_name", "config_name": "dataset_config_name"}
    names |= {"image_column": "image_column_name", "label_column": "label_column_name"}
    dataset = {argument: options.pop(option) for argument, option in names.items()}
    with command_errors("export.py"):
        if dataset["name"] is None and any(dataset.values()):
            raise UserError("--dataset_config_name and the column names need --dataset_name")
        if options["max_eval_samples"] < 1:
            raise UserError(f"--max_eval_samples: expected at least 1, got {options['max_eval_samples']}")
        exports = export(**options, dataset=dataset if dataset["name"] else None)
        saved = f"saved in {Path(options['checkpoint'], options['to'])}"
        print("\n".join(map(terminal_text, [*report(exports), saved])))


if __name__ == "__main__":
    main()
