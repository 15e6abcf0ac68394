"""One commit with the files of a folder, whatever happens to the connection."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..files import NETWORK_ERRORS, RunError
from .network import with_retries
from .repository import changes, pull_requests


@dataclass(frozen=True)
class Target:
    """Where a folder is pushed to; the fields are arguments of `push`."""

    repo_id: str
    private: bool
    revision: str | None
    create_pr: bool
    tag: str | None

    def command(self, folder: Path) -> str:
        """The command that pushes there, which also verifies what is there already."""
        options = {"revision": self.revision, "tag": self.tag}
        words = [word for name, value in options.items() if value for word in (f"--{name}", value)]
        words += ["--create_pr"] * self.create_pr
        return shlex.join(["python", "push_to_hub.py", str(folder), self.repo_id, *words])


def create_and_upload(
    api: HfApi, target: Target, folder: Path, files: list[str], head: str | None, message: str
) -> str:
    """Creates repository and branch if needed, and uploads; returns the hash of the commit.

    Args:
        head: the commit that the branch points to, None if there is no such branch.
    """
    repo_id, revision = target.repo_id, target.revision
    if head is None:
        create = lambda: api.create_repo(repo_id, private=target.private or None, exist_ok=True)  # noqa: E731
        with_retries("creating the repository", create)
        if revision is not None:
            branch = lambda: api.create_branch(repo_id, branch=revision, exist_ok=True)  # noqa: E731
            with_retries("creating the branch", branch)
        head = with_retries("reading the branch", lambda: api.repo_info(repo_id, revision=revision)).sha
    return upload(api, repo_id, folder, files, head, message, revision, target.create_pr)


def upload(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: list[str],
    parent: str,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads the files and deletes stale ones in one commit on top of `parent`; returns its hash.

    Returns `parent` if it has the same files.

    Raises:
        RunError: the branch has changed since `parent`, or a file cannot be stored. The repository is unchanged.
        one of NETWORK_ERRORS: the Hub cannot be reached or refuses. The repository is unchanged.
    """
    changed, stale = changes(api, repo_id, folder, files, parent)
    if not changed and not stale:
        return parent
    old_requests = pull_requests(api, repo_id) if create_pr else {}

    def commit() -> str:
        # Not upload_folder, which would list stale files at the head of the branch instead of at `parent`.
        operations = [CommitOperationAdd(name, folder / name) for name in changed]
        operations += [CommitOperationDelete(name) for name in stale]
        options = {"commit_message": message, "revision": revision, "create_pr": create_pr, "parent_commit": parent}
        try:
            return api.create_commit(repo_id, operations, **options).oid
        except NETWORK_ERRORS:
            if sha := find_our_commit():
                return sha
            raise
        except RuntimeError as error:  # of the client, if the storage refuses a file
            raise RunError(str(error)) from error

    def find_our_commit() -> str | None:
        """The commit, if it was made although the response was lost."""
        if create_pr:
            new = [sha for ref, sha in pull_requests(api, repo_id).items() if ref not in old_requests]
            return next((sha for sha in new if not any(changes(api, repo_id, folder, files, sha))), None)
        head = with_retries("looking for the commit", lambda: api.repo_info(repo_id, revision=revision)).sha
        if head == parent:
            return None
        if any(changes(api, repo_id, folder, files, head)):
            raise RunError(f"{repo_id} changed since it was checked ({parent} is now {head}); review it and push again")
        return head

    return with_retries("creating the commit", commit)
