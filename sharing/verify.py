"""Checks before and after an upload: the files of a checkpoint, and the model's outputs in a fresh process."""

import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..configuration_vit_simple import AUTO_MAP, ViTSimpleConfig
from ..conversion.convert import open_config, read_config
from ..conversion.state_dict import import_state_dict, join_names, load_tensors
from ..data.processors import open_processor
from ..files import (
    CODE,
    MODEL_FIELDS,
    ONNX_FILES,
    PREPROCESSOR,
    RECORD,
    ROOT,
    SAFETENSORS,
    UserError,
    check_types,
    has_head,
    read_json,
)
from . import network
from .card_plots import PLOTS
from .outgoing import RECIPE, environment_without_secrets

AUTO_MAPS = (AUTO_MAP, {name: AUTO_MAP[name] for name in AUTO_MAP if name != "AutoBackbone"})  # now, and earlier
REQUIRED = ("config.json", PREPROCESSOR, *CODE)
OPTIONAL = (RECORD, RECIPE, "metrics.jsonl", *PLOTS, *ONNX_FILES)
PROCESS_SECONDS = 1800  # until a fresh process must have computed its outputs
CACHE_VARIABLES = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"}
FLOAT32 = "float32 outputs"  # of the weights, which may have fewer bits, for comparison with ONNX files
# Loads a checkpoint as a user would and saves what it computes from random images.
FRESH_PROCESS = """
import sys, PIL.Image, torch, transformers
from safetensors.torch import save_file

source, revision, auto_class, output_file, code, *onnx_files = sys.argv[1:]
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
key = "logits" if "logits" in output else "pooler_output"
if onnx_files:
    with torch.no_grad():
        outputs["float32 outputs"] = model.float()(inputs.pixel_values)[key].contiguous()
for name in onnx_files:
    import huggingface_hub, onnxruntime
    path = huggingface_hub.hf_hub_download(source, name, revision=revision) if revision else source + "/" + name
    one_thread = onnxruntime.SessionOptions()  # more could add up in another order
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, one_thread, providers=["CPUExecutionProvider"])
    outputs[name] = torch.from_numpy(session.run([key], {"pixel_values": inputs.pixel_values.numpy()})[0])
save_file(outputs, output_file)
"""


# The folder


