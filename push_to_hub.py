"""Push a checkpoint's folder to the Hub in one commit, and verify in a fresh process that it loads from there.

python push_to_hub.py outputs/digits your-name/vit-simple-digits --license apache-2.0
python push_to_hub.py outputs/digits your-name/vit-simple-digits --space

Log in first, with `hf auth login` or the environment variable HF_TOKEN.
"""

import argparse
import shlex
from pathlib import Path

from vit_simple.files import UserError, command_errors
from vit_simple.sharing.space import check_space, preview_space, pushed_commit, share_space
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
    parser.add_argument(
        "--dry_run", action="store_true", help="check and print only; with --space, also write the page"
    )
    space = "also make a Space with a page that runs the model in the browser; needs export.py --to onnx"
    parser.add_argument("--space", action="store_true", help=space)
    parser.add_argument(
        "--space_only", action="store_true", help="make the Space of a model that is on the Hub already"
    )
    parser.add_argument("--self_contained", action="store_true", help="copy the weights into the Space")
    return parser


def push_with_space(folder: Path, options: dict, space_only: bool, self_contained: bool):
    """Pushes a checkpoint and the page that runs it. A dry run writes the page into the folder space instead."""
    repo_id = options["repo_id"]
    if options["dry_run"]:
        if not space_only:
            push(folder, **options)
        page = shlex.quote(str(preview_space(folder, repo_id)))
        print(f"page written; look at it with: python -m http.server -d {page}")
        return
    private = check_space(folder, repo_id, options["private"], self_contained)
    sha = pushed_commit(folder, repo_id, options["revision"]) if space_only else push(folder, **options)
    print(f"page: {share_space(folder, repo_id, sha, private, self_contained)}")


def main(argv: list[str] | None = None):
    options = vars(build_parser().parse_args(argv))
    space, space_only, self_contained = (options.pop(name) for name in ("space", "space_only", "self_contained"))
    with command_errors("push_to_hub.py"):
        if self_contained and not (space or space_only):
            raise UserError("--self_contained needs --space or --space_only")
        if (space or space_only) and options["create_pr"]:
            raise UserError("--space and --space_only cannot be combined with --create_pr: the page needs a commit")
        if space or space_only:
            push_with_space(Path(options.pop("folder")), options, space_only, self_contained)
        else:
            push(**options)


if __name__ == "__main__":
    main()
