"""The state of a repository on the Hub: its revisions and what they hold."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from ..files import read_text
from .network import with_retries
from .verify import OPTIONAL, REQUIRED, is_weights


@dataclass
class RepoState:
    """Branches and tags of a repository with their commits, and whether it is private, or can be created as private."""

    branches: dict[str, str]
    tags: dict[str, str]
    private: bool


def repo_state(api: HfApi, repo_id: str) -> RepoState:
    if not with_retries("looking for the repository", lambda: api.repo_exists(repo_id)):
        return RepoState({}, {}, private=True)
    private = with_retries("reading the repository", lambda: api.repo_info(repo_id)).private
    refs = with_retries("reading its branches and tags", lambda: api.list_repo_refs(repo_id))
    branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
    return RepoState(branches, tags, private)


def pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """The refs of the pull requests of a repository, and their commits."""
    what = "reading its pull requests"
    refs = with_retries(what, lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    return {request.ref: request.target_commit for request in refs.pull_requests}


def remote_card(api: HfApi, repo_id: str, revision: str) -> str:
    """README.md of a revision, "" if it has none."""
    try:
        download = lambda: api.hf_hub_download(repo_id, "README.md", revision=revision)  # noqa: E731
        path = with_retries("reading its README.md", download)
    except LocalEntryNotFoundError:  # also an EntryNotFoundError, but the Hub did not answer
        raise
    except EntryNotFoundError:
        return ""
    return read_text(Path(path))


def changes(api: HfApi, repo_id: str, folder: Path, files: list[str], revision: str) -> tuple[list[str], list[str]]:
    """The files that are new or changed compared to a revision, and the stale ones of an earlier push to delete.

    Other files of the repository are left alone.
    """
    tree = lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision))  # noqa: E731
    entries = with_retries("reading its list of files", tree)
    remote_files = [entry for entry in entries if isinstance(entry, RepoFile)]
    remote = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in remote_files}
    managed = {*REQUIRED, *OPTIONAL, "processor_config.json"}  # transformers would prefer the last one to ours
    changed = [name for name in files if not has_hash(folder / name, remote.get(name))]
    stale = [name for name in remote if (name in managed or is_weights(name)) and name not in files]
    return changed, stale


def has_hash(path: Path, remote_hash: str | None) -> bool:
    """Whether a file has the hash that the Hub states: sha256 for files in LFS, git's for others."""
    content = path.read_bytes()
    return remote_hash in (git_hash(content), hashlib.sha256(content).hexdigest())
