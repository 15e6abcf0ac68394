"""A static Space: a page that classifies images with a checkpoint's ONNX file in the browser, without a server."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCardData
from huggingface_hub.hf_api import RepoFile

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..conversion.convert import open_config
from ..conversion.processors import BICUBIC, BILINEAR, open_known_processor
from ..files import ONNX_FILES, PREPROCESSOR, ROOT, RunError, UserError, has_head, inherited, read_json
from ..inference.exporting import EXAMPLES
from ..inference.onnx import require_onnx
from .network import with_retries
from .outgoing import copy_regular_files, refuse_secrets
from .repository import changes, has_hash, repo_state

PAGE = ROOT / "sharing/page"  # index.html and resize.js; package.json tells Node that resize.js is a module
TAG = "vit_simple-page"  # in the card of a Space that this module wrote
CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist"
RUNTIMES = {  # file, bytes and hash of the script and of its WebAssembly
    "wasm": [
        ("ort.wasm.bundle.min.mjs", 73054, "PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG"),
        ("ort-wasm-simd-threaded.wasm", 14239897, "vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM"),
    ],
    "webgpu": [
        ("ort.webgpu.bundle.min.mjs", 117732, "1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f"),
        (
            "ort-wasm-simd-threaded.asyncify.wasm",
            26781914,
            "EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
        ),
    ],
}
PRECISIONS = dict(zip(ONNX_FILES, ("float32", "float16", "int8")))


# What the page can show


def page_content(folder: Path) -> dict:
    """What the page must know about a checkpoint.

    Raises:
        UserError: the page cannot show it; says what to do instead.
    """
    if not (folder / ONNX_FILES[0]).is_file():
        command = f"python export.py {shlex.quote(str(folder))} --to onnx --attentions"
        raise UserError(f"--space needs {ONNX_FILES[0]}: {command}")
    if not has_head(read_json(folder / "config.json")):
        raise UserError("--space: expected a classifier, got a model without head; examples/ has programs for features")
    require_onnx()
    import onnxruntime

    config = open_config(folder, ViTSimpleConfig)
    outputs = onnxruntime.InferenceSession(folder / ONNX_FILES[0]).get_outputs()
    names = [name for name in ONNX_FILES if (folder / name).is_file()]
    return {
        "labels": list(config.id2label.values()),
        "problem": config.problem_type,
        "processor": page_processor(folder, config),
        "size": dict(zip(("height", "width"), pair(config.image_size))),
        "grid": config.grid_size,
        "prefix": config.num_prefix_tokens,
        "has_class_token": config.use_class_token,
        "layers": sum(output.name.startswith("attentions.") for output in outputs),
        "files": [{"name": PRECISIONS[name], "url": name, "bytes": (folder / name).stat().st_size} for name in names],
        "runtimes": {
            name: {
                part: {"url": f"{CDN}/{file}", "bytes": size, "integrity": f"sha384-{digest}"}
                for part, (file, size, digest) in zip(("script", "binary"), files)
            }
            for name, files in RUNTIMES.items()
        },
        "examples": [],
    }


def page_processor(folder: Path, config: ViTSimpleConfig) -> dict:
    """The image processor with the fields that the page reads.

    Raises:
        UserError: it does something that the page does not.
    """
    processor, _ = open_known_processor(read_json(folder / PREPROCESSOR))
    size, crop = (
        {k: v for k, v in dict(getattr(processor, each, None) or {}).items() if v} for each in ("size", "crop_size")
    )
    crops = bool(getattr(processor, "do_center_crop", False))
    problems = {
        "num_channels of 3": config.num_channels == 3,
        "do_resize, do_rescale and do_normalize": processor.do_resize
        and processor.do_rescale
        and processor.do_normalize,
        "resample of 2 or 3 (bilinear, bicubic)": int(processor.resample or 0) in (BILINEAR, BICUBIC),
        "size with height and width, or with shortest_edge": set(size) in ({"height", "width"}, {"shortest_edge"}),
        "crop_size not larger than size": not crops or max(crop.values()) <= min(size.values()),
        "no do_pad": not getattr(processor, "do_pad", False),
        "do_center_crop with shortest_edge": crops or "shortest_edge" not in size,
    }
    if wrong := [expected for expected, holds in problems.items() if not holds]:
        raise UserError(
            f"--space: the page cannot follow {PREPROCESSOR}: expected {'; '.join(wrong)}. "
            "Without a page, examples/onnx_predict.py runs the ONNX file in Python"
        )
    return {
        "size": size,
        "resample": int(processor.resample),
        "do_center_crop": crops,
        "crop_size": crop,
        "rescale_factor": processor.rescale_factor,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


# The files


def write_page(folder: Path, repo_id: str, weights: str, target: Path):
    """Writes the page of a checkpoint into an empty folder.

    Args:
        repo_id: USER/NAME of the model.
        weights: the address of the model's files at a commit, ending in a slash; "": they are copied.

    Raises:
        UserError: see `page_content`; a file is a link.
    """
    content = page_content(folder)
    if (folder / "predictions.png").is_file():  # images of the dataset may be shown
        content["examples"] = [name for name in EXAMPLES if (folder / name).is_file()]
    copy_regular_files(folder, target, [*content["examples"], *([] if weights else ONNX_FILES)])
    for file in content["files"]:
        file["url"] = f"{weights}{file['url']}"
    content |= {"title": repo_id.rpartition("/")[2], "repo": weights.partition("/resolve/")[0]}
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    html = (PAGE / "index.html").read_text(encoding="utf-8").replace(">MODEL<", f">{data}<", 1)
    (target / "index.html").write_text(html, encoding="utf-8")
    shutil.copy(PAGE / "resize.js", target)
    (target / "README.md").write_text(space_card(folder, repo_id), encoding="utf-8")


def preview_space(folder: Path, repo_id: str) -> Path:
    """Writes the page, with a copy of the weights, into the folder `space` of a checkpoint; returns that folder."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".space-") as work:
        page = Path(work) / "space"
        page.mkdir()
        write_page(folder, repo_id, "", page)
        shutil.rmtree(folder / "space", ignore_errors=True)
        page.rename(folder / "space")
    return folder / "space"


