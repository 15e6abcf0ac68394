"""A small Hugging Face Hub on 127.0.0.1: a test double for pushes and downloads by the real client.

    with Hub({"hf_good": "user"}) as hub:
        hub.faults.append(Fault("/commit/", cut="answer"))
        subprocess.run(command, env=hub.environment(home, "hf_good"))
        hub.repos["models/user/name"].at("main").files["README.md"]

A process whose HF_ENDPOINT names it talks to it as to huggingface.co. So the tests of sharing/ run the code that users
run, and see what it does when requests fail. Two servers run: the Hub, and the storage of LFS files, to which the Hub
redirects and which, like S3, refuses requests with a token. There are models, datasets and Spaces, branches, tags and
pull requests. There are no discussions, no Xet storage, no web pages but those of static Spaces and no commit history;
add a route when a test needs one. test_hub.py checks that the client of huggingface_hub understands the answers.
"""

import base64
import hashlib
import json
import mimetypes
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".onnx")
LFS_BYTES = 10 << 20  # a larger file is LFS whatever its name
NOTHING = MappingProxyType({})
CUTS = ("", "request", "upload", "answer", "download")
API = "/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
SITE = "/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
REVISION = "/(?P<revision>[^/]+)"  # a slash in it is sent as %2F
ROUTES: list[tuple[re.Pattern, Callable]] = []


class Request(NamedTuple):
    method: str
    path: str  # as sent, with its query
    headers: dict[str, str]  # names in lower case


@dataclass
class Fault:
    """A fault of the next `times` requests whose path (with query) and method match these regular expressions.

    status: the answer, instead of handling the request, with `Retry-After` if retry_after (seconds) is given
    cut: when the connection ends: before the "request" is read; in the middle of its "upload", which is then ignored;
        after it was handled, but before the "answer"; in the middle of the answer ("download")
    delay: seconds to wait first
    """

    path: str = ""
    method: str = ""
    times: float = 1
    status: int = 0
    retry_after: int | None = None
    cut: str = ""
    delay: float = 0

    def __post_init__(self):
        if self.cut not in CUTS:
            raise ValueError(f"cut must be one of {CUTS}, got {self.cut!r}")

    def matches(self, request: Request) -> bool:
        return bool(self.times > 0 and re.search(self.path, request.path) and re.search(self.method, request.method))


EVERY_FAULT = (
    *(Fault(status=status, retry_after=0) for status in (429, 500, 503)),
    *(Fault(cut=cut) for cut in CUTS[1:]),
    Fault(delay=0.1),
)


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = NOTHING


