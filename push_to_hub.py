"""Push a checkpoint's folder to the Hub in one commit, and verify in a fresh process that it loads from there.

python push_to_hub.py outputs/digits your-name/vit-simple-digits --license apache-2.0

Log in first, with `hf auth login` or the environment variable HF_TOKEN.
"""

import argparse

from vit_simple.files import command_errors
from vit_simple.sharing.upload import push


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("push_to_hub.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint to push")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository, created if needed")
    license = "license id for the model card, e.g. apache-2.0 (default: that of the card or of the base model)"
    parser.add_argument("--license", help=license)
    parser.add_argument("--private", action="store_true", help="create the repository as private; fail if it is public")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if needed (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--tag", help="tag the commit after it was verified")
    parser.add_argument("--commit_message", metavar="TEXT", help="title of the commit (default: the folder's name)")
    parser.add_argument("--dry_run", action="store_true", help="only check and print the files and the card")
    return parser


def main(argv: list[str] | None = None):
    options = vars(build_parser().parse_args(argv))
    with command_errors("push_to_hub.py"):
        push(**options)


if __name__ == "__main__":
    main()
