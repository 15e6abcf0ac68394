"""Predict the labels of many images: files, the images in a folder and its subfolders, or a split of a dataset.

python predict.py outputs/pets photos --output predictions.csv
python predict.py outputs/pets photos --output to_label.csv --sort uncertain
python predict.py outputs/pets user/dataset --split test --output predictions.parquet

The same command continues after a stop.
"""

import argparse
from pathlib import Path

from vit_simple.files import UserError, command_errors, terminal_text
from vit_simple.inference.images import find_images, find_rows
from vit_simple.inference.predicting import Predictions, open_predictor, require_usable, summary
from vit_simple.inference.tables import check_output


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("predict.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files and folders, or one dataset")
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="new .csv or .parquet file")
    parser.add_argument("--split", help="split of the dataset that IMAGES names: a Hub id, a folder or a file")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of the dataset")
    parser.add_argument("--image_column_name", metavar="NAME", help="column of the images, if there are several")
    uncertain = "uncertain: first the images that the model is least sure about, to label them (default: as found)"
    parser.add_argument("--sort", choices=["uncertain"], help=uncertain)
    parser.add_argument("--batch_size", type=int, default=16, help="images for the model at a time (default: 16)")
    return parser


def main(argv: list[str] | None = None):
    options = build_parser().parse_args(argv)
    with command_errors("predict.py"):
        check_output(options.output)
        if options.batch_size < 1:
            raise UserError(f"--batch_size: expected at least 1, got {options.batch_size}")
        if options.split is not None:
            images = find_rows(options.images, options.split, options.dataset_config_name, options.image_column_name)
        elif options.dataset_config_name or options.image_column_name:
            raise UserError("--dataset_config_name and --image_column_name need --split")
        else:
            images = find_images(options.images)
        predictor = open_predictor(options.checkpoint, images)
        sort_by = "margin" if options.sort else None
        predictions = Predictions(predictor, options.output, options.batch_size, sort_by)
        for line in [*images.report, *predictions.report]:
            print(terminal_text(line))
    with command_errors("predict.py", lambda: "the same command continues"):
        table = predictions.run()
    with command_errors("predict.py"):
        for line in summary(table, options.output):
            print(terminal_text(line))
        require_usable(table)


if __name__ == "__main__":
    main()
