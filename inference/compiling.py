"""Faster inference: a model compiled ahead of time (AOT) into one file, optionally in int8.

    compiled = compile_inference(model, "vit.pt2")
    logits = compiled(pixel_values).logits  # batches of any size

It uses `torch.export` and AOTInductor with frozen weights. On a CPU the weights are packed for oneDNN, which fuses
matrix products with bias, activation and residual; eager PyTorch and `torch.compile` use MKL in float32.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..configuration_vit_simple import pair
from ..files import UserError

AOT_FILES = ("aot/model.pt2", "aot/model_bf16.pt2", "aot/model_int8.pt2")  # beside a checkpoint, for this machine


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose blocks multiply in int8, with a scale for each output channel of the weights and each input token.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError(f"int8 needs torchao (pip install torchao): {error}") from error
    model = copy.deepcopy(model)
    quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig())
    return model


@torch.no_grad()
def compile_inference(model: PreTrainedModel, path: str | Path, int8: bool = False) -> Callable[..., ModelOutput]:
    """Compiles a model into a file and loads it. Needs a C++ compiler and takes about half a minute.

    To load the file later, on the same kind of processor or GPU, import transformers.modeling_outputs and call
    `torch._inductor.aoti_load_package(path)`.

    Args:
        model: a ViTSimple model, not changed. It is compiled in evaluation mode for its device and its dtype.
        path: the file to write, ending in .pt2.
        int8: multiply in int8 (see `quantize`); on a CPU only.

    Returns:
        The compiled model: `pixel_values` (B, C, H, W), with any B, the model's image size and dtype, to its output.

    Raises:
        ImportError: int8 without torchao.
        UserError: the path does not end in .pt2, or int8 on another device than the CPU.
    """
    if Path(path).suffix != ".pt2":
        raise UserError(f"path: expected a file name that ends in .pt2, got {path}")
    if int8 and model.device.type != "cpu":
        raise UserError(f"int8: expected a model on the CPU, got one on {model.device}; use bfloat16 there")
    modes = [(module, module.training) for module in model.modules()]
    shape = (2, model.config.num_channels, *pair(model.config.image_size))
    example = torch.zeros(shape, device=model.device, dtype=model.dtype)
    batch = torch.export.Dim("batch", min=1)
    try:
        model.eval()
        program = torch.export.export(quantize(model) if int8 else model, (example,), dynamic_shapes=({0: batch},))
    finally:
        for module, training in modes:
            module.training = training
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={"freezing": True})
    return torch._inductor.aoti_load_package(str(path))


def write_compiled(model: PreTrainedModel, folder: Path):
    """Writes model.pt2, model_bf16.pt2 and, on a CPU with torchao, model_int8.pt2 into a folder."""
    names = [Path(name).name for name in AOT_FILES]
    compile_inference(model, folder / names[0])
    compile_inference(copy.deepcopy(model).to(torch.bfloat16), folder / names[1])
    if importlib.util.find_spec("torchao") is not None:
        compile_inference(model, folder / names[2], int8=True)
    else:
        print("int8 is left out; it needs torchao: pip install torchao")


def open_compiled(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A file of `write_compiled` as a function of pixels (B, C, H, W) to logits or, without a head, pooled vectors."""
    compiled = torch._inductor.aoti_load_package(str(path))
    dtype = torch.bfloat16 if "bf16" in path.name else torch.float32

    def run(pixels: torch.Tensor) -> torch.Tensor:
        output = compiled(pixels.to(dtype))
        return output["logits"] if "logits" in output else output["pooler_output"]

    return run
