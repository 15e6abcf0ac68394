"""Options for fine-tuning pretrained weights, chosen where the user gives neither them nor a recipe.

Sources: layer decay, warmup and a cosine schedule from BEiT (Bao et al., 2021, arXiv:2106.08254) and MAE (He et al.,
2021, arXiv:2111.06377, appendix A.1); a length that depends on the number of images from BiT (Kolesnikov et al., 2019,
arXiv:1912.11370, section 3.3); a learning rate that grows with the square root of the batch, as suits Adam (Malladi et
al., 2022, arXiv:2205.10287). For LoRA, one learning rate for all layers, as in its paper (Hu et al., 2021,
arXiv:2106.09685, appendix D), about ten times that of full fine-tuning (Biderman et al., 2024, arXiv:2405.09673).
recipes/fine_tune.yaml and docs/fine_tuning.md say what was measured.
"""

import math
from dataclasses import replace
from typing import Any

from ..data.loading import ImageData
from .config import TrainConfig, convert
from .folder import choose_folder, stored_recipe


def fine_tuning_options(
    images: int,
    width: int,
    batches_per_step: int = 1,
    batch_size: int | None = None,
    head_only: bool = False,
    lora: bool = False,
) -> dict[str, int | float]:
    """The options that suit a number of training images and a model.

    Args:
        width: hidden_size of the model.
        batches_per_step: processes times gradient accumulation steps.
        batch_size: of one process, if the user gives it.
        head_only: the backbone is frozen; crops are off, so that its features can be kept.
        lora: low-rank additions are trained, at ten times the learning rate of full fine-tuning.
    """
    if batch_size is None:
        per_step = min(2 ** round(math.log2(math.sqrt(images))), images // 4, 128)
        batch_size = max(1, per_step // batches_per_step)
    learning_rate = 1.5e-4 * math.sqrt(batch_size * batches_per_step / 16) * math.sqrt(384 / width)
    if head_only or lora:
        learning_rate *= 10
    return {
        "num_train_epochs": 100 if head_only else min(max(round(300 / math.sqrt(images)), 5), 50),
        "per_device_train_batch_size": batch_size,
        "learning_rate": float(f"{learning_rate:.2g}"),
        "layer_decay": 1.0 if head_only or lora else 0.65,
        "random_resized_crop": 0.0 if head_only else 0.6,
        "horizontal_flip": 0.0,  # a mirrored digit, letter or hand sign has another meaning, or none
    }


def with_fine_tuning_defaults(config: TrainConfig, data: ImageData, width: int, num_processes: int) -> TrainConfig:
    """The options with a value for each that the user left undecided; a resumed run takes those that it began with.

    A new run reports them, as the options that repeat it.
    """
    names = config.undecided
    if not names:
        return config
    if stored := stored_recipe(choose_folder(config)) if config.resume_from_checkpoint else {}:
        return replace(config, **{name: convert(name, stored[name]) for name in names})
    chosen: dict[str, Any] = fine_tuning_options(
        data.sizes["train"],
        width,
        num_processes * config.gradient_accumulation_steps,
        config.per_device_train_batch_size,
        config.freeze_backbone,
        config.lora_rank is not None,
    )
    if data.array_shape is not None or config.resize == "fit":
        chosen["random_resized_crop"] = 0.0
    chosen = {name: chosen[name] for name in names}
    unused = "num_train_epochs" if config.max_steps is not None else None
    if options := " ".join(f"--{name} {value:g}" for name, value in chosen.items() if name != unused):
        data.report.append(f"defaults for fine-tuning on {data.sizes['train']} images: {options}")
    return replace(config, **chosen)
