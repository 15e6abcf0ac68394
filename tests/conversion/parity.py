"""Helpers of the parity tests: random models of other libraries, and their outputs.

As a command, `python -m tests.conversion.parity [FOLDER]` prints how much tokens differ from those of every source, at
several image sizes; with FOLDER, a checkpoint of transformers, also those of its weights.
"""

import argparse
import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file
from transformers import AutoModel

import vit_simple
from vit_simple.convert_checkpoint import convert

try:
    import timm
    from timm.models import save_for_hf
except ImportError:
    timm = None

IMAGES = {size: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)) for size in (16, 24)}


def random(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode, with weights that are all far from zero and from each other."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def outputs(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens after the last LayerNorm and the logits (None without a head) of a model of any library."""
    if not hasattr(model, "config"):  # timm's
        tokens = model.forward_features(images)
        return tokens, model.forward_head(tokens) if model.num_classes else None
    model_type, resized = model.config.model_type, {"interpolate_pos_encoding": True}
    if model_type == "vit_simple":
        output = model(images, output_hidden_states=True, **resized)
        return model.norm(output.hidden_states[-1]), getattr(output, "logits", None)
    if model_type.startswith("clip"):
        encoder = getattr(model, "vision_model", model)
        features = encoder(images, **resized)
        head = getattr(model, "visual_projection", None)
        logits = None if head is None else head(features.pooler_output)
        return encoder.post_layernorm(features.last_hidden_state), logits
    if model_type == "vit_mae":
        in_order = torch.arange(images[0, 0].numel() // 16.0).expand(len(images), -1)
        return model.base_model(images, noise=in_order, **resized).last_hidden_state, None
    if model_type.startswith("dinov2"):
        resized = {}  # always
    logits = model(images, **resized).logits if hasattr(model, "classifier") else None
    return model.base_model(images, **resized).last_hidden_state, logits


def assert_alike(outputs: tuple, expected: tuple):
    """Tokens and, if both models have a head, logits are equal to 1e-5 of the largest value."""
    for ours, theirs in zip(outputs, expected, strict=True):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def open_folder(folder):
    """The model of the class that the config names; all of its tensors must be in the file, and no others."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name, None) or getattr(vit_simple, name), {}
    model, info = model.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in key for key in info["missing_keys"]) and not info["unexpected_keys"], info
    return model.eval()


# The table

PATCHES = 12  # rows and columns of the positions; patches of four pixels
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48, "patch_size": 4}
TIMM = {"img_size": 48, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
AT = [(48, 48), (24, 24), (72, 72), (24, 48), (48, 72), (72, 24)]  # native, half and 1.5 times, square and not


def by_scale(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """How the repositories of DINO and DINOv2 resample, (1, D, rows, columns)."""
    height, width = grid.shape[2:]
    scale = (rows + 0.1) / height, (columns + 0.1) / width
    return F.interpolate(grid, scale_factor=scale, mode="bicubic")


def by_size(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """How the repositories of DeiT and MAE resample."""
    return F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)


def antialiased(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """How the repository of DINOv2 resamples for models with registers."""
    return F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)


# Family; class of transformers; model of timm; the repository of the original file, and how it resamples. A string in
# parentheses says why there is none.
Original = tuple[str, Callable] | str
ROWS: list[tuple[str, str, str, Original]] = [
    ("google/vit, augreg", "ViTModel", "vit_base_patch16_224.augreg_in21k", "(files of JAX are not opened)"),
    ("DeiT", "ViTModel", "deit_base_patch16_224.fb_in1k", ("facebookresearch/deit", by_size)),
    ("DeiT distilled", "(refused)", "(refused)", "(refused)"),
    ("DeiT-III", "(no such class)", "deit3_base_patch16_224.fb_in1k", ("facebookresearch/deit", by_size)),
    ("DINO", "ViTModel", "vit_base_patch16_224.dino", ("facebookresearch/dino", by_scale)),
    ("MAE", "ViTMAEModel", "vit_base_patch16_224.mae", ("facebookresearch/mae", by_size)),
    ("DINOv2", "Dinov2Model", "vit_base_patch14_dinov2.lvd142m", ("facebookresearch/dinov2", by_scale)),
    (
        "DINOv2 with registers",
        "Dinov2WithRegistersModel",
        "vit_base_patch14_reg4_dinov2.lvd142m",
        ("facebookresearch/dinov2", antialiased),
    ),
    ("CLIP", "CLIPVisionModel", "vit_base_patch16_clip_224.laion2b", "(keys of open_clip are not opened)"),
]
FAMILY = {"google/vit, augreg": "augreg", "DeiT": "deit", "DeiT-III": "deit3", "DINO": "dino", "MAE": "mae"}
FAMILY |= {"DINOv2": "dinov2", "DINOv2 with registers": "dinov2", "CLIP": "clip"}


def structured(model: torch.nn.Module) -> torch.nn.Module:
    """The random model with positions as training makes them: smooth, a few waves of low frequency per channel."""
    random(model)
    draw = torch.Generator().manual_seed(2)
    y, x = torch.meshgrid(*[torch.linspace(0, math.pi, PATCHES)] * 2, indexing="ij")
    for name, table in model.named_parameters():
        if name.endswith(("pos_embed", "position_embeddings", "position_embedding.weight")) and "decoder" not in name:
            waves = 0
            for _ in range(4):
                fy, fx, phase = (4 * torch.rand(table.shape[-1], 1, 1, generator=draw) for _ in range(3))
                waves = waves + 0.3 * torch.cos(fy * y + fx * x + phase)
            table.data.view(-1, table.shape[-1])[-(PATCHES**2) :] = waves.flatten(1).T
    return model


def difference(model: torch.nn.Module, folder: Path, tokens: torch.Tensor, images: torch.Tensor) -> float:
    """The largest difference from a source's tokens, of the largest token: resampled while running and on loading."""
    size = tuple(images.shape[2:])
    loaded = AutoModel.from_pretrained(folder, image_size=size)
    ours = [outputs(each.eval(), images)[0] for each in (model, loaded)]
    return max((each - tokens).abs().max().item() for each in ours) / tokens.abs().max().item()


def differences(peer: torch.nn.Module, folder: Path, resized: Callable = lambda peer, size: peer) -> list[float]:
    """`difference` from a peer at every size, for the converted folder."""
    model = AutoModel.from_pretrained(folder).eval()
    images = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in AT]
    return [difference(model, folder, outputs(resized(peer, tuple(each.shape[2:])), each)[0], each) for each in images]


def transformers_row(family: str, name: str, folder: Path) -> list[float]:
    model_class = getattr(transformers, name)
    ratio = {} if name.startswith("Dinov2") else {"intermediate_size": 128}
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "mask_ratio": 0.0} if "MAE" in name else {}
    peer = structured(model_class(model_class.config_class(**SMALL, **ratio, **decoder)))
    peer.save_pretrained(folder / "peer")
    convert(folder / "peer", folder / "ours", family=FAMILY[family])
    return differences(peer, folder / "ours")


