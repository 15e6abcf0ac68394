"""ViTSimple: a plain Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) that reads from top to bottom.

Letters in the shape comments: B batch, C num_channels, H W image height and width in pixels, P patch size, N patches =
(H/P)(W/P), T tokens = prefix (class token, registers) + N, D hidden_size, h heads, d = D/h, K num_labels.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

from .configuration_vit_simple import ViTSimpleConfig, pair

logger = logging.get_logger(__name__)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        patch_size = pair(config.patch_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size, bias=not config.pre_norm)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)  # (B, D, H/P, W/P) -> (B, N, D)


def sincos2d(rows: int, columns: int, dim: int, device: torch.device) -> torch.Tensor:
    """Fixed positions of a grid, (1, rows * columns, dim): sine and cosine of x, then of y (arXiv:2205.01580)."""
    frequency = 10_000 ** -torch.linspace(0, 1, dim // 4, device=device)
    y = torch.arange(rows, device=device)[:, None, None] * frequency  # (rows, 1, dim/4)
    x = torch.arange(columns, device=device)[None, :, None] * frequency  # (1, columns, dim/4)
    waves = [wave.expand(rows, columns, -1) for wave in (x.sin(), x.cos(), y.sin(), y.cos())]
    return torch.cat(waves, dim=-1).view(1, rows * columns, dim)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, with the signature of `ALL_ATTENTION_FUNCTIONS`; images have no mask."""
    weights = (query * scaling) @ key.transpose(-2, -1)  # (B, h, T, d) x (B, h, d, T) -> (B, h, T, T)
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    x = F.dropout(weights, dropout, module.training) @ value  # (B, h, T, T) x (B, h, T, d) -> (B, h, T, d)
    return x.transpose(1, 2), weights  # (B, T, h, d), (B, h, T, T)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv:1706.03762, section 3.2): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.config = config
        self.is_causal = False  # for the functions in ALL_ATTENTION_FUNCTIONS
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, num_queries: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        (B, T, D), h = x.shape, self.num_heads
        qkv = self.qkv(x).chunk(3, dim=-1)  # 3 x (B, T, D)
        query, key, value = (each.view(B, T, h, D // h).transpose(1, 2) for each in qkv)  # 3 x (B, h, T, d)
        query = query[:, :, :num_queries]  # all tokens, or the class token alone: see ViTSimpleModel._encode
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        x, weights = attend(self, query, key, value, None, scaling=(D // h) ** -0.5, dropout=dropout)
        return self.dropout(self.proj(x.flatten(2))), weights  # (B, T, h, d) -> (B, T, D)


class Mlp(nn.Module):
    """Two linear layers with an activation between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.is_gated = config.mlp == "swiglu"  # fc1 also computes a gate (arXiv:2002.05202, section 2)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size * (2 if self.is_gated else 1))
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            gate, x = self.fc1(x).chunk(2, dim=-1)
            return self.dropout(self.fc2(self.act(gate) * x))
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (arXiv:2103.17239, section 2)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a branch for random samples during training, with probability `rate` (arXiv:1603.09382, section 3)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(GradientCheckpointingLayer):
    """Attention, then MLP, each after a LayerNorm and with a residual around both: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTSimpleConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layerscale_value is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config) if config.layerscale_value is not None else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor, num_queries: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attn(self.norm1(x), num_queries)
        x = x[:, :num_queries] + self.drop_path(self.ls1(attended))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x, weights


class ViTSimplePreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the model, and the one place where weights are initialized."""

    config_class = ViTSimpleConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean, so Trainer divides it by the gradient accumulation steps
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # otherwise transformers searches the source of this file, differently in each version

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue  # was loaded: transformers 4.57 calls this if any parameter of the module is missing
            if name == "bias":
                nn.init.zeros_(parameter)
            elif name == "gamma":
                nn.init.constant_(parameter, self.config.layerscale_value)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(parameter)
            elif module is getattr(self, "head", None) and self.config.head_init_std is not None:
                nn.init.normal_(parameter, std=self.config.head_init_std)
            else:
                nn.init.trunc_normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, config=None, **kwargs):
        """As in transformers, but `image_size`, `patch_size`, `num_channels` and the labels may be other than stored.

        The labels are `num_labels`, `id2label` or `label2id`; another number of them gets a new head.
        """
        return load_resized(super().from_pretrained, pretrained_model_name_or_path, config, kwargs)


class ViTSimpleModel(ViTSimplePreTrainedModel):
    """The backbone: an image to its tokens and to one pooled vector."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # the backbone opens a classifier's file, too

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        config.check()
        D, depth = config.hidden_size, config.num_hidden_layers
        rows, columns = config.position_grid_size
        registers, positions = config.num_register_tokens, config.num_prefix_positions + rows * columns
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if config.use_class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, D)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, positions, D)) if config.position_embedding == "learned" else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm_pre = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.Identity() if config.fc_norm else nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.fc_norm = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.fc_norm else nn.Identity()
        self.post_init()

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position of every token for a patch grid, (1, T, D); zero for prefix tokens that have none."""
        config, weight = self.config, self.patch_embed.proj.weight
        if config.position_embedding == "learned":
            positions = resample_positions(self.pos_embed, config, (rows, columns))
        else:
            positions = sincos2d(rows, columns, config.hidden_size, weight.device).to(weight.dtype)
        return F.pad(positions, (0, 0, config.num_prefix_tokens + rows * columns - positions.shape[1], 0))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tokens that enter the blocks: (B, C, H, W) -> (B, T, D)."""
        B, _, H, W = pixel_values.shape
        patch_height, patch_width = pair(self.config.patch_size)
        prefix = [token.expand(B, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, self.patch_embed(pixel_values)], dim=1)  # (B, prefix, D), (B, N, D) -> (B, T, D)
        return self.norm_pre(self.dropout(x + self.positions(H // patch_height, W // patch_width)))

    def _encode(self, pixel_values, any_size, output_attentions, output_hidden_states, for_head=False):
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError('output_attentions: expected a model loaded with attn_implementation="eager"')
        self.check_pixels(pixel_values, any_size)

        x = self.embed(pixel_values.to(self.patch_embed.proj.weight.dtype))  # (B, T, D)
        hidden_states = (x,) if output_hidden_states else None
        attentions = () if output_attentions else None
        # A head that reads the class token needs no other token after the last attention: 6 % fewer operations.
        class_token_only = for_head and config.pooling == "cls" and not (output_attentions or output_hidden_states)
        for block in self.blocks:
            x, weights = block(x, 1 if class_token_only and block is self.blocks[-1] else None)
            hidden_states = hidden_states + (x,) if output_hidden_states else None
            attentions = attentions + (weights,) if output_attentions else None
        x = self.norm(x)
        pooled = x[:, 0] if config.pooling == "cls" else x[:, config.num_prefix_tokens :].mean(dim=1)  # (B, D)
        return BaseModelOutputWithPooling(x, self.fc_norm(pooled), hidden_states, attentions)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        return_dict: bool | None = None,  # used by can_return_tuple, which sees keywords only
    ) -> BaseModelOutputWithPooling | tuple:
        """Computes `last_hidden_state` (B, T, D), normalized unless `fc_norm`, and `pooler_output` (B, D).

        Args:
            pixel_values: (B, C, H, W), normalized, floating point; cast to the dtype of the weights.
            interpolate_pos_encoding: accept any height and width that are multiples of the patch size.
            output_attentions: add the attention weights of each block, (B, h, T, T); needs eager attention.
            output_hidden_states: add the input of the first block and the output of each, (B, T, D).
        """
        return self._encode(pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states)

    def check_pixels(self, pixel_values: torch.Tensor, any_size: bool):
        """Raises ValueError for pixels that cannot work. It reads shapes only, so it costs a compiled model nothing."""
        channels, size, patch = self.config.num_channels, pair(self.config.image_size), pair(self.config.patch_size)
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or not pixel_values.is_floating_point():
            expected = f"floating-point pixels of shape (batch, {channels}, height, width) from AutoImageProcessor"
            raise ValueError(f"pixel_values: expected {expected}, got {pixel_values.dtype} of shape {shape}")
        fits = all(side and side % p == 0 for side, p in zip(shape[2:], patch)) if any_size else shape[2:] == size
        if not fits:
            expected = f"in multiples of {patch}" if any_size else f"{size}, or interpolate_pos_encoding=True"
            raise ValueError(f"pixel_values: expected height and width {expected}, got {shape[2:]}")


LOSSES = {  # of float labels, by problem_type; integer labels are classes, for cross-entropy
    "single_label_classification": F.cross_entropy,  # labels are probabilities, as mixup makes them
    "multi_label_classification": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


# It inherits from the backbone: so its keys are timm's, without a prefix, and one file serves both classes.
class ViTSimpleForImageClassification(ViTSimpleModel):
    """The backbone and one linear layer on its pooled vector."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        return_dict: bool | None = None,  # used by can_return_tuple, which sees keywords only
    ) -> ImageClassifierOutput | tuple:
        """Computes `logits` (B, K) and, given labels, the mean `loss`; the other arguments are the backbone's."""
        features = self._encode(pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states, True)
        logits = self.head(features.pooler_output)  # (B, K)
        loss = None if labels is None else self.compute_loss(logits, labels)
        return ImageClassifierOutput(loss, logits, features.hidden_states, features.attentions)

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, K), in float32, for integer labels (B,) or float labels (B, K), see `LOSSES`."""
        (B, K), problem_type = logits.shape, self.config.problem_type
        if labels.dtype == torch.int64 and problem_type in (None, "single_label_classification") and K > 1:
            expected, loss = (B,), F.cross_entropy
        elif labels.is_floating_point() and problem_type:
            expected, loss, labels = (B, K), LOSSES[problem_type], labels.float()
            if problem_type == "regression" and K == 1 and labels.dim() == 1:
                labels = labels[:, None]
        else:
            wanted = f"torch.int64 classes (at least 2), or float labels and config.problem_type one of {list(LOSSES)}"
            raise ValueError(f"labels: expected {wanted}, got {labels.dtype}, {problem_type=} and num_labels={K}")
        if labels.shape != expected:
            raise ValueError(f"labels: expected shape {expected}, got {tuple(labels.shape)}")
        return loss(logits.float(), labels)


class ViTSimpleBackbone(ViTSimpleModel):
    """The tokens after some blocks as feature maps, for AutoBackbone and the models of dense tasks that use it."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        self.out_features = list(config.out_features or [config.stage_names[i] for i in config.out_indices or [-1]])
        self.out_indices = [config.stage_names.index(name) for name in self.out_features]
        self.channels = [config.hidden_size] * len(self.out_features)

    def forward(self, pixel_values: torch.Tensor, output_attentions=None, output_hidden_states=None) -> BackboneOutput:
        """Computes `feature_maps`, normalized unless `fc_norm`, of images of any size; partial patches are cut off."""
        config, patch, prefix = self.config, pair(self.config.patch_size), self.config.num_prefix_tokens
        rows, columns = (side // p for side, p in zip(pixel_values.shape[-2:], patch))
        output = self._encode(pixel_values[..., : rows * patch[0], : columns * patch[1]], True, output_attentions, True)
        tokens = [self.norm(output.hidden_states[index]) for index in self.out_indices]  # (B, T, D)
        maps = [x[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns)) for x in tokens]  # (B, D, H/P, W/P)
        if not config.reshape_hidden_states:  # (B, 1 + N, D), as in DPT; a mean stands in for a missing class token
            first = slice(1) if config.use_class_token else slice(prefix, None)
            maps = [torch.cat([x[:, first].mean(1, keepdim=True), x[:, prefix:]], dim=1) for x in tokens]
        hidden_states = output.hidden_states if output_hidden_states or config.output_hidden_states else None
        return BackboneOutput(tuple(maps), hidden_states, output.attentions)

    def forward_with_filtered_kwargs(self, pixel_values, output_attentions=None, output_hidden_states=None, **ignored):
        return self(pixel_values, output_attentions, output_hidden_states)  # DPT and UperNet call this


# Loading at another size
RESIZABLE_FIELDS = ("image_size", "pretrain_image_size", "patch_size", "num_channels", "id2label", "label2id")


def load_resized(load, path, config, kwargs):
    """Loads a checkpoint at its own size with `load`, transformers' from_pretrained, and resizes it as asked."""
    if path is None:  # the weights come as a state dict
        return load(None, config=config, **kwargs)
    stored = ViTSimpleConfig.from_dict(ViTSimpleConfig.get_config_dict(path, **kwargs)[0])
    if config is None:
        overrides = {name: kwargs.pop(name) for name in ("num_labels", *RESIZABLE_FIELDS) if name in kwargs}
        target = ViTSimpleConfig.from_dict(stored.to_dict(), **overrides)
    else:
        target = config if isinstance(config, PretrainedConfig) else ViTSimpleConfig.from_pretrained(config)
        config = copy.deepcopy(target)
        config.update({name: getattr(stored, name) for name in RESIZABLE_FIELDS})
    target.check()
    adapter = dict(kwargs.pop("adapter_kwargs", None) or {})  # of PEFT, from the Auto classes
    loaded = load(path, config=config, **kwargs)
    resize(model := loaded[0] if isinstance(loaded, tuple) else loaded, target)  # a tuple with output_loading_info
    if "_adapter_model_path" in adapter:  # its head fits the new labels only
        model.load_adapter(adapter.pop("_adapter_model_path"), adapter_kwargs=adapter)
    return loaded


@torch.no_grad()
def resize(model: ViTSimplePreTrainedModel, target: ViTSimpleConfig):
    """Gives a model the image size, patch size, channels and labels of `target`, and logs what changed."""
    config, proj, head, changes = model.config, model.patch_embed.proj, getattr(model, "head", None), []
    patch_size, channels, grid = pair(target.patch_size), target.num_channels, target.position_grid_size
    if patch_size != pair(config.patch_size) or channels != config.num_channels:
        proj.weight = nn.Parameter(resample_kernel(proj.weight, patch_size, channels))
        proj.kernel_size, proj.stride, proj.in_channels = patch_size, patch_size, channels
        changes.append(f"patches {config.num_channels} x {config.patch_size} to {channels} x {target.patch_size}")
    if model.pos_embed is not None and grid != config.position_grid_size:
        model.pos_embed = nn.Parameter(resample_positions(model.pos_embed, config, grid))
        changes.append(f"positions {config.position_grid_size} to {grid}")
    if head is not None and target.num_labels != config.num_labels:
        head.weight = nn.Parameter(head.weight.new_empty(target.num_labels, config.hidden_size))
        head.bias, head.out_features = nn.Parameter(head.bias.new_empty(target.num_labels)), target.num_labels
        model._init_weights(head)
        changes.append(f"a new head for {target.num_labels} labels instead of {config.num_labels}")
    config.update({name: getattr(target, name) for name in RESIZABLE_FIELDS})
    if changes and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("from_pretrained: offloaded weights cannot be resized, load them without device_map")
    if changes:
        logger.warning(f"{model.name_or_path} was resized: {', '.join(changes)}")


def resample_positions(pos_embed: torch.Tensor, config: ViTSimpleConfig, grid: tuple[int, int]) -> torch.Tensor:
    """The learned positions (1, prefix + N, D) of a config for another patch grid: bicubic, in float32."""
    rows, columns = config.position_grid_size
    if grid == (rows, columns):
        return pos_embed
    prefix, patches = pos_embed.split([config.num_prefix_positions, rows * columns], dim=1)
    patches = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).float()  # (1, N, D) -> (1, D, H/P, W/P)
    offset = config.interpolate_offset
    size = {"scale_factor": ((grid[0] + offset) / rows, (grid[1] + offset) / columns)} if offset else {"size": grid}
    patches = F.interpolate(patches, mode="bicubic", antialias=config.interpolate_antialias, **size)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resample_kernel(kernel: torch.Tensor, patch_size: tuple[int, int], channels: int) -> torch.Tensor:
    """Patch projection weights (D, C, P, P) for another patch size and other channels.

    A resized image keeps its tokens as nearly as possible, by the pseudo-inverse of the resizing (FlexiViT,
    arXiv:2212.08013, section 3.4). One channel gets the sum of all; others repeat them, scaled to the same total.
    """
    old_channels, old_size, dtype = kernel.shape[1], kernel.shape[2:], kernel.dtype
    if old_size != patch_size:
        basis = torch.eye(old_size.numel(), device=kernel.device).view(-1, 1, *old_size)
        resize_matrix = F.interpolate(basis, patch_size, mode="bicubic", antialias=True).flatten(1)  # (old, new P*P)
        kernel = (kernel.float().flatten(2) @ torch.linalg.pinv(resize_matrix).T).unflatten(2, patch_size).to(dtype)
    if channels == 1 and old_channels > 1:
        kernel = kernel.sum(1, keepdim=True)
    elif channels != old_channels:
        kernel = kernel[:, torch.arange(channels) % old_channels] * (old_channels / channels)
    return kernel
