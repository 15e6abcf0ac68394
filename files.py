"""The files of a run's folder, how they are written and read, and how a command ends when something fails.

Imports nothing of this package.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
import unicodedata
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

ROOT = Path(__file__).parent
CODE = ("configuration_vit_simple.py", "modeling_vit_simple.py")
RECORD = "provenance.json"
INHERITED = ("base_model", "license", "license_name", "license_link")
PREPROCESSOR = "preprocessor_config.json"
SAFETENSORS = ("model.safetensors", "model-?????-of-?????.safetensors")  # glob patterns: one file, or shards
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # as PEFT names them
ONNX_FILES = ("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx")  # as transformers.js names them

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

NETWORK_ERRORS = (*HfHubHTTPError.__bases__, OSError)  # the errors of the HTTP library; not all are an OSError


class UserError(ValueError):
    """A mistake of the user, such as a wrong option or a damaged file: one line, exit status 2."""


class RunError(RuntimeError):
    """A failure that is neither the user's mistake nor a bug, such as a full disk: one line, exit status 1."""


@contextlib.contextmanager
def command_errors(program: str, advice: Callable[[], str] | None = None):
    """Ends a command with a message and an exit status if an exception leaves this context.

    A mistake of the user (UserError) prints one line, with exit status 2. A failure of the machine (RunError, OSError,
    out of memory, the network) prints one line, with exit status 1. SIGTERM and Ctrl-C print one line, with exit status
    143 and 130. Anything else is a bug: its traceback comes before the line, with exit status 1.

    Args:
        program: the command's name, with which the line begins.
        advice: returns what to do next, such as the command that continues a run; it ends the line.

    Raises:
        SystemExit: with the line as its text.
    """
    try:
        with sigterm_as_ctrl_c():
            yield
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        raise command_end(f"{program}: stopped by {signal.Signals(number).name}", advice, 128 + number) from error
    except Exception as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # if the main process fails, too, torchrun ends this one: a common mistake is printed once
        is_mistake = isinstance(error, UserError)
        if not is_mistake and not is_machine_failure(error):
            traceback.print_exception(error)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise command_end(f"{program}: error: {reason}", advice, 2 if is_mistake else 1) from error


