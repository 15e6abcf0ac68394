"""Checks before and after an upload: the files, secrets in them, and the model's outputs in a fresh process."""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import get_token
from safetensors.torch import load_file

from ..configuration_vit_simple import AUTO_MAP, ViTSimpleConfig
from ..conversion.convert import open_config, read_config
from ..conversion.state_dict import import_state_dict, join_names, load_tensors
from ..data.processors import open_processor
from ..files import CODE, PREPROCESSOR, RECORD, ROOT, SAFETENSORS, UserError, has_head, read_json

REQUIRED = ("config.json", PREPROCESSOR, *CODE)
OPTIONAL = (RECORD, "train_config.yaml", "metrics.jsonl", "curves.png", "confusion.png", "predictions.png")
SECRETS = re.compile(  # of the Hub, GitHub, GitLab, Slack, OpenAI, Google and AWS; private keys; passwords in URLs
    rb"\b(hf|api_org|gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abeprs]-[A-Za-z0-9-]{10,}"
    rb"|\bsk-(?=\S*\d)(?=\S*[A-Z])[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    rb"|PRIVATE KEY( BLOCK)?-----|://[^/\s:@]+:[^/\s:@]+@"
)
SECRET_VARIABLES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY)$", re.IGNORECASE)
CACHE_VARIABLES = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"}
# Loads a checkpoint as a user would and saves what it computes from random images.
FRESH_PROCESS = """
import sys, PIL.Image, torch, transformers
from safetensors.torch import save_file

source, revision, auto_class, output_file, code = sys.argv[1:]
options = {"revision": revision} if revision else {}
processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
if code == "remote":
    options["trust_remote_code"] = True
else:
    import vit_simple
model = getattr(transformers, auto_class).from_pretrained(source, **options).eval()
channels, size, generator = model.config.num_channels, model.config.image_size, torch.Generator().manual_seed(0)
if processor.do_resize:
    pixels = torch.randint(256, (2, 40, 60, 3), dtype=torch.uint8, generator=generator).numpy()
    inputs = processor([PIL.Image.fromarray(image) for image in pixels], return_tensors="pt")
else:  # a model of arrays, which no pipeline takes
    shape = (2, channels, *([size, size] if isinstance(size, int) else size))
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy()
    inputs = processor(list(pixels), input_data_format="channels_first", return_tensors="pt")
with torch.no_grad():
    output = model(inputs.pixel_values)
outputs = {name: output[name].contiguous() for name in ("logits", "pooler_output") if name in output}
if processor.do_resize and "logits" in output:
    predict = transformers.pipeline("image-classification", model=source, device="cpu", top_k=10**6, **options)
    scores = {answer["label"]: answer["score"] for answer in predict(PIL.Image.fromarray(pixels[0]))}
    outputs["scores"] = torch.tensor([scores[name] for name in model.config.id2label.values()])
save_file(outputs, output_file)
"""


# The folder


def check(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a checkpoint to upload beside its card, and warnings for the user.

    Raises:
        UserError: a file is missing or damaged, config.json names attention kernels of the Hub, or the classes have no
            names.
    """
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise UserError(f"FOLDER: {folder} has no {', '.join(missing)}; a checkpoint needs {', '.join(REQUIRED)}")
    content = read_config(folder)
    if content.get("model_type") != ViTSimpleConfig.model_type or content.get("auto_map") != AUTO_MAP:
        raise UserError(f"config.json: expected model_type vit_simple and the auto_map {AUTO_MAP}")
    config = open_config(folder, ViTSimpleConfig)
    open_processor(read_json(folder / PREPROCESSOR))
    weights = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    tensors = load_tensors([folder / name for name in weights if name.endswith(".safetensors")])
    import_state_dict(tensors, {}, config)
    if has_head(content) != ("head.weight" in tensors):
        raise UserError(f"config.json: architectures {content.get('architectures')} do not match the weights")
    names = list(config.id2label.values())
    if has_head(content) and any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        raise UserError(f"config.json has no class names ({join_names(names)}); set id2label and label2id")
    files = [*REQUIRED, *weights, *(name for name in OPTIONAL if (folder / name).is_file())]
    changed = [name for name in CODE if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    return files, [f"{name} differs from the installed one; the checkpoint keeps its own" for name in changed]


def is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*SAFETENSORS, "model.safetensors.index.json"))


def refuse_secrets(files: dict[str, bytes]):
    """Raises UserError if a file contains a secret of this machine or what looks like a token, a key or a password."""
    values = {name: text for name, text in os.environ.items() if SECRET_VARIABLES.search(name) and len(text) > 7}
    values |= {"the Hub token": token} if (token := get_token()) else {}
    for file, content in files.items():
        if file.endswith(".safetensors"):  # only the header is text
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        name = next((name for name, text in values.items() if text.encode() in content), None)
        if name or SECRETS.search(content):
            secret = f"the value of {name}" if name else "what looks like a token, a key or a password"
            raise UserError(f"{file} contains {secret}: remove it before you share the checkpoint")


# The outputs


def fresh_outputs(
    source: str, revision: str = "", code: str = "remote", auto_class: str = "AutoModel"
) -> dict[str, torch.Tensor]:
    """The outputs of a checkpoint for fixed images, computed in a fresh process with empty caches.

    Args:
        source, revision: a folder, or a repository and its commit.
        code: "remote" for the checkpoint's own code, "local" for that of the installed package.
        auto_class: the Auto class that loads it.

    Raises:
        UserError: it does not load there; with the last line of that process.
    """
    with tempfile.TemporaryDirectory() as home:
        variables = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
        variables |= {"HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        variables |= {"HF_TOKEN": get_token() or ""} if revision else {"HF_HUB_OFFLINE": "1"}
        arguments = [source, revision, auto_class, f"{home}/outputs", code]
        command = [sys.executable, "-c", FRESH_PROCESS, *arguments]
        result = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{source} does not load in a fresh process: {result.stderr.strip().splitlines()[-1]}")
        return load_file(f"{home}/outputs")


def differences(outputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    """The names of the outputs that are not equal bit for bit."""
    return [
        name
        for name in outputs | others
        if name not in outputs or name not in others or not outputs[name].equal(others[name])
    ]


def auto_class_of(folder: Path) -> str:
    return "AutoModelForImageClassification" if has_head(read_json(folder / "config.json")) else "AutoModel"


def local_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """The outputs of a folder in a fresh process.

    Raises:
        UserError: the folder's own code and the installed package compute different outputs.
    """
    with ThreadPoolExecutor() as pool:
        source, auto_class = str(folder.resolve()), auto_class_of(folder)
        own, installed = pool.map(lambda code: fresh_outputs(source, "", code, auto_class), ("remote", "local"))
    if names := differences(own, installed):
        raise UserError(f"{folder}: its code and the installed package compute different {', '.join(names)}")
    return own
