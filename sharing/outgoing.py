"""What leaves this machine: regular files, read once, without paths and secrets of this machine."""

import contextlib
import json
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote_to_bytes

import yaml
from huggingface_hub import get_token

from ..files import RECORD, RECORD_FIELDS, RunError, UserError, read_json

RECIPE = "train_config.yaml"
SECRETS = re.compile(  # the formats that these services publish; private keys; passwords and signatures in URLs
    rb"(hf|api_org)_[A-Za-z0-9]{20,}"
    rb"|(gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    rb"|sk-(?=[A-Za-z0-9_-]*\d)(?=[A-Za-z0-9_-]*[A-Z])((proj|ant|svcacct|admin)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{20,})"
    rb"|AIza[A-Za-z0-9_-]{35}|(AKIA|ASIA)[A-Z0-9]{16}"
    rb"|xox[abeprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9/]{20,}"
    rb"|[rs]k_(live|test)_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{40,}"
    rb"|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
    rb"|PRIVATE KEY( BLOCK)?-----|://[^/\s:@]+:[^/\s:@]+@"
    rb"|(?i:[?&;](x-(amz|goog)-(signature|credential|security-token)|sig|signature|([a-z]+_)?token|api_?key|secret"
    rb"|password)=[^&\s\"']{8,})"
)
SECRET_VARIABLES = re.compile(  # the exceptions are TOKENIZERS_PARALLELISM, KEYBOARD, GIT_AUTHOR_NAME, DESIGN and such
    r"TOKEN(?!IZ)|KEY(?!BOARD)|SECRET|PASS(?!IVE|ENGER)|CRED|AUTH(?!ORS?(_|$))|(?<!DE)SIG(?!NAL)", re.IGNORECASE
)


# Regular files, read once


@contextlib.contextmanager
def snapshot(folder: Path, names: list[str]) -> Iterator[Path]:
    """A private copy of these files of a folder, as they leave this machine; errors name the folder itself.

    Raises:
        UserError: a file is a link or no file, or the record or the recipe is damaged.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.resolve().name
        copy.mkdir()
        try:
            copy_regular_files(folder, copy, names)
            remove_paths(copy)
            yield copy
        except (UserError, RunError) as error:
            raise type(error)(str(error).replace(str(copy), str(folder))) from error


def copy_regular_files(folder: Path, copy: Path, names: list[str]):
    """Copies those of the files that exist."""
    for name in names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not stat.S_ISREG(file.lstat().st_mode) or (file.parent != folder and file.parent.is_symlink()):
            raise UserError(f"{file}: expected a regular file, because links and devices are not shared; copy it")
        (copy / name).parent.mkdir(exist_ok=True)
        with open(file, "rb", opener=open_without_links) as source, open(copy / name, "wb") as target:
            while block := source.read(1 << 24):
                target.write(block)
        if file.suffix == ".png" and (copy / name).read_bytes()[:4] != b"\x89PNG":
            raise UserError(f"{file}: expected a PNG image")


def open_without_links(name: str, flags: int) -> int:
    """Opens a file that may have been replaced since it was looked at."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


# Paths


def remove_paths(folder: Path):
    """Cuts the absolute paths in the record and the recipe of a snapshot."""
    if (folder / RECORD).exists():
        content = read_json(folder / RECORD, RECORD_FIELDS)
        (folder / RECORD).write_text(json.dumps(cut_record(content), indent=2) + "\n", encoding="utf-8")
    if (folder / RECIPE).exists():
        (folder / RECIPE).write_text(recipe_text(folder), encoding="utf-8")


def recipe_text(folder: Path) -> str:
    """train_config.yaml without absolute paths.

    Raises:
        UserError: it is not a YAML mapping.
    """
    file = folder / RECIPE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: expected YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected options with values, got {type(content).__name__}")
    return yaml.safe_dump(cut_paths(content), sort_keys=False, allow_unicode=True)


def cut_record(content: dict) -> dict:
    """The content of provenance.json without absolute paths."""
    commands = content.get("commands")
    return cut_paths({**content, **({"commands": [*map(cut_command, commands)]} if commands else {})})


def cut_command(command: str) -> str:
    try:
        return shlex.join(map(cut_paths, shlex.split(command)))
    except ValueError:  # unbalanced quotes
        return cut_paths(command)


def cut_paths(value):
    """A value of JSON or YAML, in which each absolute path is cut to its last part."""
    if isinstance(value, dict):
        return {name: cut_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [cut_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(file:/{0,2})?(/|~|\.\.[/\\]|\\\\|[A-Za-z]:[/\\])", value):  # all of it is one path, even with spaces
        return PureWindowsPath(value).name  # of both kinds of separators
    prefix = r"(?:file:/{0,2})?(?:/|~[\w.-]*/|\.\./|(?<!\w)[A-Za-z]:[/\\]|\\\\)"
    parts = r"(?:[^/\\\s\"'`,;:()\[\]{}]+[/\\]+)*([^/\\\s\"'`,;:()\[\]{}]+)[/\\]*"
    return re.sub(rf"(?<![\w/\\.:~-]){prefix}{parts}", r"\1", value)


# Secrets


def secret_values() -> dict[str, str]:
    """The secrets of this machine by the name of their variable; short values and paths are none."""
    values = {name: value for name, value in os.environ.items() if SECRET_VARIABLES.search(name)}
    values |= {"the Hub token": token} if (token := get_token()) else {}
    return {name: value for name, value in values.items() if len(value) >= 8 and not is_path(value)}


def is_path(value: str) -> bool:
    """Whether the first folder of an absolute path exists: a secret may begin with a slash, too."""
    return Path(value).is_absolute() and Path(*Path(value).parts[:2]).exists()


def environment_without_secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not SECRET_VARIABLES.search(name)}


def refuse_secrets(files: dict[str, bytes]):
    """Raises UserError if a file contains a secret of this machine or what looks like a token, a key or a password."""
    values = secret_values()
    for file, content in files.items():
        if file.endswith(".safetensors"):  # only the header is text
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        elif file.endswith(".onnx"):  # weights have no long runs of printable characters
            content = b"\n".join(re.findall(rb"[ -~]{8,}", content))
        content = unescaped(content)
        encodings = ("utf-8", "utf-16-le", "utf-16-be")
        name = next((n for n, text in values.items() if any(text.encode(e) in content for e in encodings)), None)
        if name or SECRETS.search(content.replace(b"\0", b"")):  # without zeros, UTF-16 of both orders is ASCII
            secret = f"the value of {name}" if name else "what looks like a token, a key or a password"
            raise UserError(f"{file} contains {secret}: remove it before you share the checkpoint")


def unescaped(content: bytes) -> bytes:
    """The content and, after it, the content with the escapes of URLs and JSON resolved."""
    resolved = re.sub(rb"\\u00([2-7][0-9A-Fa-f])", lambda match: bytes.fromhex(match[1].decode()), content)
    return content + b"\n" + unquote_to_bytes(resolved)