def command_end(line: str, advice: Callable[[], str] | None, status: int) -> SystemExit:
    """Prints the last line of a command; returns what to raise."""
    line = terminal_text(line if advice is None else f"{line}; {advice()}")
    print(line, file=sys.stderr)
    end = SystemExit(line)
    end.code = status
    return end


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    """Lets SIGTERM end the block by KeyboardInterrupt, so that nothing temporary and no other process is left."""

    def interrupt(number: int, frame):
        raise KeyboardInterrupt(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_machine_failure(error: Exception) -> bool:
    out_of_memory = "out of memory" in str(error) or "can't allocate memory" in str(error)  # torch's words
    return isinstance(error, (RunError, MemoryError, *NETWORK_ERRORS)) or (
        isinstance(error, RuntimeError) and out_of_memory
    )


@contextlib.contextmanager
def errors_that_name(path: Path):
    """Adds the path to an OSError without one, such as that of a disk that is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# Text from datasets and files of others, such as class names. Markdown has a function of its own, in sharing.


def printable(text: str) -> str:
    """The text in one line: control characters and invisible ones are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shorten(text: str, width: int) -> str:
    """The text or, if it is wider, its beginning with an ellipsis; a Chinese or Japanese character counts as two."""
    if text_width(text) <= width:
        return text
    end = max((end for end in range(len(text)) if text_width(text[:end]) < width), default=0)
    return f"{text[:end].rstrip()}…"


def text_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def terminal_text(text: str) -> str:
    """The text in one line that this terminal can show: characters that it cannot encode are escaped, too."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def file_name(text: str) -> str:
    """A name for a file or folder, of letters, digits and ._- and not hidden, short enough for any file system."""
    return re.sub(r"[^\w.-]", "_", text).lstrip(".-")[:60] or "unnamed"


# Files


def write_atomically(path: Path, text: str):
    """Writes a file under another name and then renames it, so that it never exists half-written."""
    unfinished = path.with_name(f".{path.name}")
    try:
        with errors_that_name(path), open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# The types of the fields in the files of a run, for `check_types`

RECORD_FIELDS = {
    "dataset": {
        "name": str,
        "on_hub": bool,
        "config": str | None,
        "revision": str | None,
        "images": int | None,
        "has_16_bit_images": bool | None,
        "bit_depth": int | None,
    },
    "changed_images": dict[str, int] | None,
    "base_model_revision": str | None,
    "commands": list[str] | None,
    "hardware": str | None,
    "versions": dict[str, str] | None,
    "commit": str | None,
    "seconds": float | None,
    "remarks": list[str] | None,
    "method": str | None,
    "probe": float | None,
    "temperature": float | None,
    "calibrated": bool | None,
    "thresholds": dict[str, float] | None,
    "keep_score": float | None,
    "base_model_relation": str | None,
    "source": str | None,
    "exports": {
        **{name: str for name in ("dataset", "split", "hardware")},
        **{name: int for name in ("images", "batch_size", "threads")},
        "versions": dict[str, str],
        "models": dict[str, dict[str, float | bool | None]],
    },
    **{name: str | list[str] | None for name in INHERITED},
}
MODEL_FIELDS = {
    "id2label": dict[str, str] | None,
    "dtype": str | None,
    "problem_type": str | None,
    "architectures": list[str] | None,
    **{name: int for name in ("num_hidden_layers", "hidden_size")},
    **{name: int | list[int] for name in ("image_size", "patch_size")},
}
METRIC_FIELDS = {
    "step": int,
    "split": str,
    "epoch": float | None,
    "weights": str | None,
    "per_class": dict[str, float | None] | None,
    **{name: int | None for name in ("correct", "count")},
    **{name: float | None for name in ("loss", "lr", "images_per_second", "data_wait")},
    **{name: float | None for name in ("top1", "top5", "map", "mae", "r2")},
    **{name: float | None for name in ("micro_f1", "macro_f1", "micro_f1_at_thresholds", "macro_f1_at_thresholds")},
    **{name: float | None for name in ("expected_calibration_error", "negative_log_likelihood", "brier_score")},
    **{name: float | None for name in ("temperature", "keep_score")},
    "calibration": dict[str, dict[str, float]] | None,
}


def check_types(value: typing.Any, expected: typing.Any, source: str, field: str = ""):
    """Checks the types inside a value that was read from JSON or YAML.

    Args:
        expected: a type such as `int`, `float | None`, `list[str]` or `dict[str, int]`. For an object with named
            fields, a dictionary {field: type}: the object itself and fields that allow None may be absent, and fields
            that are not in it may have any type.
        source: the file that the value comes from.
        field: the value's place in it.

    Raises:
        UserError: names the file and the field, with what was expected and what was there.
    """
    place = f"{field}." if field else ""
    if isinstance(expected, dict):
        if value is None and field:
            return
        check_types(value, dict, source, field)
        for name, kind in expected.items():
            check_types(value.get(name), kind, source, f"{place}{name}")
        return
    kinds = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for kind in kinds:
        base: typing.Any = typing.get_origin(kind) or kind
        inner = typing.get_args(kind)
        numbers = (int, float) if base is float else base
        if not isinstance(value, numbers) or (isinstance(value, bool) and base is not bool):
            continue
        if inner:
            contents: typing.Any = value
            for name, item in enumerate(contents) if base is list else contents.items():
                check_types(item, inner[-1], source, f"{place}{name}")
        return
    if not field:
        raise UserError(f"{source}: expected a JSON object, got {type(value).__name__}")
    names = " or ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise UserError(f"{source}: expected {field} to be {names}, got {'nothing' if value is None else f'{value!r:.60}'}")


def read_json(path: Path, fields: dict | None = None) -> dict:
    """The object in a JSON file, {} if there is no such file.

    Args:
        fields: the types of its fields, see `check_types`.

    Raises:
        UserError: the file does not hold a JSON object, or a field has another type.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise UserError(f"{path}: expected a file")  # a FIFO would never end
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from error
    check_types(content, fields or dict, str(path))
    return content


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, [] if there is no such file.

    Raises:
        UserError: a line is not a JSON object, or a field has another type.
    """
    file, lines = folder / "metrics.jsonl", []
    if file.exists():
        for number, line in enumerate(read_text(file).splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: expected a JSON object in each line: line {number}: {error}") from error
            check_types(lines[-1], METRIC_FIELDS, f"{file}, line {number}")
            if lines[-1]["split"] != "train":
                check_types(lines[-1], {"count": int}, f"{file}, line {number}")
    return lines


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error}") from error


def open_card(text: str, file: str) -> ModelCard:
    """The model card in a text; `file` names it in errors.

    Raises:
        UserError: its metadata is damaged.
    """
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: expected a model card with YAML metadata: {error}") from error


def inherited(folder: Path) -> dict:
    """License and base model, as the model card of a folder states them."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    data = open_card(read_text(file), str(file)).data.to_dict()
    return {name: data[name] for name in INHERITED if data.get(name)}


def refuse_adapter(folder: Path):
    """Raises UserError if the folder holds what PEFT adds to a checkpoint instead of a checkpoint."""
    if (folder / ADAPTER[0]).is_file() and not any(folder.glob(SAFETENSORS[0])):
        raise UserError(
            f"expected a whole checkpoint, got an adapter of PEFT in {folder}: merge it into its base model first, "
            "with PeftModel.from_pretrained(base, adapter).merge_and_unload(), and save the result"
        )


def has_head(config: dict) -> bool:
    return config.get("architectures") == ["ViTSimpleForImageClassification"]


def weight_problem(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be a weight of a model: its dtype, or a value that is not finite."""
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"has the dtype {str(tensor.dtype).removeprefix('torch.')} instead of a float of 16, 32 or 64 bits"
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():  # copies no tensor
        return "has values that are not finite"
    return None


def check_weights(file: Path):
    """Raises UserError if a tensor in a safetensors file cannot be a weight; from_pretrained would cast it."""
    with safetensors.safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            if problem := weight_problem(opened.get_tensor(name)):
                raise UserError(f"{file.name}: {name} {problem}")