class Refusal(Exception):
    """An error response; the client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] = NOTHING, **details):
        ascii_message = message.encode("ascii", "backslashreplace").decode()  # file names may be in any script
        headers = {**headers, "X-Error-Message": ascii_message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer(status, json.dumps({"error": message, **details}).encode(), headers)


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_BYTES or (size > 0 and path.endswith(LFS_SUFFIXES))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata(card: bytes) -> dict:
    """The YAML metadata of a README.md."""
    block = re.match(rb"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        return dict((yaml.safe_load(block[1]) if block else None) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise Refusal(400, "Invalid metadata", errors=[{"message": str(error)}]) from error


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, bytes]

    def history(self) -> list["Commit"]:
        """This commit and those before it, newest first."""
        commits = [self]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def folders(self) -> set[str]:
        return {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}

    def row(self, path: str) -> dict:
        """The entry of a file or a folder in a listing."""
        if path not in self.files:
            inside = sorted(file for file in self.files if file.startswith(f"{path}/"))
            return {"type": "directory", "path": path, "size": 0, "oid": git_hash(repr(inside).encode())}
        content, oid = self.files[path], sha256(self.files[path])
        row = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if is_lfs(path, len(content)):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
            row["oid"] = git_hash(pointer.encode())
            row["lfs"] = {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": len(pointer)}
        return row


@dataclass
class Repo:
    key: str  # models/user/name or datasets/user/name
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)  # by sha, oldest first
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> sha
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS content by sha256; it may be in no commit yet

    def __post_init__(self):
        self.kind, self.name = self.key.split("/", 1)
        self.page = self.name if self.kind == "models" else self.key

    def at(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            sha = self.refs.get(ref, ref)
            if sha in self.commits:
                return self.commits[sha]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, ref: str, files: Mapping[str, bytes], title: str, message="", author="system", parent=None) -> Commit:
        """Makes `files` all that `ref` holds."""
        changed = {path: files[path] for path in files if not parent or parent.files.get(path) is not files[path]}
        self.blobs |= {sha256(content): content for path, content in changed.items() if is_lfs(path, len(content))}
        hashes = sorted((path, git_hash(content)) for path, content in changed.items())
        sha = git_hash(repr((self.key, parent and parent.sha, title, len(self.commits), hashes)).encode())
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.commits[sha] = Commit(sha, parent, title, message, author, date, MappingProxyType(dict(files)))
        self.refs[ref] = sha
        return self.commits[sha]


def route(methods: str, path: str) -> Callable:
    """Decorates a method of Handler that answers such requests; it gets `kind` and `name` in the path as a Repo."""
    return lambda function: ROUTES.append((re.compile(f"(?:{methods}) {path}"), function)) or function


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def serve(self):
        self.hub: Hub = self.server.hub
        fault = self.hub.receive(Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        time.sleep(fault.delay)
        self.close_connection |= bool(fault.cut)
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read({"request": 0, "upload": length // 2}.get(fault.cut, length))
        if fault.cut in ("request", "upload"):
            return
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        answer = Refusal(fault.status, "a planted fault", headers=headers).answer if fault.status else self.answer()
        if fault.cut == "answer":
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if fault.cut == "download" else answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def answer(self) -> Answer:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query, keep_blank_values=True)
        try:
            with self.hub.lock:
                for pattern, function in ROUTES:
                    if match := pattern.fullmatch(f"{self.command} {path}"):
                        found = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                        if "name" in found:
                            found["repo"] = self.find(f"{found.pop('kind', 'models')}/{found.pop('name')}")
                        result = function(self, **found)
                        return result if isinstance(result, Answer) else Answer(200, json.dumps(result).encode())
            raise Refusal(404, f"This Hub does not know {self.command} {path}")
        except Refusal as refusal:
            return refusal.answer

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def find(self, key: str) -> Repo:
        user, repo = self.user(), self.hub.repos.get(key)
        if repo is None or (repo.private and user != repo.name.split("/")[0]):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def writer(self, name: str, foreign: bool = False) -> str:
        """The user of the request, who must own the repository of this name unless `foreign` users may write."""
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != name.split("/")[0] and not foreign:
            raise Refusal(403, f"You don't have the rights to write to {name}")
        return user

    def content(self, content: bytes, headers: Mapping[str, str]) -> Answer:
        """A file, or the requested range of it."""
        # Pages of other sites may read files, as on the Hub.
        size, headers = len(content), {**headers, "Accept-Ranges": "bytes", "Access-Control-Allow-Origin": "*"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            return Answer(200, content, headers)
        start, stop = int(requested[1]), min(size, int(requested[2] or size) + 1)
        if start >= stop:
            raise Refusal(416, "The range is not in the file", headers={"Content-Range": f"bytes */{size}"})
        return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user, token = self.writer("", foreign=True), {"displayName": "test", "role": "write"}
        return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": {"accessToken": token}}

    @route("POST", "/api/validate-yaml")
    def validate(self):
        metadata(json.loads(self.body)["content"].encode())
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user()}/{asked['name']}"
        self.writer(name)
        repo = Repo(f"{asked.get('type') or 'model'}s/{name}")
        reply = {"url": f"{self.hub.url}/{repo.page}", "name": name}
        if repo.key in self.hub.repos:
            raise Refusal(409, f"You already created this {repo.kind[:-1]} repo: {name}", **reply)
        self.hub.create(repo.key, private=asked.get("visibility") == "private" or asked.get("private", False))
        return reply

    @route("GET", f"{API}(?:/revision{REVISION})?")
    def info(self, repo: Repo, revision: str = "main"):
        commit = repo.at(revision)
        card = metadata(commit.files.get("README.md", b""))
        info = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        info |= {"cardData": card, "tags": [*info.values(), *(card.get("tags") or [])]}
        info |= {"id": repo.name, "author": repo.name.split("/")[0], "sha": commit.sha, "private": repo.private}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "lastModified": commit.date}
        info["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in info["siblings"]:
                row = commit.row(sibling["rfilename"])
                sibling |= {"size": row["size"], "blobId": row["oid"], "lfs": row.get("lfs")}
        return Answer(200, json.dumps(info, default=str).encode())  # YAML has dates

    @route("GET", f"{API}/tree{REVISION}(?:/(?P<path>.+))?")
    def tree(self, repo: Repo, revision: str, path: str = ""):
        commit, prefix = repo.at(revision), f"{path}/" if path else ""
        folders = commit.folders()
        if path and path not in folders:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive") == ["true"]
        inside = [each for each in sorted({*commit.files, *folders}) if each.startswith(prefix)]
        return [commit.row(each) for each in inside if recursive or "/" not in each[len(prefix) :]]

    @route("POST", f"{API}/paths-info{REVISION}")
    def paths_info(self, repo: Repo, revision: str):
        commit, form = repo.at(revision), parse_qs(self.body.decode())
        known = {*commit.files, *commit.folders()}
        return [commit.row(path) for path in form["paths"] if path in known]

    @route("GET", f"{API}/refs")
    def references(self, repo: Repo):
        kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        found = {kind: [] for kind in ("converts", *kinds.values())}
        for ref, sha in repo.refs.items():
            _, kind, name = ref.split("/", 2)
            found[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": sha})
        return found

    @route("POST", f"{API}/(?P<pointer>branch|tag)/(?P<target>[^/]+)")
    def point(self, repo: Repo, pointer: str, target: str):
        self.writer(repo.name)
        asked = json.loads(self.body)
        ref, start = f"refs/heads/{target}", asked.get("startingPoint", "main")
        if pointer == "tag":
            ref, start = f"refs/tags/{asked['tag']}", target
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(start).sha
        return {}

    @route("POST", f"{API}/preupload{REVISION}")
    def preupload(self, repo: Repo, revision: str):
        self.writer(repo.name, foreign="create_pr" in self.query)
        old, rows = repo.at(revision).files, []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in old:
                rows[-1]["oid"] = (sha256 if is_lfs(path, len(old[path])) else git_hash)(old[path])
        return {"files": rows}

    @route("POST", f"{API}/commit{REVISION}")
    def commit(self, repo: Repo, revision: str):
        (_, header), *operations = (json.loads(line).values() for line in self.body.splitlines())
        pull, asked = "create_pr" in self.query, header.get("parentCommit", "")
        author, parent = self.writer(repo.name, foreign=pull), repo.at(revision)
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        if ref not in repo.refs:
            raise Refusal(404, f"{revision} is neither a branch nor a pull request", "RevisionNotFound")
        if pull:
            parent = repo.at(asked or revision)
            ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
        elif not parent.sha.startswith(asked):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for key, value in operations:
            self.apply(key, value, repo, files)
        commit = repo.add(ref, files, header["summary"], header.get("description", ""), author, parent)
        site = f"{self.hub.url}/{repo.page}"
        reply = {"success": True, "commitOid": commit.sha, "commitUrl": f"{site}/commit/{commit.sha}"}
        return {**reply, "pullRequestUrl": f"{site}/discussions/{ref.split('/')[-1]}" if pull else None}

    def apply(self, key: str, value: dict, repo: Repo, files: dict[str, bytes]):
        """Applies one operation of a commit to `files`."""
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repo.blobs:
                raise Refusal(400, f"An LFS pointer pointed to a file that does not exist: {path}")
            files[path] = repo.blobs[value["oid"]]
        else:
            gone = [path] if key == "deletedFile" else [each for each in files if each.startswith(f"{path}/")]
            if not files.keys() & gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for each in gone:
                del files[each]

    @route("HEAD|GET", f"{SITE}/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, repo: Repo, revision: str, path: str):
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Access-Control-Allow-Origin": "*"}
        if kind := mimetypes.guess_type(path)[0]:
            headers["Content-Type"] = kind
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        content = commit.files[path]
        if not is_lfs(path, len(content)):
            return self.content(content, {**headers, "ETag": f'"{git_hash(content)}"'})
        oid = sha256(content)
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Answer(302, headers={**headers, "Location": f"{self.hub.storage}/storage/{repo.key}/{oid}"})

    @route("POST", f"{SITE}.git/info/lfs/objects/(?P<action>batch|verify)")
    def lfs(self, repo: Repo, action: str):
        self.writer(repo.name)
        asked = json.loads(self.body)
        if action == "verify":
            if len(repo.blobs.get(asked["oid"], b"")) != asked["size"]:
                raise Refusal(404, f"{asked['oid']} was not uploaded")
            return {}
        for row in asked["objects"]:
            if row["oid"] not in repo.blobs:
                upload = {"href": f"{self.hub.storage}/storage/{repo.key}/{row['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo.page}.git/info/lfs/objects/verify"}
                row["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": asked["objects"]}

    @route("HEAD|GET|PUT", "/storage/(?P<key>[^/]+/[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def store(self, key: str, oid: str):
        blobs = self.hub.repos[key].blobs
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if self.command == "PUT":
            if sha256(self.body) != oid:
                raise Refusal(400, "The content does not match its checksum")
            blobs[oid] = self.body
            return Answer(200)
        if oid not in blobs:
            raise Refusal(404, "NoSuchKey")
        return self.content(blobs[oid], {"ETag": f'"{oid}"'})


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that disconnects is not our error
            self.hub.crashes.append(sys.exception())


class Hub:
    """A Hub for the users of these tokens ({token: user name}); it runs inside its context.

    url: the value of HF_ENDPOINT
    storage: the URL of the LFS files
    repos: by "models/user/name" or "datasets/user/name"
    faults: the first one that matches a request is applied, and counted down
    log: every request to either server, in order of arrival
    """

    def __init__(self, tokens: Mapping[str, str]):
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.crashes: list[BaseException] = []  # raised at the end of the context
        self.lock = threading.RLock()
        self.disturb(0)

    def __enter__(self) -> "Hub":
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        # Two host names: clients follow a redirect within a host, and expect the headers of the Hub there.
        hosts = zip(("127.0.0.1", "localhost"), self.servers)
        self.url, self.storage = (f"http://{host}:{server.server_port}" for host, server in hosts)
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        for server in self.servers:
            server.shutdown()
            server.server_close()
        if self.crashes and error is None:
            raise self.crashes[0]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that uses this Hub alone, keeps its caches in `home` and has this token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_"))}
        names = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS")
        on = dict.fromkeys([*(f"HF_HUB_{name}" for name in names), "DISABLE_SAFETENSORS_CONVERSION"], "1")
        off = dict.fromkeys(["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"], "0")
        direct = dict.fromkeys(["NO_PROXY", "no_proxy"], "127.0.0.1,localhost")
        secret = {} if token is None else {"HF_TOKEN": token}
        return {**kept, **on, **off, **direct, **secret, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def create(self, key: str, files: Mapping[str, bytes] = NOTHING, private: bool = False) -> Repo:
        """A new repository, with these files in a second commit if there are any."""
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo = self.repos[key] = Repo(key, private)
        first = repo.add("refs/heads/main", {".gitattributes": attributes.encode()}, "initial commit")
        if files:
            repo.add("refs/heads/main", {**first.files, **files}, "files", parent=first)
        return repo

    def disturb(self, probability: float, seed: int = 0, faults: Sequence[Fault] = EVERY_FAULT):
        """From now on, a request meets a random one of the `faults` that match it, with this probability."""
        self.probability, self.random, self.disturbances = probability, random.Random(seed), faults

    def receive(self, request: Request) -> Fault:
        """Logs a request and returns its fault, which may be one without effect."""
        with self.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.matches(request):
                    fault.times -= 1
                    return fault
            matching = [fault for fault in self.disturbances if fault.matches(request)]
            happens = self.random.random() < self.probability
            return self.random.choice(matching) if happens and matching else Fault()
