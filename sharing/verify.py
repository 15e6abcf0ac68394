"""Whether a folder can be shared: its files, its secrets, and what it gives in a fresh process."""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import get_token
from safetensors.torch import load_file

from ..configuration_vit_simple import AUTO_MAP, ViTSimpleConfig
from ..conversion.state_dict import import_state_dict, join_names, load_tensors
from ..data.processors import open_processor
from ..files import CODE, RECORD, ROOT, has_head, read_json

NEEDED = ("config.json", "preprocessor_config.json", *CODE)
OPTIONAL = (RECORD, "train_config.yaml", "metrics.jsonl", "curves.png", "confusion.png", "predictions.png")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
SECRETS = re.compile(  # of the Hub, GitHub, GitLab, Slack, OpenAI, Google and AWS; private keys; passwords in addresses
    rb"\b(hf|api_org|gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abeprs]-[A-Za-z0-9-]{10,}"
    rb"|\bsk-(?=\S*\d)(?=\S*[A-Z])[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    rb"|PRIVATE KEY( BLOCK)?-----|://[^/\s:@]+:[^/\s:@]+@"
)
SECRET_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY)$", re.IGNORECASE)  # of variables
CACHES = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"}
FRESH_PROCESS = """
import sys, PIL.Image, torch, transformers
from safetensors.torch import save_file

source, revision, auto_class, out, code = sys.argv[1:]
options = {"revision": revision} if revision else {}
processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
if code == "remote":
    options["trust_remote_code"] = True
else:
    import vit_simple
model = getattr(transformers, auto_class).from_pretrained(source, **options).eval()
channels, size, draw = model.config.num_channels, model.config.image_size, torch.Generator().manual_seed(0)
if processor.do_resize:
    pixels = torch.randint(256, (2, 40, 60, 3), dtype=torch.uint8, generator=draw).numpy()
    inputs = processor([PIL.Image.fromarray(image) for image in pixels], return_tensors="pt")
else:  # arrays, which no pipeline takes
    shape = (2, channels, *([size, size] if isinstance(size, int) else size))
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=draw).numpy()
    inputs = processor(list(pixels), input_data_format="channels_first", return_tensors="pt")
with torch.no_grad():
    output = model(inputs.pixel_values)
found = {name: output[name].contiguous() for name in ("logits", "pooler_output") if name in output}
if processor.do_resize and "logits" in output:
    answer = transformers.pipeline("image-classification", model=source, device="cpu", top_k=10**6, **options)
    scores = {row["label"]: row["score"] for row in answer(PIL.Image.fromarray(pixels[0]))}
    found["scores"] = torch.tensor([scores[name] for name in model.config.id2label.values()])
save_file(found, out)
"""


def check(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a checkpoint that may be uploaded beside its card, and what a user should be told of them.

    Raises:
        ValueError: something is missing or damaged, or the labels have no names.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"FOLDER: expected {', '.join(NEEDED)} in {folder}, without {', '.join(missing)}")
    content = read_json(folder / "config.json")
    if content.get("model_type") != ViTSimpleConfig.model_type or content.get("auto_map") != AUTO_MAP:
        raise ValueError(f"config.json: expected model_type vit_simple with the auto_map {AUTO_MAP}")
    config = ViTSimpleConfig.from_pretrained(folder)
    open_processor(read_json(folder / "preprocessor_config.json"))
    weights = sorted(path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    tensors = load_tensors([folder / name for name in weights if name.endswith(".safetensors")])
    import_state_dict(tensors, {}, config)
    if has_head(content) != ("head.weight" in tensors):
        raise ValueError(
            f"config.json: expected architectures that fit the weights, got {content.get('architectures')}"
        )
    names = list(config.id2label.values())
    if has_head(content) and any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        raise ValueError(f"config.json: expected names of the labels in id2label and label2id, got {join_names(names)}")
    files = [*NEEDED, *weights, *(name for name in OPTIONAL if (folder / name).is_file())]
    differing = [name for name in CODE if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    return files, [f"{name} is not the installed one; the checkpoint keeps its own" for name in differing]


def refuse_secrets(files: dict[str, bytes]):
    """Raises ValueError for a file with something that looks like a token or a key, or with one of this machine's."""
    own = {name: value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) > 7}
    own |= {"the Hub's token": token} if (token := get_token()) else {}
    for file, content in files.items():
        if file.endswith(".safetensors"):  # its header: tensors have no words
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        named = next((name for name, value in own.items() if value.encode() in content), None)
        if named or SECRETS.search(content):
            what = f"the value of {named}" if named else "something that looks like a token, a key or a password"
            raise ValueError(f"{file}: expected no secrets, got {what}")


def fresh_outputs(
    source: str, revision: str = "", remote: bool = True, auto_class: str = "AutoModel"
) -> dict[str, torch.Tensor]:
    """What a checkpoint makes of fixed images in a fresh process with empty caches.

    Args:
        source, revision: a folder, or a repository and its commit.
        remote: with the code of the checkpoint, else with that of the installed package.
        auto_class: the Auto class.

    Raises:
        ValueError: it does not load there, with what that process said last.
    """
    with tempfile.TemporaryDirectory() as home:
        variables = {name: value for name, value in os.environ.items() if name not in CACHES}
        variables |= {"HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        variables |= {"HF_TOKEN": get_token() or ""} if revision else {"HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-c",
            FRESH_PROCESS,
            source,
            revision,
            auto_class,
            f"{home}/out",
            "remote" if remote else "local",
        ]
        result = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"{source} does not load in a fresh process: {result.stderr.strip().splitlines()[-1]}")
        return load_file(f"{home}/out")


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The outputs that are not the same bit for bit."""
    return [name for name in one | other if name not in one or name not in other or not one[name].equal(other[name])]


def auto_class_of(folder: Path) -> str:
    return "AutoModelForImageClassification" if has_head(read_json(folder / "config.json")) else "AutoModel"


def local_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder gives in a fresh process. Raises ValueError, if the installed package gives something else."""
    ways = [(str(folder.resolve()), "", remote, auto_class_of(folder)) for remote in (True, False)]
    with ThreadPoolExecutor() as pool:
        found, installed = pool.map(lambda way: fresh_outputs(*way), ways)
    if wrong := differences(found, installed):
        raise ValueError(f"{folder}: its code and the installed package give other {', '.join(wrong)}")
    return found
