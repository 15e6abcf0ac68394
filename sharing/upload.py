"""Uploads a checkpoint's folder to the Hub in one commit, downloads it again and compares its outputs."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from ..files import write_atomically
from .card import build_card, user_text
from .verify import (
    NEEDED,
    OPTIONAL,
    WEIGHTS,
    auto_class_of,
    check,
    differences,
    fresh_outputs,
    local_outputs,
    refuse_secrets,
)

WAITS = (1, 2, 4, 8)  # seconds between tries
TRANSIENT = (408, 429, 500, 502, 503, 504)
NETWORK_ERRORS = (*HfHubHTTPError.__bases__, OSError)  # the errors of the HTTP library; not all are an OSError


def with_retries(call: Callable):
    """What a call of the Hub's API gives; busy servers and cut connections are asked again, after longer and longer.

    Raises:
        one of NETWORK_ERRORS: another error, or the last of these.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except NETWORK_ERRORS as error:
            if wait is None or not is_transient(error):
                raise
            time.sleep(retry_after(error) or wait)


def is_transient(error: Exception) -> bool:
    response = getattr(error, "response", None)
    if response is None:  # no answer came, if the HTTP library says so
        return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    return response.status_code in TRANSIENT


def retry_after(error: Exception) -> int:
    """Seconds that the Hub asks to wait, 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    told = headers.get("Retry-After", "")
    return min(int(told), 60) if told.isdecimal() else 0


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """The hash of each file there: sha256 of what is in LFS, else git's."""
    rows = with_retries(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    return {row.path: row.lfs.sha256 if row.lfs else row.blob_id for row in rows if hasattr(row, "blob_id")}


def is_same(path: Path, remote: str | None) -> bool:
    content = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return remote in (git, hashlib.sha256(content).hexdigest())


def changes(api: HfApi, repo_id: str, folder: Path, files: list[str], revision: str) -> tuple[list[str], list[str]]:
    """The files that a revision has not or has other ones of, and those there that the folder no longer has.

    The latter are weights, code and pictures of an earlier push; a repository may have other files, which stay.
    """
    there = remote_files(api, repo_id, revision)
    ours = {*NEEDED, *OPTIONAL, "processor_config.json"}  # the last would be preferred to the one that is pushed
    changed = [name for name in files if not is_same(folder / name, there.get(name))]
    return changed, [name for name in there if (name in ours or WEIGHTS.fullmatch(name)) and name not in files]


def repo_state(api: HfApi, repo_id: str) -> tuple[dict[str, str], dict[str, str], bool]:
    """The branches and the tags of a repository with their commits, and whether it is private, as a new one may be."""
    try:
        info = with_retries(lambda: api.repo_info(repo_id))
    except RepositoryNotFoundError:
        return {}, {}, True
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    return *({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags)), info.private


def remote_card(api: HfApi, repo_id: str, revision: str) -> str:
    """README.md of a revision, "" if it has none."""
    try:
        path = with_retries(lambda: api.hf_hub_download(repo_id, "README.md", revision=revision))
    except EntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8")


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
    """Makes the files those of the repository by one commit on `parent`; its sha, or `parent`, which has them.

    Raises:
        ValueError: the branch has moved on. Nothing was sent then.
        one of NETWORK_ERRORS, RuntimeError: the Hub cannot be reached or refuses. Nothing was changed then.
    """
    changed, stale = changes(api, repo_id, folder, files, parent)
    if not changed and not stale:
        return parent
    before = open_requests(api, repo_id) if create_pr else {}

    def commit() -> str:
        operations = [CommitOperationAdd(name, folder / name) for name in changed]
        operations += [CommitOperationDelete(name) for name in stale]
        options = {"commit_message": message, "revision": revision, "create_pr": create_pr, "parent_commit": parent}
        try:
            return api.create_commit(repo_id, operations, **options).oid
        except NETWORK_ERRORS:
            if sha := find_our_commit():
                return sha
            raise

    def find_our_commit() -> str | None:
        """The commit, where it was made although no answer came."""
        if create_pr:
            made = [sha for ref, sha in open_requests(api, repo_id).items() if ref not in before]
            return next((sha for sha in made if not any(changes(api, repo_id, folder, files, sha))), None)
        head = with_retries(lambda: api.repo_info(repo_id, revision=revision)).sha
        if head == parent:
            return None
        if any(changes(api, repo_id, folder, files, head)):
            raise ValueError(f"{repo_id}: expected its head to be {parent} still, got {head}: look at it, push again")
        return head

    return with_retries(commit)


def open_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """The pull requests of a repository: ref and commit."""
    refs = with_retries(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    return {request.ref: request.target_commit for request in refs.pull_requests}


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Checks a checkpoint, brings its card up to date, uploads it and loads it from there; returns the commit's sha.

    Args:
        folder: what `train.py`, `convert_checkpoint.py` or `save_pretrained` (and an image processor's) wrote.
        repo_id: USER/NAME, made where it is new.
        private: makes it for you alone, or expects that it is.
        revision: branch, made where it is new; by default main.
        create_pr: leaves the branch as it is and opens a pull request.
        tag: set on the commit once it has proved itself.
        license: as the Hub names it; by default that of the card or of the base model.
        dry_run: checks alone, and says what would be uploaded.

    Raises:
        ValueError: the folder or the repository is not what it has to be. Nothing is uploaded then.
        RuntimeError: what was uploaded does not load as the folder does; says how to go back.
        one of NETWORK_ERRORS: the Hub cannot be reached or refuses. The repository is as it was.
    """
    folder = Path(folder)
    if repo_id.count("/") != 1:
        raise ValueError(f"USER/NAME: expected a user or an organisation and a name, got {repo_id}")
    files, notes = check(folder)
    card = build_card(folder, repo_id, tag, license)
    if not ModelCard(card, ignore_metadata_errors=True).data.license:
        raise ValueError("--license: expected one, such as apache-2.0, since neither card nor base model names any")
    message = commit_message or f"{folder.resolve().name}, pushed by vit_simple"
    words = {"README.md": card.encode(), "--commit_message": message.encode()}
    refuse_secrets({name: (folder / name).read_bytes() for name in files} | words)
    for note in notes:
        print(note)
    if dry_run:
        local_outputs(folder)
        sizes = {"README.md": len(card.encode())} | {name: (folder / name).stat().st_size for name in files}
        print("\n".join(f"{size:>13,}  {name}" for name, size in sizes.items()), card, sep="\n\n")
        return None

    files, api = ["README.md", *files], HfApi()
    with_retries(api.whoami)
    branches, tags, is_private = repo_state(api, repo_id)
    if private and not is_private:
        raise ValueError(f"--private: expected {repo_id} to be so or to be new, it is public")
    head = branches.get(revision or "main")
    there = remote_card(api, repo_id, head) if head else ""
    if user_text(there) and not user_text(card):
        print("README.md keeps what was written there by hand")
        card = build_card(folder, repo_id, tag, license, there)
    elif user_text(there) not in ("", user_text(card)):
        print(f"README.md there has other words by hand; they stay in {head}")
    write_atomically(folder / "README.md", card)
    heads = [head] if head is not None else []
    if create_pr and heads:
        heads += open_requests(api, repo_id).values()
    head_there = next((sha for sha in heads if not any(changes(api, repo_id, folder, files, sha))), None)
    is_there = head_there is not None
    if tag in tags and not (is_there and tags[tag] == head):
        raise ValueError(f"--tag: expected a new one, {tag} stands at {tags[tag]}")
    if is_there:
        print(f"nothing to push: {api.endpoint}/{repo_id} has these files already, at {head_there}")
        if tag is not None:
            with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=head_there, exist_ok=True))
        return head_there

    expected = local_outputs(folder)
    with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    if revision is not None:
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    head = head or with_retries(lambda: api.repo_info(repo_id, revision=revision)).sha
    sha = upload(api, repo_id, folder, files, head, message, revision, create_pr)
    where = f"tree/{sha}"
    if create_pr:
        number = next(ref.rpartition("/")[2] for ref, made in open_requests(api, repo_id).items() if made == sha)
        where = f"discussions/{number}"
    url, name = f"{api.endpoint}/{repo_id}", repo_id.rpartition("/")[2]
    branch = f" -b {revision}" if revision else ""
    back = f"git clone{branch} {url} && cd {name} && git revert {sha} && git push"
    verify_commit(repo_id, sha, auto_class_of(folder), expected, f"close {url}/{where}" if create_pr else back)
    if tag is not None:
        with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=sha, exist_ok=True))
    print(
        f"{url}/{where} gives in a fresh process what {folder} gives here, bit for bit:\n"
        f'transformers.{auto_class_of(folder)}.from_pretrained("{repo_id}", revision="{sha}", trust_remote_code=True)'
    )
    return sha


def verify_commit(repo_id: str, sha: str, auto_class: str, expected: dict[str, torch.Tensor], back: str):
    """Raises RuntimeError, with the way back, where a commit does not load in a fresh process as the folder does."""
    try:
        wrong = differences(expected, fresh_outputs(repo_id, sha, auto_class=auto_class))
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        wrong = ", ".join(wrong)
        raise RuntimeError(f"{repo_id} at {sha} does not give what the folder gives: {wrong}\nto go back: {back}")
