"""How learned positions are resampled for other image sizes: in the code of each source, and on conversion."""

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..modeling_vit_simple import resample_positions
from .state_dict import Tensors

FIELDS = ("interpolate_antialias", "interpolate_offset")
ANTIALIASED = {"interpolate_antialias": True, "interpolate_offset": 0.0}
PLAIN = {"interpolate_antialias": False, "interpolate_offset": 0.0}
OFFSET = {"interpolate_antialias": False, "interpolate_offset": 0.1}
RESAMPLING = {  # all are bicubic
    "timm": ANTIALIASED,  # timm/layers/pos_embed.py, resample_abs_pos_embed
    # The model types of transformers, interpolate_pos_encoding of their embeddings
    **dict.fromkeys(("vit", "vit_mae", "clip", "clip_vision_model", "dinov2"), PLAIN),
    "dinov2_with_registers": ANTIALIASED,
    # The original repositories
    "facebookresearch/deit": PLAIN,  # main.py, line 302
    "facebookresearch/mae": PLAIN,  # util/pos_embed.py, line 92
    "facebookresearch/dino": OFFSET,  # vision_transformer.py, lines 186 to 191
    "facebookresearch/dinov2": OFFSET,  # dinov2/hub/backbones.py, lines 27 and 28
    "facebookresearch/dinov2 with registers": ANTIALIASED,  # the same, lines 107 and 108
}
# The repository of a family whose files have the keys of timm. JAX and open_clip, where the others come from, have not.
REPOSITORIES = {"deit": "deit", "deit3": "deit", "mae": "mae", "dino": "dino", "dinov2": "dinov2"}


def source_of_timm_keys(family: str | None, is_pickle: bool, prefix: str, has_registers: bool) -> str:
    """Where a file with timm's keys and without a config comes from, "timm" or a repository.

    timm itself saves under `state_dict`, and safetensors are newer than the repositories.
    """
    if family not in REPOSITORIES or not is_pickle or "state_dict" in prefix:
        return "timm"
    has_registers = has_registers and family == "dinov2"
    return f"facebookresearch/{REPOSITORIES[family]}" + (" with registers" if has_registers else "")


def keep_resampling(config: ViTSimpleConfig, target: str, report: list[str]) -> dict:
    """The fields to add to a config of "timm" or of a model type of transformers that resamples positions otherwise.

    These libraries ignore the fields, but a conversion back reads them. The report gets a line.
    """
    theirs, ours = RESAMPLING[target], {name: getattr(config, name) for name in FIELDS}
    if ours == theirs:
        return {}
    line = f"{target} resamples positions for other image sizes with {joined(theirs)}; this model has {joined(ours)}"
    report.append(line)
    return ours


def joined(fields: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def with_positions_of_image_size(
    config: ViTSimpleConfig, tensors: Tensors, report: list[str]
) -> tuple[ViTSimpleConfig, Tensors]:
    """The same model with positions that are stored for its image size, as other libraries require."""
    if config.position_grid_size != config.grid_size:
        report.append(f"resampled the positions from {config.position_grid_size} to {config.grid_size} patches")
        tensors = tensors | {"pos_embed": resample_positions(tensors["pos_embed"], config, config.grid_size)}
    return ViTSimpleConfig.from_dict(config.to_dict(), image_size=config.image_size), tensors


def with_image_size(config: ViTSimpleConfig, size: tuple[int, int], report: list[str]) -> ViTSimpleConfig:
    """The same model for images of another size, if patches divide it: with the positions as they are stored."""
    if size == pair(config.image_size) or any(side % patch for side, patch in zip(size, pair(config.patch_size))):
        return config
    height, width = size
    report.append(
        f"images have {size} pixels, as the image processor makes them; positions stay stored for "
        f"{pair(config.image_size)} pixels and are resampled when the model runs"
    )
    sizes = {"image_size": height if height == width else size, "pretrain_image_size": config.image_size}
    return ViTSimpleConfig.from_dict(config.to_dict() | sizes)
