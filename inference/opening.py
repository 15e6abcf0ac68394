"""Opens a checkpoint for inference: its model, its image processor and its record."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..configuration_vit_simple import ViTSimpleConfig
from ..data.processors import open_processor
from ..files import PREPROCESSOR, RECORD, RunError, UserError, has_head, read_json, refuse_adapter
from ..modeling_vit_simple import ViTSimpleForImageClassification, ViTSimpleModel


def open_model(
    path: str | Path, any_channels: bool = False, **options: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model of a checkpoint (a folder or a Hub id), a classifier if it has a head, and its image processor.

    The model is in float32 and in evaluation mode. Its code is that of this package: no code of the checkpoint runs.

    Args:
        any_channels: also open a model of other images than RGB.
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be read, lacks weights, is an adapter or of another model type, or takes no RGB images.
    """
    refuse_adapter(Path(path))
    try:
        content = PretrainedConfig.get_config_dict(path)[0]
        if content.get("model_type") != ViTSimpleConfig.model_type:
            raise UserError(
                f"expected the model type vit_simple, got {content.get('model_type')}; convert_checkpoint.py converts "
                "checkpoints of timm and transformers"
            )
        model_class = ViTSimpleForImageClassification if has_head(content) else ViTSimpleModel
        model, found = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
        processor = json.loads(Path(cached_file(path, PREPROCESSOR)).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:  # the config raises ValueError
        is_hub_id = not isinstance(error.__cause__, HFValidationError)
        reason = error if is_hub_id else "it is neither a folder nor a Hub id"
        raise UserError(f"the model {path} cannot be read: {reason}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"the model {path} cannot be read: it lacks {len(missing)} weights, such as {missing[0]}")
    if model.config.num_channels != 3 and not any_channels:
        raise UserError(f"expected a model of RGB images, got one of {model.config.num_channels} channels")
    return model.eval(), open_processor(processor)


def open_record(path: str, fields: dict) -> dict:
    """How the checkpoint was made, {} if it does not say so.

    Args:
        fields: the types of the fields that are used, see `check_types`.

    Raises:
        UserError: it is not a JSON object, or a field has another type.
        RunError: the Hub does not answer, and no earlier download noted whether the checkpoint has a record.
    """
    if Path(path).is_dir():
        return read_json(Path(path) / RECORD, fields)
    try:
        file = hf_hub_download(path, RECORD)
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but the Hub did not answer
        if try_to_load_from_cache(path, RECORD) is _CACHED_NO_EXIST:
            return {}
        raise RunError(
            f"the Hub does not answer, and {RECORD} of {path}, which may change its predictions, is not in the cache: "
            "try again with a connection"
        ) from error
    except EntryNotFoundError:
        return {}
    return read_json(Path(file), fields)


def trained_bit_depth(path: str) -> int | None:
    """The bits of the gray images that a checkpoint was trained on, None if it does not say so.

    Raises:
        UserError, RunError: see `open_record`.
    """
    return (open_record(path, {"dataset": {"bit_depth": int | None}}).get("dataset") or {}).get("bit_depth")


def hash_weights(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
