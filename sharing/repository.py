"""The state of a repository on the Hub: its revisions and what they hold; and calls of the Hub that are retried."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from ..files import NETWORK_ERRORS, UserError
from .verify import OPTIONAL, REQUIRED, is_weights

WAITS = (1, 2, 4, 8)  # seconds between tries
TRANSIENT = (408, 429, 500, 502, 503, 504)
DENIED = (401, 403)


def with_retries(call: Callable):
    """The result of a call of the Hub's API; it is retried if the server is busy or the connection drops.

    Raises:
        UserError: the login is missing or invalid, or has no access.
        one of NETWORK_ERRORS: another error, or the last one.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except NETWORK_ERRORS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in DENIED or isinstance(error, LocalTokenNotFoundError):
                raise UserError(f"no access to the Hub; use `hf auth login` or HF_TOKEN to log in: {error}") from error
            if wait is None or not (status in TRANSIENT or is_disconnected(error)):
                raise
            time.sleep(retry_after(error) or wait)


def is_disconnected(error: Exception) -> bool:
    """Whether there was no response; OSErrors of this machine are of another kind."""
    is_http = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    return is_http and getattr(error, "response", None) is None


def retry_after(error: Exception) -> int:
    """The seconds that the Hub asks to wait, at most 60; 0 if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = headers.get("Retry-After", "")
    return min(int(seconds), 60) if seconds.isdecimal() else 0


@dataclass
class RepoState:
    """Branches and tags of a repository with their commits, and whether it is private, or can be created as private."""

    branches: dict[str, str]
    tags: dict[str, str]
    private: bool


def repo_state(api: HfApi, repo_id: str) -> RepoState:
    if not with_retries(lambda: api.repo_exists(repo_id)):
        return RepoState({}, {}, private=True)
    private = with_retries(lambda: api.repo_info(repo_id)).private
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
    return RepoState(branches, tags, private)


def pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """The refs of the pull requests of a repository, and their commits."""
    refs = with_retries(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    return {request.ref: request.target_commit for request in refs.pull_requests}


def remote_card(api: HfApi, repo_id: str, revision: str) -> str:
    """README.md of a revision, "" if it has none."""
    try:
        path = with_retries(lambda: api.hf_hub_download(repo_id, "README.md", revision=revision))
    except EntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8")


def changes(api: HfApi, repo_id: str, folder: Path, files: list[str], revision: str) -> tuple[list[str], list[str]]:
    """The files that are new or changed compared to a revision, and the stale ones of an earlier push to delete.

    Other files of the repository are left alone.
    """
    entries = with_retries(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
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