def timm_row(family: str, name: str, folder: Path) -> list[float]:
    def resized(peer, size):
        peer = copy.deepcopy(peer)
        peer.set_input_size(img_size=size)
        return peer

    peer = structured(timm.create_model(name, **TIMM, num_classes=0))
    save_for_hf(peer, folder / "peer", safe_serialization=True)
    convert(folder / "peer", folder / "ours")
    return differences(peer, folder / "ours", resized)


def original_row(family: str, resample: Callable, folder: Path) -> list[float]:
    """A class of transformers with the weights, and the positions as a repository resamples them."""
    kind = {"DINOv2": "Dinov2Model", "DeiT-III": "Dinov2Model", "DINOv2 with registers": "Dinov2WithRegistersModel"}
    name = kind.get(family, "ViTModel")
    model_class = getattr(transformers, name)
    fields = SMALL | {"layer_norm_eps": 1e-6} | ({} if name != "ViTModel" else {"intermediate_size": 128})
    peer = structured(model_class(model_class.config_class(**fields)))
    table = peer.embeddings.position_embeddings
    if family == "DeiT-III":
        table.data[:, 0] = 0  # its class token has no position
    peer.save_pretrained(folder / "peer")
    convert(folder / "peer", folder / "keys", family=FAMILY[family])
    tensors = load_file(folder / "keys/model.safetensors")
    if family == "DINOv2 with registers":
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors |= {"pos_embed": table.data, "cls_token": peer.embeddings.cls_token.data}
    if family == "DeiT-III":
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    torch.save({"model": tensors}, folder / "original.pth")
    convert(folder / "original.pth", folder / "ours", family=FAMILY[family], num_attention_heads=4)

    def positions(embeddings, height, width):
        grid = table[:, 1:].unflatten(1, (PATCHES, PATCHES)).permute(0, 3, 1, 2)
        if (height, width) != (48, 48):
            grid = resample(grid, height // 4, width // 4)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    peer.embeddings.interpolate_pos_encoding = positions
    return differences(peer, folder / "ours")


def rows():
    """Family, source, and the differences at every size, or a reason in parentheses why there are none."""
    for family, name, timm_name, original in ROWS:
        repository, resample = (None, original) if isinstance(original, str) else original
        for source, kind, make in (
            ("transformers", name, transformers_row),
            ("timm", timm_name if timm else "(timm is not installed)", timm_row),
            (repository or "original", resample, original_row),
        ):
            if isinstance(kind, str) and kind.startswith("("):
                yield family, source, kind
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = make(family, kind, Path(folder))
            yield family, source if source == repository else f"{source} {kind.split('.')[0]}", found


def real_rows(folder: Path):
    """Size, and the difference from the class of transformers, for real weights; and from expected.npz beside them."""
    with tempfile.TemporaryDirectory() as temporary:
        convert(folder, Path(temporary) / "ours")
        model, peer = (
            AutoModel.from_pretrained(Path(temporary) / "ours").eval(),
            AutoModel.from_pretrained(folder).eval(),
        )
        expected = folder.parent / "expected.npz"
        if expected.exists():
            stored = np.load(expected)
            tokens, ours = torch.tensor(stored["tokens"]), outputs(model, torch.tensor(stored["x"]))[0]
            yield (
                f"{expected.name}, {stored['x'].shape[2]} pixels",
                ((ours - tokens).abs().max() / tokens.abs().max()).item(),
            )
        native, patch = peer.config.image_size, model.config.patch_size
        half, larger = (round(native * part / patch) * patch for part in (0.5, 1.5))
        for size in [(native, native), (half, half), (larger, larger), (half, native), (native, larger)]:
            images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
            tokens = outputs(peer, images)[0]
            yield f"{size[0]} x {size[1]}", difference(model, Path(temporary) / "ours", tokens, images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoint of transformers with real weights")
    folder = parser.parse_args().folder
    disable_progress_bars()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    print("| family | source |" + "".join(f" {height}x{width} |" for height, width in AT))
    print("|---|---|" + "---|" * len(AT))
    for family, source, found in rows():
        cells = (
            [found.strip("()")] + [""] * (len(AT) - 1)
            if isinstance(found, str)
            else [f"{each:.0e}" if each else "0" for each in found]
        )
        print(f"| {family} | {source} | " + " | ".join(cells) + " |")
    if folder is not None:
        print(f"\n| {folder.name}, real weights | largest difference |\n|---|---|")
        for size, found in real_rows(folder):
            print(f"| {size} | {found:.0e} |" if found else f"| {size} | 0 |", flush=True)


if __name__ == "__main__":
    main()