def space_card(folder: Path, repo_id: str) -> str:
    license = inherited(folder).get("license")
    data = SpaceCardData(
        title=repo_id.rpartition("/")[2],
        sdk="static",
        app_file="index.html",
        models=[repo_id],
        tags=[TAG],
        **({"license": license} if license else {}),
    )
    return f"---\n{data.to_yaml()}\n---\nThis page runs {repo_id} in the browser. It was made by vit_simple.\n"


# The Space


def check_space(folder: Path, repo_id: str, private: bool, self_contained: bool) -> bool:
    """Checks what can be checked before the model is pushed; returns whether the Space must be private, as the model.

    Raises:
        UserError: the page cannot show the checkpoint, visitors could not load its weights, or the Space is another's
            or would make them public.
    """
    page_content(folder)
    api = HfApi()
    exists = with_retries("looking for the repository", lambda: api.repo_exists(repo_id))
    if exists and not private:
        private = with_retries("reading the repository", lambda: api.repo_info(repo_id)).private
    if private and not self_contained:
        raise UserError(
            f"--space: expected a public repository, because browsers have no access to {repo_id}: make it public, or "
            "use --self_contained, which copies the weights into the Space"
        )
    if with_retries("looking for the Space", lambda: api.repo_exists(repo_id, repo_type="space")):
        info = with_retries("reading the Space", lambda: api.repo_info(repo_id, repo_type="space"))
        if TAG not in (info.tags or []):
            raise UserError(f"--space: spaces/{repo_id} is not a page of vit_simple; rename or delete it")
        if private and not info.private:
            raise UserError(
                f"--space: expected a private Space of a private model, but spaces/{repo_id} is public: make it private"
            )
    return private


def pushed_commit(folder: Path, repo_id: str, revision: str | None) -> str:
    """The commit of the model on the Hub, which must have the folder's files that the page reads.

    Raises:
        UserError: there is no such repository, or it has other files.
    """
    api, files = HfApi(), [name for name in ("config.json", PREPROCESSOR, *ONNX_FILES) if (folder / name).is_file()]
    head = repo_state(api, repo_id).branches.get(revision or "main")
    if head is None or changes(api, repo_id, folder, files, head)[0]:
        raise UserError(f"--space_only: {repo_id} does not have the files of {folder}; use --space to push both")
    return head


def share_space(folder: Path, repo_id: str, sha: str, private: bool, self_contained: bool) -> str:
    """Makes or updates the Space of a checkpoint in one commit, and checks what the Hub then has; returns its address.

    Args:
        sha: the commit of the model that the page loads.

    Raises:
        UserError: see `page_content`.
        RunError: the Space does not have the files that were uploaded.
        one of NETWORK_ERRORS: the Hub cannot be reached or refuses.
    """
    api = HfApi()
    weights = "" if self_contained else f"{api.endpoint}/{repo_id}/resolve/{sha}/"
    create = {"repo_type": "space", "space_sdk": "static", "private": private or None, "exist_ok": True}
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary)
        write_page(folder, repo_id, weights, page)
        files = [path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()]
        refuse_secrets({name: (page / name).read_bytes() for name in files})
        with_retries("creating the Space", lambda: api.create_repo(repo_id, **create))
        changed, stale, head = space_changes(api, repo_id, page, files)
        if changed or stale:
            operations = [CommitOperationAdd(name, page / name) for name in changed]
            operations += [CommitOperationDelete(name) for name in stale]
            options = {"repo_type": "space", "commit_message": f"Page of {repo_id} at {sha}", "parent_commit": head}
            api.create_commit(repo_id, operations, **options)
        if any(space_changes(api, repo_id, page, files)[:2]):
            raise RunError(f"spaces/{repo_id} does not have the files that were uploaded; push again with --space_only")
    return f"{api.endpoint}/spaces/{repo_id}"


def space_changes(api: HfApi, repo_id: str, page: Path, files: list[str]) -> tuple[list[str], list[str], str]:
    """The files that are new or changed, the stale ones of an earlier page, and the commit that was compared."""
    head = with_retries("reading the Space", lambda: api.repo_info(repo_id, repo_type="space")).sha
    tree = lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type="space"))  # noqa: E731
    entries = with_retries("reading its list of files", tree)
    found = [entry for entry in entries if isinstance(entry, RepoFile)]
    remote = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}
    changed = [name for name in files if not has_hash(page / name, remote.get(name))]
    return changed, [name for name in (*ONNX_FILES, *EXAMPLES) if name in remote and name not in files], head
