"""Pushes a checkpoint's folder to the Hub in one commit, and proves in a fresh process that it loads from there.

python push_to_hub.py outputs/digits your-name/vit-simple-digits --license apache-2.0

The token is that of `hf auth login` or of HF_TOKEN.
"""

import argparse

from vit_simple.sharing.upload import NETWORK_ERRORS, push


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("push_to_hub.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="FOLDER", help="of a checkpoint")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository, made where it is new")
    parser.add_argument("--license", help="as the Hub names it; default: that of the card or of the base model")
    parser.add_argument("--private", action="store_true", help="make it for you alone, or expect that it is")
    parser.add_argument("--revision", metavar="BRANCH", help="made where it is new; default: main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request and leave the branch as it is")
    parser.add_argument("--tag", help="for the commit, once it has proved itself")
    parser.add_argument("--commit_message", metavar="TEXT")
    parser.add_argument("--dry_run", action="store_true", help="check, and show the files and the card; send nothing")
    return parser


def main(arguments: list[str] | None = None):
    try:
        push(**vars(build_parser().parse_args(arguments)))
    except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
        raise SystemExit(f"push_to_hub.py: error: {error}") from error


if __name__ == "__main__":
    main()
