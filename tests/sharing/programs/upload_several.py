"""Uploads three small files for each {"repo", "parent", "number", "create_pr"} of a JSON list.

The last line is a JSON list of the commits, or of the errors as "ExceptionClass: message". A parent of null is the
head of the repository at that time; if it cannot be read, the upload is left out and its result is null.

    python upload_several.py JSON THREADS
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi

from vit_simple.files import NETWORK_ERRORS
from vit_simple.sharing.commit import upload

FILES = ["README.md", "config.json", "model.safetensors"]
api = HfApi()


def try_upload(repo: str, parent: str | None = None, number: int = 1, create_pr: bool = False) -> str | None:
    folder = Path(repo.replace("/", "-"))
    folder.mkdir(exist_ok=True)
    for file in FILES:
        (folder / file).write_text(f"{file} {number}")
    if parent is None:
        try:
            parent = api.repo_info(repo).sha
        except NETWORK_ERRORS:
            return None
    try:
        return upload(api, repo, folder, FILES, parent, f"push {number}", create_pr=create_pr)
    except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
        return f"{type(error).__name__}: {error}"


with ThreadPoolExecutor(int(sys.argv[2])) as pool:
    print(json.dumps(list(pool.map(lambda options: try_upload(**options), json.loads(sys.argv[1])))))
