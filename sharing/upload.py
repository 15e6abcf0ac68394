"""Upload a checkpoint's folder to the Hub in one commit, download it again, and compare its outputs."""

from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from ..files import NETWORK_ERRORS, RunError, UserError, terminal_text, write_atomically
from .card import build_card, user_text
from .repository import changes, pull_requests, remote_card, repo_state, with_retries
from .verify import auto_class_of, check, differences, fresh_outputs, local_outputs, refuse_secrets


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
    """Checks a checkpoint, updates its card, uploads it and verifies the upload; returns the hash of the commit.

    Args:
        folder: a folder that `train.py`, `convert_checkpoint.py` or `save_pretrained` wrote, with an image processor.
        repo_id: USER/NAME; created if needed.
        private: create the repository as private; fail if it is public.
        revision: branch, created if needed; by default main.
        create_pr: open a pull request instead of changing the branch.
        tag: tag for the commit, set after it was verified.
        license: license id for the model card; by default that of the card or of the base model.
        dry_run: only check, and print what would be uploaded.

    Raises:
        UserError: the folder or the repository is not fit for this, or the login is missing. Nothing is uploaded.
        RunError: the upload failed, or does not compute what the folder computes; the message says how to undo it.
        one of NETWORK_ERRORS: the Hub cannot be reached or refuses. The repository is unchanged.
    """
    folder = Path(folder)
    message = commit_message or f"{folder.resolve().name}, pushed by vit_simple"
    files, card = check_push(folder, repo_id, tag, license, message)
    if dry_run:
        local_outputs(folder)
        sizes = {"README.md": len(card.encode())} | {name: (folder / name).stat().st_size for name in files}
        lines = [*(f"{size:>13,}  {name}" for name, size in sizes.items()), "", *card.splitlines()]
        print("\n".join(map(terminal_text, lines)))
        return None
    files, api = ["README.md", *files], HfApi()
    with_retries(api.whoami)
    repo = repo_state(api, repo_id)
    if private and not repo.private:
        raise UserError(f"--private: {repo_id} exists and is public")
    head = repo.branches.get(revision or "main")
    remote = remote_card(api, repo_id, head) if head is not None else ""
    if keeps_remote_text(card, remote, head):
        card = build_card(folder, repo_id, tag, license, remote)
    write_atomically(folder / "README.md", card)

    candidates = [] if head is None else [head, *(pull_requests(api, repo_id).values() if create_pr else [])]
    sha = next((sha for sha in candidates if not any(changes(api, repo_id, folder, files, sha))), None)
    if tag in repo.tags and (sha is None or repo.tags[tag] != head):
        raise UserError(f"--tag: {tag} already exists, at {repo.tags[tag]}; choose a new one")
    if sha is not None:
        print(terminal_text(f"nothing to push: {api.endpoint}/{repo_id} already has these files, at {sha}"))
    else:
        sha = upload_and_verify(api, repo_id, folder, files, head, message, private, revision, create_pr)
    if tag is not None:
        with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=sha, exist_ok=True))
    return sha


# Before the upload


def check_push(folder: Path, repo_id: str, tag: str | None, license: str | None, message: str) -> tuple[list[str], str]:
    """The files to upload beside the card, and the card; what is checked needs no network."""
    if repo_id.count("/") != 1:
        raise UserError(f"USER/NAME: expected a user or an organization and a name, got {repo_id}")
    files, warnings = check(folder)
    card = build_card(folder, repo_id, tag, license)
    if not ModelCard(card, ignore_metadata_errors=True).data.license:
        raise UserError("--license is required, such as apache-2.0: neither the card nor the base model has one")
    texts = {"README.md": card.encode(), "--commit_message": message.encode()}
    refuse_secrets({name: (folder / name).read_bytes() for name in files} | texts)
    for warning in warnings:
        print(terminal_text(warning))
    return files, card


def keeps_remote_text(card: str, remote: str, head: str | None) -> bool:
    """Whether the user wrote text in the card on the Hub and none in the folder's; also tells the user about it."""
    if user_text(remote) and not user_text(card):
        print("README.md keeps the text that was written on the Hub")
        return True
    if user_text(remote) not in ("", user_text(card)):
        print(f"README.md replaces another text on the Hub, which remains in {head}")
    return False


# The upload


def upload_and_verify(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: list[str],
    head: str | None,
    message: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Creates repository and branch if needed, uploads, and verifies; returns the hash of the commit."""
    expected, auto_class = local_outputs(folder), auto_class_of(folder)
    with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    if revision is not None:
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    head = head or with_retries(lambda: api.repo_info(repo_id, revision=revision)).sha
    sha = upload(api, repo_id, folder, files, head, message, revision, create_pr)

    url = f"{api.endpoint}/{repo_id}"
    if create_pr:
        number = next(ref.rpartition("/")[2] for ref, made in pull_requests(api, repo_id).items() if made == sha)
        page = f"{url}/discussions/{number}"
        undo = f"close {page}"
    else:
        page = f"{url}/tree/{sha}"
        branch = f" -b {revision}" if revision else ""
        undo = f"git clone{branch} {url} && cd {repo_id.rpartition('/')[2]} && git revert {sha} && git push"
    verify_commit(repo_id, sha, auto_class, expected, undo)
    lines = (
        f"verified: in a fresh process, {page} computes what {folder} computes here, bit for bit; load it with",
        f'transformers.{auto_class}.from_pretrained("{repo_id}", revision="{sha}", trust_remote_code=True)',
    )
    print("\n".join(map(terminal_text, lines)))
    return sha


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
        head = with_retries(lambda: api.repo_info(repo_id, revision=revision)).sha
        if head == parent:
            return None
        if any(changes(api, repo_id, folder, files, head)):
            raise RunError(f"{repo_id} changed since it was checked ({parent} is now {head}); review it and push again")
        return head

    return with_retries(commit)


def verify_commit(repo_id: str, sha: str, auto_class: str, expected: dict[str, torch.Tensor], undo: str):
    """Raises RunError, with the command that undoes it, if a commit does not compute the expected outputs."""
    try:
        problem = ", ".join(differences(expected, fresh_outputs(repo_id, sha, auto_class=auto_class)))
        problem = problem and f"{repo_id} at {sha} differs from the folder in {problem}"
    except UserError as error:
        problem = f"{repo_id} at {sha}: {error}"
    if problem:
        raise RunError(f"{problem}\nto undo the push: {undo}")
