"""Upload a checkpoint's folder to the Hub in one commit, download it again, and compare its outputs."""

import contextlib
import time
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, get_token

from ..files import NETWORK_ERRORS, ONNX_FILES, RunError, UserError, refuse_adapter, terminal_text, write_atomically
from ..training.folder import FINISHED
from ..training.lock import LOCK
from .card import build_card, user_text
from .commit import Target, create_and_upload
from .network import announced, with_retries
from .outgoing import refuse_secrets, snapshot
from .repository import RepoState, changes, pull_requests, remote_card, repo_state
from .verify import auto_class_of, check, differences, fresh_outputs, local_outputs, shared_names

VERIFY_WAITS = (5, 30)  # seconds between tries to load a commit


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
    verify: bool = True,
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
        verify: load the commit in a fresh process and compare its outputs with those of the folder.

    Raises:
        UserError: the folder or the repository is not fit for this, or the login is missing. Nothing is uploaded.
        RunError: the upload failed, the commit cannot be verified or tagged, or it does not compute what the folder
            computes; the message says whether the commit is there, and what to do.
        one of NETWORK_ERRORS: the Hub cannot be reached or refuses. The repository is unchanged.
    """
    folder, target = Path(folder), Target(repo_id, private, revision, create_pr, tag)
    message = commit_message or f"{folder.resolve().name}, pushed by vit_simple"
    require_finished(folder)
    refuse_adapter(folder)
    with snapshot(folder, shared_names(folder)) as copy:
        files, card = check_push(copy, repo_id, tag, license, message)
        if dry_run:
            local_outputs(copy)
            print_upload(copy, files, card)
            return None
        expected = local_outputs(copy) if verify else None
        api = HfApi()
        with_retries("checking the login", api.whoami)
        repo = repo_state(api, repo_id)
        if private and not repo.private:
            raise UserError(f"--private: {repo_id} exists and is public")
        head = repo.branches.get(revision or "main")
        remote = remote_card(api, repo_id, head) if head is not None else ""
        if keeps_remote_text(card, remote, head):
            card = build_card(copy, repo_id, tag, license, remote)
        for place in (copy, folder):
            write_atomically(place / "README.md", card)
        sha = commit_once(api, target, repo, copy, ["README.md", *files], message)
        if expected is not None:
            verify_commit(api, target, sha, auto_class_of(copy), expected, target.command(folder))
    if tag is not None:
        set_tag(api, target, sha, target.command(folder))
    return sha


# Before the upload


def print_upload(folder: Path, files: list[str], card: str):
    """The size of each file, and the card."""
    sizes = {"README.md": len(card.encode())} | {name: (folder / name).stat().st_size for name in files}
    lines = [*(f"{size:>13,}  {name}" for name, size in sizes.items()), "", *card.splitlines()]
    print("\n".join(map(terminal_text, lines)))


def require_finished(folder: Path):
    """Raises UserError if the folder is that of a run that has not ended."""
    if (folder / LOCK).exists() and not (folder / FINISHED).exists():  # earlier versions wrote neither
        raise UserError(
            f"FOLDER: the run in {folder} is not finished, and its weights and results may be of different steps: "
            "resume it first"
        )


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


# The upload and what follows


def commit_once(api: HfApi, target: Target, repo: RepoState, folder: Path, files: list[str], message: str) -> str:
    """The commit with these files, which is made unless the branch or a pull request has them already."""
    head = repo.branches.get(target.revision or "main")
    requests = pull_requests(api, target.repo_id).values() if target.create_pr and head is not None else []
    candidates = [] if head is None else [head, *requests]
    sha = next((sha for sha in candidates if not any(changes(api, target.repo_id, folder, files, sha))), None)
    if target.tag in repo.tags and (sha is None or repo.tags[target.tag] != head):
        raise UserError(f"--tag: {target.tag} already exists, at {repo.tags[target.tag]}; choose a new one")
    if sha is None:
        return create_and_upload(api, target, folder, files, head, message)
    print(terminal_text(f"nothing to push: {api.endpoint}/{target.repo_id} already has these files, at {sha}"))
    return sha


def verify_commit(
    api: HfApi, target: Target, sha: str, auto_class: str, expected: dict[str, torch.Tensor], command: str
):
    """Loads a commit in a fresh process and compares its outputs with the expected ones.

    Args:
        command: verifies the commit again, for errors.

    Raises:
        RunError: the outputs differ, or the commit cannot be loaded, which is tried several times.
    """
    repo_id, url = target.repo_id, f"{api.endpoint}/{target.repo_id}"
    try:
        page, undo = f"{url}/tree/{sha}", how_to_revert(url, sha, target.revision)
        if target.create_pr:
            number = next((ref for ref, made in pull_requests(api, repo_id).items() if made == sha), "").rpartition(
                "/"
            )[2]
            page = f"{url}/discussions/{number}"
            undo = f"close {page}"
        info = with_retries("reading the repository", lambda: api.repo_info(repo_id))
        token = get_token() if info.private or info.gated else None
        onnx_files = [name for name in ONNX_FILES if name in expected]
        outputs = load_patiently(repo_id, sha, auto_class=auto_class, token=token, onnx_files=onnx_files)
    except (UserError, *NETWORK_ERRORS) as error:
        message = f"the commit {sha} is on the Hub, but it could not be verified: {error}"
        raise RunError(f"{message}\nto verify it again: {command}") from error
    if names := differences(expected, outputs):
        raise RunError(f"{repo_id} at {sha} differs from the folder in {', '.join(names)}\nto undo the push: {undo}")
    print(
        f"verified: in a fresh process, {page} computes what the folder computes here, bit for bit; load it with\n"
        f'transformers.{auto_class}.from_pretrained("{repo_id}", revision="{sha}", trust_remote_code=True)'
    )


def how_to_revert(url: str, sha: str, revision: str | None) -> str:
    branch = f" -b {revision}" if revision else ""
    return f"git clone{branch} {url} && cd {url.rpartition('/')[2]} && git revert {sha} && git push"


def load_patiently(repo_id: str, sha: str, **options) -> dict[str, torch.Tensor]:
    """The outputs of a commit in a fresh process, as `fresh_outputs`; the storage may need some time."""
    with announced(f"a fresh process that loads {repo_id}"):
        for wait in VERIFY_WAITS:
            with contextlib.suppress(UserError):
                return fresh_outputs(repo_id, sha, **options)
            time.sleep(wait)
        return fresh_outputs(repo_id, sha, **options)


def set_tag(api: HfApi, target: Target, sha: str, command: str):
    create = lambda: api.create_tag(target.repo_id, tag=target.tag, revision=sha, exist_ok=True)  # noqa: E731
    try:
        with_retries("setting the tag", create)
    except (UserError, *NETWORK_ERRORS) as error:
        message = f"the commit {sha} is on the Hub and verified, but it cannot be tagged as {target.tag}: {error}"
        raise RunError(f"{message}\nto try again: {command}") from error
