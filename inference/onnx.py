"""ONNX files of a model, for onnxruntime and transformers.js: in float32, float16 and int8.

Each file takes `pixel_values` (B, C, H, W) in float32, with any B, and gives `logits`, or without a head
`last_hidden_state` and `pooler_output`, in float32.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_vit_simple import pair
from ..files import ONNX_FILES, RunError, UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less the graph


def require_onnx():
    """Raises UserError, with the command that installs them, if the packages for ONNX are missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Outputs(nn.Module):
    """A model whose outputs are a tuple in the order of `output_names`."""

    def __init__(self, model: PreTrainedModel, any_size: bool):
        super().__init__()
        self.model, self.any_size = model, any_size

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, interpolate_pos_encoding=self.any_size)
        return (*(output[name] for name in main_outputs(self.model)), *(output.attentions or ()))


def main_outputs(model: PreTrainedModel) -> tuple[str, ...]:
    return ("logits",) if hasattr(model, "head") else ("last_hidden_state", "pooler_output")


def output_names(model: PreTrainedModel) -> list[str]:
    """The outputs of the ONNX file: the last ones are the attention weights of each block, (B, h, T, T)."""
    layers = range(model.config.num_hidden_layers if model.config.output_attentions else 0)
    return [*main_outputs(model), *(f"attentions.{layer}" for layer in layers)]


@contextlib.contextmanager
def quiet_exporter():
    """Hides what torch.onnx says about packages that are not needed and about its own future."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


@torch.no_grad()
def write_onnx(model: PreTrainedModel, folder: Path, dynamic_size: bool = False):
    """Writes model.onnx, model_fp16.onnx and model_quantized.onnx into a folder.

    Args:
        model: a ViTSimple model in float32, in evaluation mode. With `config.output_attentions`, the files also give
            the attention weights.
        dynamic_size: accept any height and width that are multiples of the patch size.

    Raises:
        UserError: a package is missing, or the model is too large for one file.
    """
    require_onnx()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > MAX_BYTES:
        raise UserError(
            f"--to onnx: expected a model below 2 GB, the limit of one ONNX file, got {size / 1e9:.2f} GB of weights; "
            "--to aot has no such limit"
        )
    config, patch_size = model.config, pair(model.config.patch_size)
    shapes, sides = {0: torch.export.Dim("batch", min=1)}, pair(config.image_size)
    if dynamic_size:  # traced at another size, or the positions would not be resampled
        rows, columns = (torch.export.Dim(name, min=1) for name in ("rows", "columns"))
        shapes |= {2: patch_size[0] * rows, 3: patch_size[1] * columns}
        sides = (config.grid_size[0] + 1) * patch_size[0], (config.grid_size[1] + 2) * patch_size[1]
    example = torch.zeros(2, config.num_channels, *sides)
    with quiet_exporter():
        program = torch.onnx.export(
            Outputs(model, dynamic_size),
            (example,),
            input_names=["pixel_values"],
            output_names=output_names(model),
            dynamic_shapes=(shapes,),
            dynamo=True,
            verbose=False,
        )
        save_smaller(program.model_proto, folder)


def save_smaller(exported, folder: Path):
    """Saves an ONNX model in float32, float16 and int8, without what the exporter noted about this machine."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for part in (exported, exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.input):
        del part.metadata_props[:]  # stack traces with paths
    path, half, quantized = (folder / Path(name).name for name in ONNX_FILES)
    onnx.save_model(exported, path)
    # Weights as unsigned int8 give the same result on every processor; signed ones overflow on AVX2 without VNNI.
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "weight_type": QuantType.QUInt8, "per_channel": True}
    quantize_dynamic(path, quantized, **options)
    onnx.save_model(convert_float_to_float16(exported, keep_io_types=True), half)


def open_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """An ONNX file as a function of pixels (B, C, H, W) to its logits or, without a head, to its pooled vectors.

    It uses as many threads as torch.

    Raises:
        RunError: this version of onnxruntime cannot read it.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise RunError(f"{path} cannot be opened: {error}") from error
    names = [output.name for output in session.get_outputs()]
    name = "logits" if "logits" in names else "pooler_output"
    return lambda pixels: torch.from_numpy(session.run([name], {"pixel_values": pixels.numpy()})[0])
