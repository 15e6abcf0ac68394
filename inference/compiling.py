"""Faster inference: a network compiled ahead of time, with its weights rearranged for the processor.

    fast = compile_inference(model, "vit.pt2")
    logits = fast(pixel_values).logits  # batches of any size

What it does by itself is `torch.export` and AOTInductor with frozen weights. That takes oneDNN's matrix products with
bias, activation and residual in them, where eager PyTorch and `torch.compile` of a float32 network take MKL's.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..configuration_vit_simple import pair


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose blocks multiply in int8: weights scaled by output channel, their inputs by token as they come.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError(f"int8: expected torchao to be installed (pip install torchao), got: {error}") from error
    model = copy.deepcopy(model)
    quantize_(model.blocks, Int8DynamicActivationInt8WeightConfig())
    return model


@torch.no_grad()
def compile_inference(model: PreTrainedModel, path: str | Path, int8: bool = False) -> Callable[..., ModelOutput]:
    """Compiles a network into a file and opens it; takes about half a minute and a C++ compiler.

    `torch._inductor.aoti_load_package(path)` opens the file later, on a processor or GPU of the same kind and after
    `import transformers.modeling_outputs`.

    Args:
        model: a ViTSimple network, left as it is; what it computes in evaluation, on its own device and in its own
            dtype, in which it then takes `pixel_values`, too.
        path: of the file to write, ending in .pt2.
        int8: multiply in int8, see `quantize`; on a CPU.

    Returns:
        A function of `pixel_values` (B, C, H, W), of the network's own image size and any B, to what the network gives.

    Raises:
        ImportError: `int8` without torchao.
        ValueError: a path that does not end in .pt2, or int8 elsewhere than on a CPU.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path: expected one that ends in .pt2, got {path}")
    if int8 and model.device.type != "cpu":
        raise ValueError(f"int8: expected a network on the CPU, got one on {model.device}: bfloat16 serves there")
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
