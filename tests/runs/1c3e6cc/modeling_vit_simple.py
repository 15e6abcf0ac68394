"""ViTSimple: a plain Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) that reads from top to bottom.

Letters in the shape comments: B batch, C num_channels, H W image height and width in pixels, P patch size, N patches =
(H/P)(W/P), T tokens = prefix (class token, registers) + N, D hidden_size, h heads, d = D/h, K num_labels; Q is T, or 1
in the last block of a classifier that pools the class token, since no other token counts behind that attention.
A checkpoint has timm's keys, and one file serves the backbone and the classifier.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_vit_simple import ViTSimpleConfig, label_maps, pair

logger = logging.get_logger(__name__)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
ADAPTED_FIELDS = ("image_size", "patch_size", "num_channels", "id2label", "label2id")  # of a loaded checkpoint


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        patch_size = pair(config.patch_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size, bias=not config.pre_norm)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)  # (B, D, H/P, W/P) -> (B, N, D)


def sincos2d(rows: int, columns: int, dim: int, device: torch.device) -> torch.Tensor:
    """Fixed positions of a grid, (1, rows * columns, dim) in float32: sine and cosine of x, then of y.

    "Better plain ViT baselines for ImageNet-1k", arXiv:2205.01580; the temperature is 10,000.
    """
    frequency = 10_000 ** -torch.linspace(0, 1, dim // 4, device=device)
    y = torch.arange(rows, device=device)[:, None, None] * frequency  # (rows, 1, dim/4)
    x = torch.arange(columns, device=device)[None, :, None] * frequency  # (1, columns, dim/4)
    parts = [part.expand(rows, columns, -1) for part in (x.sin(), x.cos(), y.sin(), y.cos())]
    return torch.cat(parts, dim=-1).view(1, rows * columns, dim)


def resample_positions(pos_embed: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Learned positions (1, prefix + N, D) for another patch grid: bicubic, antialiased, in float32."""
    if grid == new_grid:
        return pos_embed
    prefix, patches = pos_embed.split([pos_embed.shape[1] - grid[0] * grid[1], grid[0] * grid[1]], dim=1)
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).float()  # (1, N, D) -> (1, D, H/P, W/P)
    patches = F.interpolate(patches, new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resample_kernel(kernel: torch.Tensor, patch_size: tuple[int, int], channels: int) -> torch.Tensor:
    """A patch kernel (D, C, P, P) for another patch size and other channels.

    Tokens of a resized image stay what they were, as nearly as can be: the pseudo-inverse of the resizing (FlexiViT,
    arXiv:2212.08013, section 3.4). One channel gets the sum of all; others repeat them at an equal total.
    """
    old_channels, old_size, dtype = kernel.shape[1], kernel.shape[2:], kernel.dtype
    if old_size != patch_size:
        basis = torch.eye(old_size.numel(), device=kernel.device).view(-1, 1, *old_size)
        resize = F.interpolate(basis, patch_size, mode="bicubic", antialias=True).flatten(1)  # (old P*P, new P*P)
        flat = kernel.float().flatten(2) @ torch.linalg.pinv(resize).T
        kernel = flat.unflatten(2, patch_size).to(dtype)
    if channels == 1 and old_channels > 1:
        kernel = kernel.sum(1, keepdim=True)
    elif channels != old_channels:
        repeats = -(-channels // old_channels)
        kernel = kernel.repeat(1, repeats, 1, 1)[:, :channels] * (old_channels / channels)
    return kernel


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, with the signature of `ALL_ATTENTION_FUNCTIONS`; images have no mask."""
    weights = (query * scaling) @ key.transpose(-2, -1)  # (B, h, Q, d) x (B, h, d, T) -> (B, h, Q, T)
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    x = F.dropout(weights, dropout, module.training) @ value  # (B, h, Q, T) x (B, h, T, d) -> (B, h, Q, d)
    return x.transpose(1, 2), weights  # (B, Q, h, d), (B, h, Q, T)


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762, section 3.2) of the first Q tokens to all: (B, T, D) -> (B, Q, D)."""

    is_causal = False

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, Q: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        (B, T, D), h = x.shape, self.num_heads
        parts = self.qkv(x).chunk(3, dim=-1)  # 3 x (B, T, D)
        query, key, value = (part.view(B, T, h, D // h).transpose(1, 2) for part in parts)  # 3 x (B, h, T, d)
        query = query[:, :, :Q]
        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        x, weights = attend(self, query, key, value, None, scaling=(D // h) ** -0.5, dropout=dropout)
        return self.dropout(self.proj(x.reshape(B, Q or T, D))), weights


class Mlp(nn.Module):
    """Two linear layers with an activation between: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class SwiGlu(Mlp):
    """The first layer makes a gate, through the activation, and what it gates (arXiv:2002.05202, section 2)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.dropout(self.fc2(self.act(gate) * x))


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (arXiv:2103.17239, section 2)."""

    def __init__(self, config: ViTSimpleConfig):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a branch in training with probability `rate` (arXiv:1603.09382, section 3), drawn for each sample."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(GradientCheckpointingLayer):
    """Attention, then MLP, each with a LayerNorm before and a residual around it: (B, T, D) -> (B, Q, D)."""

    def __init__(self, config: ViTSimpleConfig, drop_path_rate: float):
        super().__init__()
        scaled = config.layerscale_value is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGlu(config) if config.mlp == "swiglu" else Mlp(config)
        self.ls2 = LayerScale(config) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: torch.Tensor, Q: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attn(self.norm1(x), Q)
        x = x[:, :Q] + self.drop_path(self.ls1(attended))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x, weights


class ViTSimplePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the network, and the one place where weights are initialised."""

    config_class = ViTSimpleConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean: Trainer itself divides it by the accumulation steps
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        config.check()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # otherwise transformers searches this file for spellings that its versions do not share

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As transformers' own, but `image_size`, `patch_size`, `num_channels` and the labels may be other ones.

        The checkpoint is loaded as it is and then adapted; a word in the log says how. Labels are `num_labels`, or
        `id2label` and `label2id`; the head is made anew only for another number of them.

        Raises:
            ValueError: values that cannot work, or weights that are offloaded, which cannot be adapted.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        if config is None:
            given = {name: kwargs.pop(name) for name in ("num_labels", *ADAPTED_FIELDS) if name in kwargs}
            wanted = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub, **label_maps(given, stored))
        else:
            wanted = config if isinstance(config, PretrainedConfig) else cls.config_class.from_pretrained(config)
            config = copy.deepcopy(wanted)
            for name in ADAPTED_FIELDS:
                setattr(config, name, getattr(stored, name))
        wanted.check()
        adapter_kwargs = {**(kwargs.pop("adapter_kwargs", None) or {})}
        adapter = adapter_kwargs.pop("_adapter_model_path", None)  # of PEFT: its head fits only what is adapted
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # beside it, what output_loading_info asks for
        done = model.adapt(wanted)
        if done:
            logger.warning(f"{pretrained_model_name_or_path} was adapted: {', '.join(done)}")
        if adapter is not None and not model._hf_peft_config_loaded:
            model.load_adapter(adapter, adapter_kwargs=adapter_kwargs)
        return loaded

    @torch.no_grad()
    def adapt(self, wanted: ViTSimpleConfig) -> list[str]:
        """Gives the network the image size, patch size, channels and labels of another config; says what it did."""
        config, proj, head, done = self.config, self.patch_embed.proj, getattr(self, "head", None), []
        patch_size, channels, grid = pair(wanted.patch_size), wanted.num_channels, wanted.grid_size
        if patch_size != pair(config.patch_size) or channels != config.num_channels:
            proj.weight = nn.Parameter(resample_kernel(proj.weight, patch_size, channels))
            proj.kernel_size, proj.stride, proj.in_channels = patch_size, patch_size, channels
            done.append(f"patch kernel {config.num_channels} x {config.patch_size} to {channels} x {wanted.patch_size}")
        if self.pos_embed is not None and grid != config.grid_size:
            self.pos_embed = nn.Parameter(resample_positions(self.pos_embed, config.grid_size, grid))
            done.append(f"positions {config.grid_size} to {grid}")
        if head is not None and wanted.num_labels != config.num_labels:
            head.weight = nn.Parameter(head.weight.new_empty(wanted.num_labels, config.hidden_size))
            head.bias = nn.Parameter(head.bias.new_empty(wanted.num_labels))
            head.out_features = wanted.num_labels
            self._init_weights(head)
            done.append(f"a new head for {wanted.num_labels} labels in the place of {config.num_labels}")
        if done and any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("from_pretrained: expected weights in memory to be adapted, got offloaded ones")
        for name in ADAPTED_FIELDS:
            setattr(config, name, getattr(wanted, name))
        return done

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue  # was loaded: transformers 4.57 calls for a whole module when one of its parameters is missing
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


class ViTSimpleModel(ViTSimplePreTrainedModel):
    """The backbone: an image to its tokens and to one pooled vector."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # a classifier's file serves the backbone too

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        D, depth = config.hidden_size, config.num_hidden_layers
        rows, columns = config.grid_size
        registers, positions = config.num_register_tokens, config.num_prefix_positions + rows * columns
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if config.use_class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, D)) if registers else None
        learned = config.position_embedding == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, positions, D)) if learned else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm_pre = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.Identity() if config.fc_norm else nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.fc_norm = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.fc_norm else nn.Identity()
        self.post_init()

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position of every token for a patch grid, (1, T, D); zero for prefix tokens that have none."""
        config = self.config
        if self.pos_embed is None:
            weight = self.patch_embed.proj.weight
            positions = sincos2d(rows, columns, config.hidden_size, weight.device).to(weight.dtype)
        else:
            positions = resample_positions(self.pos_embed, config.grid_size, (rows, columns))
        return F.pad(positions, (0, 0, config.num_prefix_tokens + rows * columns - positions.shape[1], 0))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tokens that enter the blocks: (B, C, H, W) -> (B, T, D)."""
        B, _, H, W = pixel_values.shape
        P_height, P_width = pair(self.config.patch_size)
        prefix = [token.expand(B, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, self.patch_embed(pixel_values)], dim=1)  # (B, prefix, D), (B, N, D) -> (B, T, D)
        return self.norm_pre(self.dropout(x + self.positions(H // P_height, W // P_width)))

    def check_pixels(self, pixel_values: torch.Tensor, any_size: bool):
        """Raises what `forward` promises; reads shapes only, so that it costs nothing in a compiled graph."""
        channels, native, patch = self.config.num_channels, pair(self.config.image_size), pair(self.config.patch_size)
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values: expected floating-point pixels of shape (batch, {channels}, height, width), as the "
                f"checkpoint's AutoImageProcessor makes them, got {pixel_values.dtype} of shape {shape}"
            )
        if any_size and any(side == 0 or side % p for side, p in zip(shape[2:], patch)):
            raise ValueError(f"pixel_values: expected height and width in multiples of {patch}, got {shape[2:]}")
        if not any_size and shape[2:] != native:
            raise ValueError(
                f"pixel_values: expected height and width {native}, got {shape[2:]}: "
                "resize the image, or pass interpolate_pos_encoding=True"
            )

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pooled_only: bool = False,
    ) -> BaseModelOutputWithPooling | tuple:
        """Images to features.

        Args:
            pixel_values: (B, C, H, W), normalised, floating point; cast to the dtype of the weights.
            interpolate_pos_encoding: takes any height and width that are multiples of the patch size.
            output_attentions: adds the attention weights of each block, (B, h, T, T).
            output_hidden_states: adds the input of the first block and the output of each, (B, T, D).
            return_dict: False returns a tuple.
            pooled_only: where `pooler_output` is the class token, and neither attentions nor hidden states are asked
                for, no other token passes the attention of the last block, nor is it in `last_hidden_state`.

        Returns:
            `last_hidden_state` (B, T, D), or (B, 1, D) by `pooled_only`, after the final LayerNorm but for `fc_norm`;
            `pooler_output` (B, D), what the head receives.

        Raises:
            ValueError: pixels of another rank, dtype, channel count or size; attentions where they are not computed.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions: {config._attn_implementation!r} attention does not compute them, "
                'load the model with attn_implementation="eager"'
            )
        self.check_pixels(pixel_values, any_size=interpolate_pos_encoding)

        x = self.embed(pixel_values.to(self.patch_embed.proj.weight.dtype))  # (B, T, D)
        hidden_states = (x,) if output_hidden_states else None
        attentions = () if output_attentions else None
        class_token_only = pooled_only and config.pooling == "cls" and not (output_attentions or output_hidden_states)
        for block in self.blocks:
            x, weights = block(x, 1 if class_token_only and block is self.blocks[-1] else None)
            hidden_states = hidden_states + (x,) if output_hidden_states else None
            attentions = attentions + (weights,) if output_attentions else None
        x = self.norm(x)
        pooled = x[:, 0] if config.pooling == "cls" else x[:, config.num_prefix_tokens :].mean(dim=1)
        output = BaseModelOutputWithPooling(x, self.fc_norm(pooled), hidden_states, attentions)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class ViTSimpleForImageClassification(ViTSimpleModel):
    """The backbone and one linear layer on its pooled vector."""

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: ViTSimpleConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, K), in float32.

        Integer labels (B,) are classes, for cross-entropy. Float labels (B, K) follow `config.problem_type`:
        "single_label_classification" takes them as probabilities, as mixup makes them, for cross-entropy;
        "multi_label_classification" for binary cross-entropy; "regression" for the squared error, (B,) too if K = 1.

        Raises:
            ValueError: labels of another dtype or shape, or float labels without `config.problem_type`.
        """
        (B, K), problem, shape = logits.shape, self.config.problem_type, tuple(labels.shape)
        if labels.dtype == torch.int64 and problem in (None, "single_label_classification") and K > 1:
            expected, loss = (B,), F.cross_entropy
        elif labels.is_floating_point() and problem:
            expected, labels = (B, K), labels.float()
            loss = {
                "single_label_classification": F.cross_entropy,
                "multi_label_classification": F.binary_cross_entropy_with_logits,
                "regression": F.mse_loss,
            }[problem]
        else:
            raise ValueError(
                "labels: expected torch.int64 classes (of at least 2), or float labels and config.problem_type set to "
                "'single_label_classification' (soft targets), 'multi_label_classification' or 'regression'; "
                f"got {labels.dtype}, problem_type={problem!r} and num_labels={K}"
            )
        if problem == "regression" and K == 1 and shape == (B,):
            expected, labels = (B,), labels[:, None]
        if shape != expected:
            raise ValueError(f"labels: expected shape {expected}, got {shape}")
        return loss(logits.float(), labels)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Images to `logits` (B, K) and, where there are labels, to the mean `loss`; the rest as for the backbone.

        It is run with `pooled_only`: a forward hook behind the attention of the last block sees the class token alone,
        where that is pooled, unless attentions or hidden states are asked for.
        """
        asked = interpolate_pos_encoding, output_attentions, output_hidden_states
        features = super().forward(pixel_values, *asked, return_dict=True, pooled_only=True)
        logits = self.head(features.pooler_output)  # (B, K)
        loss = None if labels is None else self.loss(logits, labels)
        output = ImageClassifierOutput(loss, logits, features.hidden_states, features.attentions)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
