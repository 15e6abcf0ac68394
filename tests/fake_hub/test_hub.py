"""The test double in hub.py answers the real client like huggingface.co; our own code is tested in tests/sharing.

The client reads its environment when it is imported, so functions whose name ends in _client run in a fresh process.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.fake_hub.hub import Fault, Hub, Request

CARD = b"---\npipeline_tag: image-classification\ntags: [vit]\n---\nA card\n"
FILES = {"README.md": CARD, "config.json": b"{}", "deep/er/\u00e9 #.txt": b"text", "empty.png": b""}
FILES |= {"model.safetensors": b"weights", "deep/picture.png": b"pixels"}
LARGE = bytes(range(256)) * (24 << 12)  # 24 MiB: of a broken download the client keeps whole pieces of 10 MiB


@pytest.fixture
def hub():
    with Hub({"hf_good": "user", "hf_other": "other"}) as hub:
        yield hub


def run(client, hub: Hub, folder: Path, token: str | None = "hf_good"):
    """The result of a function of this file in a process that uses this Hub alone."""
    code = f"import json; from tests.fake_hub import test_hub; print(json.dumps(test_hub.{client.__name__}()))"
    variables = {**hub.environment(folder / "home", token), "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def outcome(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}".strip()
    return "done"


def files_client():
    from huggingface_hub import HfApi, snapshot_download

    api, name = HfApi(), "user/name"
    assert api.whoami()["name"] == "user"
    url = api.create_repo(name)
    assert url.repo_id == name and api.create_repo(name, exist_ok=True) == url
    assert outcome(api.create_repo, name) == "HfHubHTTPError 409"
    pushed = api.upload_folder(repo_id=name, folder_path="push", commit_message="push")
    assert api.upload_folder(repo_id=name, folder_path="push").oid == pushed.oid  # nothing is new
    info = api.repo_info(name, files_metadata=True)
    assert (info.sha, info.private, info.pipeline_tag) == (pushed.oid, False, "image-classification")
    assert info.tags == ["image-classification", "vit"]
    assert {each.rfilename: each.size for each in info.siblings[1:]} == {path: len(FILES[path]) for path in FILES}
    tree = {row.path: row for row in api.list_repo_tree(name, recursive=True)}
    assert tree.keys() == {".gitattributes", "deep", "deep/er", *FILES}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert tree["config.json"].lfs is None
    assert [row.path for row in api.list_repo_tree(name, "deep")] == ["deep/er", "deep/picture.png"]
    assert [row.path for row in api.get_paths_info(name, ["deep", "none", "config.json"])] == ["deep", "config.json"]
    folder = Path(snapshot_download(name))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    api.delete_file("config.json", name)
    api.delete_folder("deep", name)
    assert not api.file_exists(name, "config.json") and api.file_exists(name, "config.json", revision=pushed.oid)
    assert outcome(api.delete_file, "none", name) == "RemoteEntryNotFoundError 404"
    bad = {"path_or_fileobj": b"---\n[\n---\n", "path_in_repo": "README.md"}
    assert outcome(api.upload_file, repo_id=name, **bad) == "ValueError"


def test_files_are_uploaded_downloaded_and_deleted(hub, tmp_path):
    for path, content in FILES.items():
        (tmp_path / "push" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "push" / path).write_bytes(content)
    run(files_client, hub, tmp_path)
    _, pushed, _, last = hub.repos["models/user/name"].commits.values()
    assert {path: content for path, content in pushed.files.items() if path != ".gitattributes"} == FILES
    assert last.files.keys() == {".gitattributes", "README.md", "empty.png", "model.safetensors"}
    assert last.parent.parent is pushed and pushed.author == "user"
    stored = [request for request in hub.log if request.path.startswith("/storage/")]
    assert [request.method for request in stored].count("PUT") == 2  # the empty file is no LFS file
    assert "hf_good" not in repr(stored)


def revisions_client():
    from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_download

    api, name = HfApi(), "user/name"

    def write(text: str, **options):
        options = {"commit_message": text, "repo_type": "dataset", **options}
        return api.create_commit(name, [CommitOperationAdd("a.txt", text.encode())], **options)

    def read(revision: str) -> str:
        return Path(hf_hub_download(name, "a.txt", repo_type="dataset", revision=revision)).read_text()

    api.create_repo(name, repo_type="dataset", private=True)
    assert api.repo_info(name, repo_type="dataset").private
    one = write("one").oid
    two = write("two", parent_commit=one).oid
    assert outcome(write, "lost", parent_commit=one) == "HfHubHTTPError 412"
    pull = write("pull", create_pr=True, parent_commit=one)
    write("pulled", revision=pull.pr_revision)
    for _ in range(2):
        api.create_branch(name, branch="side/line", revision=one, repo_type="dataset", exist_ok=True)
        api.create_tag(name, tag="v1", revision=one, repo_type="dataset", exist_ok=True)
    assert outcome(api.create_tag, name, tag="v1", repo_type="dataset") == "HfHubHTTPError 409"
    write("side", revision="side/line")
    revisions = ["main", "v1", "side/line", "refs/pr/1", one, two]
    assert [read(revision) for revision in revisions] == ["two", "one", "side", "pulled", "one", "two"]
    refs = api.list_repo_refs(name, repo_type="dataset", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "side/line"]
    assert (refs.tags[0].target_commit, refs.pull_requests[0].ref) == (one, pull.pr_revision)
    assert outcome(read, "none") == outcome(write, "tag", revision="v1") == "RevisionNotFoundError 404"
    assert outcome(hf_hub_download, name, "b", repo_type="dataset") == "RemoteEntryNotFoundError 404"
    headers = {"Authorization": "Bearer hf_good"}
    pointer = {"key": "lfsFile", "value": {"path": "a.png", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    lines = [{"key": "header", "value": {"summary": "no such file"}}, pointer]
    commit = {"url": f"{api.endpoint}/api/datasets/{name}/commit/main", "content": "\n".join(map(json.dumps, lines))}
    assert get_session().post(**commit, headers=headers).status_code == 400
    return pull.pr_url


def test_revisions_are_immutable_and_a_stale_parent_is_refused(hub, tmp_path):
    assert run(revisions_client, hub, tmp_path) == f"{hub.url}/datasets/user/name/discussions/1"
    repo = hub.repos["datasets/user/name"]
    assert [commit.title for commit in repo.at("main").history()] == ["two", "one", "initial commit"]
    assert [commit.title for commit in repo.at("refs/pr/1").history()] == ["pulled", "pull", "one", "initial commit"]
    assert [commit.title for commit in repo.at("side/line").history()] == ["side", "one", "initial commit"]


def access_client():
    from huggingface_hub import HfApi, hf_hub_download

    api, add = HfApi(), {"path_or_fileobj": b"new", "path_in_repo": "b.txt"}
    calls = {
        "private": lambda token: api.repo_info("user/private", token=token),
        "file": lambda token: hf_hub_download("user/private", "a.txt", token=token, local_dir=str(token)),
        "public": lambda token: api.repo_info("user/public", token=token),
        "pull": lambda token: api.upload_file(repo_id="user/public", create_pr=True, token=token, **add),
        "write": lambda token: api.upload_file(repo_id="user/public", token=token, **add),
        "create": lambda token: api.create_repo("user/new", token=token),
        "absent": lambda token: api.repo_info("user/absent", token=token),
    }
    tokens = ("hf_good", "hf_other", "hf_bad", False)
    return {name: [outcome(call, token) for token in tokens] for name, call in calls.items()}


def test_tokens_give_the_access_that_they_give_on_the_hub(hub, tmp_path):
    hub.create("models/user/private", {"a.txt": b"secret"}, private=True)
    hub.create("models/user/public", {"a.txt": b"old"})
    hidden, unknown, foreign = "RepositoryNotFoundError 404", "HfHubHTTPError 401", "HfHubHTTPError 403"
    assert run(access_client, hub, tmp_path, token=None) == {
        "private": ["done", hidden, unknown, hidden],
        "file": ["done", hidden, unknown, hidden],
        "public": ["done", "done", unknown, "done"],
        "pull": ["done", "done", unknown, unknown],
        "write": ["done", foreign, unknown, unknown],
        "create": ["done", foreign, unknown, unknown],
        "absent": [hidden, hidden, unknown, hidden],
    }
    assert [hub.repos["models/user/public"].at(f"refs/pr/{pull}").author for pull in (1, 2)] == ["user", "other"]


def faults_client():
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api, waits = HfApi(), []
    time.sleep = waits.append  # a client that tries again waits for seconds: here it only says how long

    def attempt(name: str) -> tuple[str, float]:
        waits.clear()
        if name.startswith("user/get"):
            result = outcome(lambda: hashlib.sha256(Path(hf_hub_download(name, "a.png")).read_bytes()).hexdigest())
        elif name.startswith("user/info"):
            result = outcome(api.repo_info, name)
        else:
            files = [CommitOperationAdd(path, LARGE[: 1 << 20]) for path in ("a.png", "a.txt")]
            result = outcome(api.create_commit, name, files, commit_message="new")
        return result, sum(waits)

    return [attempt(name) for name in json.loads(Path("names.json").read_text())]


def test_faults_happen_to_the_requests_that_match(hub, tmp_path, monkeypatch):
    delays = []
    monkeypatch.setattr("tests.fake_hub.hub.time.sleep", delays.append)
    cut = "RemoteProtocolError"
    cases = [  # repository, fault; and the result, requests, new commits and waits of the client
        ("commit-429", Fault("/commit/", status=429, retry_after=9), "HfHubHTTPError 429", 1, 0, 0),
        ("commit-503", Fault("/commit/", status=503), "HfHubHTTPError 503", 1, 0, 0),
        ("commit-request", Fault("/commit/", cut="request"), cut, 1, 0, 0),
        ("commit-upload", Fault("/commit/", cut="upload"), cut, 1, 0, 0),
        ("commit-answer", Fault("/commit/", cut="answer"), cut, 1, 1, 0),
        ("commit-download", Fault("/commit/", cut="download"), cut, 1, 1, 0),
        ("preupload-500", Fault("/preupload/", status=500), "done", 2, 1, 1),
        ("batch-429", Fault("/objects/batch", status=429, retry_after=1), "done", 2, 1, 2),
        ("put-upload", Fault(method="PUT", cut="upload"), "done", 2, 1, 1),
        ("put-answer", Fault(method="PUT", cut="answer"), "done", 2, 1, 1),
        ("info-delay", Fault(delay=0.5), "done", 1, 0, 0),
        ("get-download", Fault("/storage/", "GET", cut="download"), "done", 2, 0, 1),
    ]
    (tmp_path / "names.json").write_text(json.dumps([f"user/{name}" for name, *_ in cases]))
    for name, fault, *_ in cases:
        hub.create(f"models/user/{name}", {"a.png": LARGE} if name == "get-download" else {})
        fault.path = f"(?=.*/{name}\\b).*{fault.path}"
        hub.faults.append(fault)
    before = {key: len(repo.commits) for key, repo in hub.repos.items()}
    for (name, fault, *expected, seconds), (result, waited) in zip(cases, run(faults_client, hub, tmp_path)):
        met = [each for each in hub.log if re.search(fault.path, each.path) and re.search(fault.method, each.method)]
        repo = hub.repos[f"models/user/{name}"]
        assert [result, len(met), len(repo.commits) - before[repo.key]] == expected, name
        assert fault.times == 0 and (waited > 0) == (seconds > 0) and waited >= seconds, name
        if expected[2]:
            assert repo.at("main").files["a.png"] == repo.at("main").files["a.txt"] == LARGE[: 1 << 20]
    assert met[-1].headers["range"] == f"bytes={10 << 20}-"
    assert [delay for delay in delays if delay] == [0.5]


def test_random_faults_are_those_of_the_seed():
    def faults(seed: int) -> list[Fault]:
        hub = Hub({})
        hub.disturb(0.5, seed, [Fault("/commit/", status=503), Fault(method="GET", cut="answer")])
        requests = [Request("POST", "/commit/", {}), Request("GET", "/", {}), Request("POST", "/", {})]
        return [hub.receive(request) for request in requests * 100]

    commits, gets, posts = (faults(0)[start::3] for start in range(3))
    assert {fault.status for fault in commits} == {0, 503} and {fault.cut for fault in gets} == {"", "answer"}
    assert 30 < sum(fault.status == 503 for fault in commits) < 70 and set(map(repr, posts)) == {repr(Fault())}
    assert faults(0) == faults(0) != faults(1)


def libraries_client():
    from datasets import load_dataset
    from transformers import AutoConfig

    train = load_dataset("user/data")["train"]["x"][:]
    stream = [row["x"] for row in load_dataset("user/data", split="test", streaming=True, revision="v1")]
    return train, stream, AutoConfig.from_pretrained("user/model").hidden_size


def test_datasets_and_transformers_read_the_hub(hub, tmp_path):
    def shard(*values: int) -> bytes:
        pyarrow.parquet.write_table(pyarrow.table({"x": values}), file := io.BytesIO())
        return file.getvalue()

    shards = {f"data/train-{number}.parquet": shard(2 * number, 2 * number + 1) for number in range(2)}
    data = hub.create("datasets/user/data", {**shards, "data/test-0.parquet": shard(7, 8)}, private=True)
    data.refs["refs/tags/v1"] = data.at("main").sha
    hub.create("models/user/model", {"config.json": b'{"model_type": "vit", "hidden_size": 48}'})
    assert run(libraries_client, hub, tmp_path) == [[0, 1, 2, 3], [7, 8], 48]
    assert any("range" in request.headers for request in hub.log)  # the stream reads pieces
