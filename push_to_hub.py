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
    license = "license id, such as apache-2.0; required if neither the model card nor the base model has one"
    parser.add_argument("--license", help=license)
    parser.add_argument("--private", action="store_true", help="create the repository as private; fail if it is public")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if needed (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--tag", help="tag to create once the commit is verified")
    message = "title of the commit (default: 'NAME, pushed by vit_simple', with the name of the folder)"
    parser.add_argument("--commit_message", metavar="TEXT", help=message)
    parser.add_argument("--dry_run", action="store_true", help="only check, and print the files and the model card")
    return parser


def main(argv: list[str] | None = None):
    options = vars(build_parser().parse_args(argv))
    with command_errors("push_to_hub.py"):
        push(**options)


if __name__ == "__main__":
    main()
