"""Trains a ViTSimple classifier on a data set of images: `python train.py [recipe.yaml] [--option value ...]`.

Without a recipe and without --dataset_name it runs recipes/digits.yaml, which states what it reaches.
"""

import argparse
import contextlib
import difflib
import itertools
import json
import math
import random
import sys
import time
import types
import typing
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.augment import Augment
from vit_simple.configuration_vit_simple import OWN_FIELDS, pair
from vit_simple.data import decode, evaluation_batches, load_image_data

ROOT = Path(__file__).parent


# Options


def option(group: str, default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class TrainConfig:
    """The options of a run, which a recipe may set too. Raises ValueError for a value that cannot work."""

    dataset_name: str = option("data", "data/digits", "Hub id or folder; no recipe runs then unless it is named, too")
    image_column_name: str | None = option("data", None, "column with the images; default: the only one")
    label_column_name: str | None = option("data", None, "column with the classes; default: the only one")
    train_val_split: float = option("data", 0.1, "part of train held out where there is no validation split")
    affine_degrees: float = option("data", 0.0, "augmentation: largest rotation in degrees")
    affine_translate: float = option("data", 0.0, "augmentation: largest shift as a part of the image")
    affine_scale: float = option("data", 0.0, "augmentation: largest change of size as a part of it")
    affine_shear: float = option("data", 0.0, "augmentation: largest shear in degrees")

    variant: str | None = option("network", None, "size and patch size, as S/16; default: the recipe's or S/16")
    image_size: int | None = option("network", None, "pixels on a side; default: the recipe's or 224")
    model: dict | None = option("network", None, "fields of ViTSimpleConfig as YAML; not beside the two above")

    num_train_epochs: int = option("optimisation", 100, "passes over the training images")
    per_device_train_batch_size: int = option("optimisation", 128, "images in a step of each process")
    per_device_eval_batch_size: int = option("optimisation", 256, "images in an evaluation batch")
    optim: str = option("optimisation", "adamw", "muon: Muon on the block matrices", ("adamw", "muon"))
    learning_rate: float = option("optimisation", 1e-3, "highest learning rate of AdamW")
    muon_learning_rate: float = option("optimisation", 0.02, "highest learning rate of Muon")
    weight_decay: float = option("optimisation", 0.05, "weight decay of kernels; nothing else decays")
    lr_scheduler_type: str = option("optimisation", "cosine", "how the rate falls to zero", ("cosine", "linear"))
    warmup_steps: float = option("optimisation", 0.1, "steps of rising rate; below 1: a part of all steps")
    max_grad_norm: float = option("optimisation", 1.0, "gradients are clipped to this norm; 0: not clipped")
    label_smoothing_factor: float = option("optimisation", 0.0, "part of the target spread over all classes")
    mixed_precision: str = option("optimisation", "no", "autocast to this type", ("no", "bf16"))
    seed: int = option("optimisation", 0, "decides every random choice")

    output_dir: str | None = option("output", None, "new or empty folder; default: the next free outputs/NAME[-N]")
    logging_steps: int = option("output", 10, "steps between two lines of metrics.jsonl")
    eval_steps: int | None = option("output", None, "steps between two evaluations; default: an epoch")

    def __post_init__(self):
        for name in ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "muon_learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
            self.expect(0 <= getattr(self, name) < math.inf, name, "a number that is not negative")
        self.expect(0 < self.train_val_split < 1, "train_val_split", "a number between 0 and 1")
        for name in ("affine_translate", "affine_scale", "label_smoothing_factor"):
            self.expect(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        for name in ("affine_degrees", "affine_shear"):
            self.expect(0 <= getattr(self, name) < 90, name, "degrees in [0, 90)")
        self.expect(self.eval_steps is None or self.eval_steps >= 1, "eval_steps", "at least 1")
        self.expect(self.seed >= 0, "seed", "a number that is not negative")
        self.expect(self.image_size is None or self.image_size >= 1, "image_size", "at least 1")
        for name, item in OPTIONS.items():
            choices = item.metadata["choices"]
            self.expect(not choices or getattr(self, name) in choices, name, " or ".join(choices or ()))
        if self.model is not None and (self.variant is not None or self.image_size is not None):
            raise ValueError("--variant and --image_size: expected neither beside a model mapping, which sets both")

    def expect(self, condition: bool, name: str, expected: str):
        if not condition:
            raise ValueError(f"--{name}: expected {expected}, got {getattr(self, name)!r}")


OPTIONS = {option.name: option for option in fields(TrainConfig)}


def convert(name: str, value):
    """A value from the command line or a recipe in the type of its option; YAML reads 1e-3 as a string.

    Raises:
        ValueError: names the option, its type and what was got.
    """
    kind = OPTIONS[name].type
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if name == "mixed_precision" and value is False:
        return "no"  # which YAML reads as a boolean
    try:
        if kind is dict:
            return dict(yaml.safe_load(value) if isinstance(value, str) else value)
        return kind(str(value))
    except (ValueError, TypeError, yaml.YAMLError):
        raise ValueError(f"--{name}: expected {kind.__name__}, got {value!r}") from None


def unknown(name: str, source: str, known) -> ValueError:
    near = difflib.get_close_matches(str(name).lstrip("-"), known, 1)
    return ValueError(f"{source}: {name!r} is not known" + (f", did you mean {near[0]!r}?" if near else ""))


def parse_config(arguments: list[str]) -> TrainConfig:
    """The command line over the recipe over the defaults.

    Raises:
        ValueError: an option or a key of the recipe that does not exist, a value that does not fit, no such recipe.
    """
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("recipe", nargs="?", help="a YAML file of options, which the command line overrides")
    groups = {}
    for name, item in OPTIONS.items():
        title, choices = item.metadata["group"], item.metadata["choices"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        text = item.metadata["help"] + ("" if item.default is None else f" ({item.default})")
        metavar = "|".join(choices) if choices else name.rsplit("_", 1)[-1].upper()
        groups[title].add_argument(f"--{name}", help=text, metavar=metavar, default=argparse.SUPPRESS)
    try:
        given, extra = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    if extra:
        raise unknown(extra[0].split("=")[0], "command line", OPTIONS)
    given = vars(given)
    path = given.pop("recipe")
    if path is None and "dataset_name" not in given:
        path = ROOT / "recipes/digits.yaml"
    recipe = {}
    if path is not None:
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"recipe: {path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"recipe: expected a mapping of options in {path}, got {type(recipe).__name__}")
    if "variant" in given or "image_size" in given:
        recipe.pop("model", None)
    for name in recipe:
        if name not in OPTIONS:
            raise unknown(name, str(path), OPTIONS)
    return TrainConfig(**{name: convert(name, value) for name, value in {**recipe, **given}.items()})


# Optimisation


def schedule(step: int, total_steps: int, warmup_steps: float, kind: str) -> float:
    """The factor of the learning rate at a step, in [0, 1]: a linear rise, then a cosine or a line down to zero."""
    warmup = warmup_steps if warmup_steps >= 1 else warmup_steps * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = (step - warmup) / max(total_steps - warmup, 1)
    return 1 - rest if kind == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: kernels decay; biases, norms, LayerScale, tokens and positions do not."""
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and name not in ("cls_token", "reg_token", "pos_embed")
        (kernels if decays else others).append(parameter)
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al., 2024), one product for all matrices of a shape instead of one for each.

    The Newton-Schulz iteration runs in bfloat16 on an accelerator, as there, and in float32 on a CPU: most CPUs
    emulate bfloat16.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[torch.Tensor], group: dict):
        """One step for matrices of one shape."""
        rows, columns = parameters[0].shape
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            momenta = torch._foreach_lerp(gradients, momenta, group["momentum"])

        x = torch.stack(momenta)  # (matrices, rows, columns)
        x = x if x.device.type == "cpu" else x.bfloat16()
        x = x.mT if rows > columns else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.mT if rows > columns else x

        adamw_like = group["adjust_lr_fn"] == "match_rms_adamw"
        lr = group["lr"] * (0.2 * max(rows, columns) ** 0.5 if adamw_like else max(1, rows / columns) ** 0.5)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(x.to(parameters[0].dtype)), alpha=-lr)


def build_optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the matrices of the blocks and AdamW on the rest."""
    groups = parameter_groups(model, config.weight_decay)
    optimizers = []
    if config.optim == "muon":
        matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        chosen = {id(matrix) for matrix in matrices}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# The run


def build_model_config(config: TrainConfig, class_names: list[str]) -> ViTSimpleConfig:
    """The network that the options ask for, with the classes of the data.

    Raises:
        ValueError: a field of the model mapping that ViTSimpleConfig lacks or refuses, or that is not for RGB.
    """
    fields = dict(config.model or {})
    for name, value in fields.items():
        if name not in OWN_FIELDS:
            raise unknown(name, "--model", OWN_FIELDS)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                fields[name] = float(value)  # YAML reads 1e-5 as a string
    if fields.get("num_channels", 3) != 3:
        raise ValueError(
            f"--model: expected num_channels 3, since every image becomes RGB, got {fields['num_channels']}"
        )
    fields["id2label"] = dict(enumerate(class_names))
    fields["label2id"] = {name: index for index, name in enumerate(class_names)}
    if config.model is not None:
        return ViTSimpleConfig(**fields)
    variant = "S/16" if config.variant is None else config.variant
    return ViTSimpleConfig.from_variant(variant, image_size=config.image_size or 224, **fields)


def choose_output_dir(config: TrainConfig) -> Path:
    """Makes the run's folder: the one asked for, if new or empty, else the next free outputs/NAME[-N].

    Raises:
        ValueError: the folder has files in it, or cannot be made or written.
    """
    name = Path(config.dataset_name).resolve().name
    free = (Path("outputs") / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    folder = next(folder for folder in free if not folder.exists())
    if config.output_dir is not None:
        folder = Path(config.output_dir)
    recipe = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"--output_dir: expected a new or an empty folder, got {folder} with files in it")
        (folder / "train_config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output_dir: {folder} cannot be written: {error.strerror}") from error
    return folder


def write_processor(folder: Path, image_size: tuple[int, int]):
    """Writes preprocessor_config.json: a stock processor that makes RGB of the size, scaled to [-1, 1]."""
    height, width = image_size
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def seed_for(*key) -> int:
    """A seed that is a pure function of its key, as (seed, step, rank): a step that is repeated draws the same."""
    return random.Random(repr(key)).getrandbits(63)


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Sums over all images, divided once: mean `loss`, `top1` and `top5` in [0, 1], `correct` of `count` images."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        logits, labels = accelerator.gather_for_metrics((model(batch["pixel_values"]).logits.float(), batch["labels"]))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum").item()
        sums += torch.tensor([loss, hits[:, 0].sum().item(), hits.sum().item(), len(labels)])
    model.train()
    loss, correct, correct5, count = sums.tolist()
    return {
        "loss": loss / count,
        "top1": correct / count,
        "top5": correct5 / count,
        "correct": int(correct),
        "count": int(count),
    }


def main(arguments: list[str] | None = None):
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        has_gpu = torch.accelerator.is_available()  # said outright: torchrun on a CPU makes no group otherwise
        accelerator = Accelerator(cpu=not has_gpu, mixed_precision=config.mixed_precision)
        with accelerator.main_process_first():  # the others read what the first has prepared
            data = load_image_data(
                config.dataset_name,
                config.image_column_name,
                config.label_column_name,
                config.train_val_split,
                config.seed,
            )
        model_config = build_model_config(config, data.class_names)
        batch_size, processes = config.per_device_train_batch_size, accelerator.num_processes
        steps_per_epoch = len(data.splits["train"]) // (batch_size * processes)
        if steps_per_epoch == 0:
            raise ValueError(
                f"--per_device_train_batch_size: expected at most {len(data.splits['train']) // processes}, a step's "
                f"share of the training images, got {batch_size}"
            )
        folder = broadcast_object_list([choose_output_dir(config) if accelerator.is_main_process else None])[0]
    except ValueError as error:
        raise SystemExit(f"train.py: error: {error}") from error

    if accelerator.is_main_process:
        write_processor(folder, pair(model_config.image_size))
    accelerator.wait_for_everyone()
    processor = AutoImageProcessor.from_pretrained(folder)
    images, labels = (tensor.to(accelerator.device) for tensor in decode(data, "train", processor))
    evaluations = {
        split: accelerator.prepare(evaluation_batches(data, split, processor, config.per_device_eval_batch_size))
        for split in data.splits
        if split != "train"
    }
    affine = config.affine_degrees, config.affine_translate, config.affine_scale, config.affine_shear
    augment = Augment(processor, *affine).to(accelerator.device)

    torch.manual_seed(seed_for(config.seed, "weights"))
    network = ViTSimpleForImageClassification(model_config)
    optimizers = [accelerator.prepare(optimizer) for optimizer in build_optimizers(network, config)]
    model = accelerator.prepare(network)
    total_steps = steps_per_epoch * config.num_train_epochs
    eval_steps = config.eval_steps or steps_per_epoch

    def log(done: int, split: str, **values):
        if accelerator.is_main_process:
            row = {"step": done, "epoch": done / steps_per_epoch, "split": split, **values}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in data.splits.items())
    accelerator.print(f"{config.dataset_name}: {sizes} images, {len(data.class_names)} classes")
    accelerator.print(f"ViTSimple: {network.num_parameters():,} parameters, {processes} x {accelerator.device}")
    model.train()
    losses, start, evaluating = [], time.perf_counter(), 0.0
    progress = tqdm(range(total_steps), unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            generator = torch.Generator().manual_seed(seed_for(config.seed, "order", epoch))
            order = torch.randperm(len(images), generator=generator).to(accelerator.device)
        first = (position * processes + accelerator.process_index) * batch_size
        rows = order[first : first + batch_size]

        torch.manual_seed(seed_for(config.seed, step, accelerator.process_index))
        logits = model(augment(images[rows])).logits
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=config.label_smoothing_factor)
        accelerator.backward(loss)
        if config.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        factor = schedule(step, total_steps, config.warmup_steps, config.lr_scheduler_type)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())

        done = step + 1
        if done % config.logging_steps == 0 or done == total_steps:
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            lr, training = config.learning_rate * factor, time.perf_counter() - start - evaluating
            speed = done * batch_size * processes / training
            log(done, "train", loss=mean_loss, lr=lr, images_per_second=round(speed, 1))
            progress.set_postfix_str(f"loss {mean_loss:.3f}, lr {lr:.1e}, {speed:.0f} images/s")
            losses.clear()
        if done % eval_steps == 0 or done == total_steps:
            before = time.perf_counter()
            result = evaluate(model, evaluations["validation"], accelerator)
            evaluating += time.perf_counter() - before
            log(done, "validation", **result)
            if accelerator.is_main_process:
                progress.write(f"step {done}: " + describe("validation", result))
    seconds = time.perf_counter() - start

    if accelerator.is_main_process:
        network.save_pretrained(folder)
    accelerator.print(f"trained {config.num_train_epochs} epochs in {seconds:.1f} s")
    if "test" not in evaluations:
        accelerator.print("no labelled test split: nothing was tested")
    else:
        result = evaluate(model, evaluations["test"], accelerator)
        log(total_steps, "test", **result)
        accelerator.print(describe("test", result))
    accelerator.print(
        f"saved in {folder}; load it anywhere on this machine with\n"
        f'  transformers.pipeline("image-classification", "{folder.resolve()}", trust_remote_code=True)'
    )
    accelerator.wait_for_everyone()  # a gather that is still being cleaned up can deadlock gloo's end
    accelerator.end_training()


def describe(split: str, result: dict[str, float]) -> str:
    right = f"{result['correct']} of {result['count']} images right"
    return f"{split}: {right} ({result['top1']:.2%}), loss {result['loss']:.4f}"


if __name__ == "__main__":
    main()