def check(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a checkpoint to upload beside its card, and warnings for the user.

    Raises:
        UserError: a file is missing or damaged, config.json names attention kernels of the Hub, a weight is not
            finite, or the classes have no names.
    """
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        message = f"FOLDER: {folder} has no {', '.join(missing)}; a checkpoint needs {', '.join(REQUIRED)}"
        if PREPROCESSOR in missing:
            message += "; write it with processor.save_pretrained(folder), or give Trainer processing_class=processor"
        raise UserError(message)
    content = read_config(folder)
    if content.get("model_type") != ViTSimpleConfig.model_type or content.get("auto_map") not in AUTO_MAPS:
        raise UserError(f"config.json: expected model_type vit_simple and the auto_map {AUTO_MAP}")
    check_config(content, folder / "config.json")
    config = open_config(folder, ViTSimpleConfig)
    open_processor(read_json(folder / PREPROCESSOR))
    weights = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    if not weights:
        raise UserError(f"FOLDER: {folder} has no model.safetensors")
    tensors = load_tensors([folder / name for name in weights if name.endswith(".safetensors")])
    check_tensors(tensors, config, folder)
    if has_head(content) != ("head.weight" in tensors):
        raise UserError(f"config.json: architectures {content.get('architectures')} do not match the weights")
    names = list(config.id2label.values())
    if has_head(content) and any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        raise UserError(f"config.json has no class names ({join_names(names)}); set id2label and label2id")
    files = [*REQUIRED, *weights, *(name for name in OPTIONAL if (folder / name).is_file())]
    if {*files} & {*ONNX_FILES} and importlib.util.find_spec("onnxruntime") is None:
        raise UserError("the ONNX files cannot be verified: pip install onnxruntime, or delete the folder onnx")
    changed = [name for name in CODE if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    return files, [f"{name} differs from the installed one; the checkpoint keeps its own" for name in changed]


def check_config(content: dict, file: Path):
    """Raises UserError if a field of config.json has a wrong type, which the libraries would trust."""
    check_types(content, MODEL_FIELDS, str(file))
    if numbers := [number for number in content.get("id2label", {}) if not number.isdecimal()]:
        raise UserError(f"{file}: id2label: expected numbers of classes, got {join_names(numbers)}")
    for name in ("dtype", "torch_dtype"):
        value = content.get(name)
        if value is not None and not isinstance(getattr(torch, value, None), torch.dtype):
            raise UserError(f"{file}: {name}: expected a dtype of torch, such as float32, got {value}")


def check_tensors(tensors: dict[str, torch.Tensor], config: ViTSimpleConfig, folder: Path):
    """Raises UserError if the weights are not those of the config, or not finite."""
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    if len(blocks) != config.num_hidden_layers:  # before such a model is built: it may be too large
        file, layers = folder / "config.json", config.num_hidden_layers
        raise UserError(f"{file}: expected num_hidden_layers of {len(blocks)}, as in the weights, got {layers}")
    try:
        import_state_dict(tensors, {}, config)
    except RuntimeError as error:  # of torch, for sizes that no tensor can have
        raise UserError(f"{folder / 'config.json'}: expected sizes that fit the weights: {error}") from error


def shared_names(folder: Path) -> list[str]:
    """The names in a folder that a push takes along, whatever kind of file they are."""
    names = sorted(path.relative_to(folder).as_posix() for each in ("*", "onnx/*") for path in folder.glob(each))
    return [name for name in names if name in ("README.md", *REQUIRED, *OPTIONAL) or is_weights(name)]


def is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*SAFETENSORS, "model.safetensors.index.json"))


# The outputs


def fresh_outputs(
    source: str,
    revision: str = "",
    code: str = "remote",
    auto_class: str = "AutoModel",
    token: str | None = None,
    onnx_files: list[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The outputs of a checkpoint for fixed images, computed in a fresh process with empty caches.

    Args:
        source, revision: a folder, or a repository and its commit.
        code: "remote" for the checkpoint's own code, "local" for that of the installed package.
        auto_class: the Auto class that loads it.
        token: for a private repository. The process has no other secret of this machine.
        onnx_files: ONNX files whose outputs are added, under their names, and the FLOAT32 outputs of the model.

    Raises:
        UserError: it does not load there; with the last line of that process.
    """
    limits = f"{inspect.getsource(network.limit_requests)}\nlimit_requests{network.LIMITS}\n"
    with tempfile.TemporaryDirectory() as home:
        environment = environment_without_secrets().items()
        variables = {name: value for name, value in environment if name not in CACHE_VARIABLES}
        variables |= {"HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": token or ""}
        variables |= {} if revision else {"HF_HUB_OFFLINE": "1"}
        arguments = [source, revision, auto_class, f"{home}/outputs", code, *(onnx_files or [])]
        command = [sys.executable, "-c", limits + FRESH_PROCESS, *arguments]
        options: dict = {"cwd": home, "env": variables, "capture_output": True, "text": True}
        try:
            result = subprocess.run(command, timeout=PROCESS_SECONDS, **options)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{source} does not load within {PROCESS_SECONDS} seconds in a fresh process") from error
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
            raise UserError(f"{source} does not load in a fresh process: {reason}")
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
        UserError: the folder's own code, the installed package and the ONNX files compute different outputs, or they
            are not finite.
    """
    onnx_files = [name for name in ONNX_FILES if (folder / name).is_file()]
    with ThreadPoolExecutor() as pool, network.announced("two fresh processes that load the folder"):
        source, auto_class = str(folder.resolve()), auto_class_of(folder)
        own = pool.submit(fresh_outputs, source, "", "remote", auto_class, onnx_files=onnx_files)
        installed = pool.submit(fresh_outputs, source, "", "local", auto_class).result()
        own = own.result()
    if names := [name for name, output in own.items() if not output.isfinite().all()]:
        raise UserError(f"{folder}: expected finite outputs, got NaN or infinity in {', '.join(names)}")
    if names := differences({name: own[name] for name in own if name not in (FLOAT32, *ONNX_FILES)}, installed):
        raise UserError(f"{folder}: its code and the installed package compute different {', '.join(names)}")
    name, expected = ONNX_FILES[0], own.get(FLOAT32)
    if name in own and (own[name] - expected).abs().max() > 1e-3 * expected.abs().max().clamp(min=1):
        raise UserError(f"{folder / name} does not compute what the weights compute: export it again, or delete it")
    return own
