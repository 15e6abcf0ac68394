"""Trains a ViTSimple classifier on a data set of images, from scratch or from a checkpoint.

Without a recipe and without --dataset_name it runs recipes/digits.yaml, which states what it reaches.
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import pair
from vit_simple.data.augment import Augment
from vit_simple.data.dataloader import MapStyleSplit
from vit_simple.data.decoding import BadImage
from vit_simple.data.labels import MULTI, REGRESSION, Labels
from vit_simple.data.loading import ImageData, load_image_data
from vit_simple.data.streaming import StreamingSplit
from vit_simple.files import ROOT, inherited, write_atomically
from vit_simple.sharing.card import build_card
from vit_simple.sharing.record import record
from vit_simple.sharing.upload import NETWORK_ERRORS, push, with_retries
from vit_simple.training.checkpoint import (
    complete_checkpoints,
    cut_metrics,
    load_checkpoint,
    open_folder,
    save_checkpoint,
)
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.metrics import METRICS_OF, Evaluation, captions, class_table, table
from vit_simple.training.optim import EMA, build_optimizers, schedule
from vit_simple.training.plots import plot_confusion, plot_curves, plot_predictions
from vit_simple.training.setup import (
    build_accelerator,
    build_model,
    build_splits,
    check_batch_size,
    check_labels,
    denormalize_head,
    mixed_precision_of,
    on_main_process,
)
from vit_simple.training.step import augmented_batches, can_capture, capture

SHOWN = 32  # test images in the picture of predictions
NEVER = torch.iinfo(torch.int64).max


# Evaluation


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: MapStyleSplit | StreamingSplit,
    augment: Augment,
    accelerator: Accelerator,
    batch_size: int,
    in_bf16: bool = False,
) -> Evaluation:
    """One pass over a split, in float32 or, on a GPU, in bfloat16."""
    model.eval()
    labels = rows.data.labels
    scores = METRICS_OF[labels.problem_type](labels, accelerator.device)
    for pixels, targets in rows.evaluation(batch_size):
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=in_bf16):
            logits = model(augment.normalize(pixels)).logits
        scores.update(logits.float(), targets)
    model.train()
    return scores.compute(accelerator)


# The run


def criterion(labels: Labels, weights: torch.Tensor | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean loss of logits (B, K) and targets (B, K)."""
    if labels.problem_type == MULTI:
        return functools.partial(F.binary_cross_entropy_with_logits, pos_weight=weights)
    if labels.problem_type == REGRESSION:
        return F.mse_loss
    return functools.partial(F.cross_entropy, weight=weights)


class Meter:
    """Losses since the last line of the log, kept on the device so that no step waits for them, and where time went."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.loss_sum = torch.zeros(1, device=accelerator.device)
        self.first_bad = torch.full((1,), NEVER, device=accelerator.device)  # step that was not finite
        self.restart()

    def restart(self):
        self.loss_sum.zero_()
        self.batches, self.since, self.waited, self.paused = 0, time.perf_counter(), 0.0, 0.0

    def add(self, loss: torch.Tensor):
        self.loss_sum += loss
        self.batches += 1

    def look(self, gradient_norm: torch.Tensor, done: int):
        finite = (self.loss_sum + gradient_norm).isfinite()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=done))

    @contextlib.contextmanager
    def waiting(self):
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def pause(self):
        before = time.perf_counter()
        yield
        self.paused += time.perf_counter() - before

    def check(self, folder: Path):
        """Ends the run if the loss or the gradient of a step was not finite."""
        first = self.accelerator.gather(self.first_bad).min().item()
        if first < NEVER:
            raise stop(f"step {first}: loss or gradient is not finite; {last_good(folder)}; try a lower learning rate")

    def read(self, steps: int, images_per_batch: int) -> dict[str, float]:
        """The mean loss of so many steps, images per second and the part of the time spent waiting for data."""
        loss = self.accelerator.reduce(self.loss_sum / steps, "mean").item()
        seconds = time.perf_counter() - self.since - self.paused
        speed, wait = self.batches * images_per_batch / seconds, self.waited / seconds
        self.restart()
        return {"loss": loss, "images_per_second": round(speed, 1), "data_wait": round(wait, 4)}


@contextlib.contextmanager
def signals_noted():
    """Within it, SIGTERM and Ctrl-C are noted for the step to end; a second Ctrl-C of a single process ends at once."""
    noted = []

    def note(number: int, frame):
        if noted and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(message: str) -> SystemExit:
    return SystemExit(f"train.py: error: {message}")


def last_good(folder: Path) -> str:
    checkpoint = next(reversed(complete_checkpoints(folder)), None)
    return "there is no checkpoint" if checkpoint is None else f"the last good checkpoint is {checkpoint}"


def all_bad_images(rows: dict[str, MapStyleSplit | StreamingSplit]) -> dict[str, dict[str, str]]:
    """What each split skipped in all processes: which row -> why."""
    return {
        split: dict(item for share in gather_object([list(part.bad.items())]) for item in share)
        for split, part in rows.items()
    }


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    network: ViTSimpleForImageClassification,
    rows: dict[str, MapStyleSplit | StreamingSplit],
    augment: Augment,
    folder: Path,
    checkpoint: Path | None,
):
    """From the first step, or the checkpoint, to a folder that loads anywhere."""
    started = time.perf_counter()
    rank, processes, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    step_size = batch_size * accumulation * processes
    steps_per_epoch = rows["train"].size // step_size
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    eval_steps = config.eval_steps or steps_per_epoch
    labels = rows["train"].data.labels
    loss_of = criterion(labels, labels.weights().to(accelerator.device) if config.class_weights else None)
    in_bf16 = mixed_precision_of(config) == "bf16"

    muon_rate = config.muon_learning_rate if config.optim == "muon" else None
    optimizers = build_optimizers(network, config.learning_rate, config.weight_decay, config.layer_decay, muon_rate)
    model, *optimizers = accelerator.prepare(network, *optimizers)
    if can_capture(config, accelerator):
        accelerator.print(f"compiled in {capture(network, batch_size, in_bf16):.0f} s")
    averaged = None if config.ema_decay is None else EMA(network, config.ema_decay)
    if config.report_to:
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers("vit_simple", {name: str(value) for name, value in asdict(config).items()})
    meter, first_step = Meter(accelerator), 0
    if checkpoint is not None:
        state = load_checkpoint(accelerator, checkpoint, averaged)
        first_step = state["step"]
        meter.loss_sum.fill_(state["loss_sums"][rank])
        for split, bad in state["bad_images"].items():
            rows[split].bad.update(bad)
        if config.streaming and (change := rows["train"].load_state_dict(state["places"][rank])):
            accelerator.print(change)
        accelerator.print(f"going on from {checkpoint}")
    elif config.resume_from_checkpoint:
        accelerator.print(f"no complete checkpoint in {folder}: starting anew")
    if main_process:
        cut_metrics(folder, first_step)

    def log(done: int, split: str, **values):
        if main_process:
            row = {"step": done, "epoch": done / steps_per_epoch, "split": split, **values}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        kind = f"{split}_ema" if values.pop("weights", "raw") == "ema" else split
        numbers = {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, dict)}
        accelerator.log(numbers, step=done)

    def measure(split: str) -> Evaluation:
        with meter.pause():
            in_bf16_here = in_bf16 and accelerator.device.type == "cuda"
            return evaluate(model, rows[split], augment, accelerator, config.per_device_eval_batch_size, in_bf16_here)

    def validate(done: int) -> dict[str, Evaluation]:
        """The results of the raw and of the averaged weights, logged and shown."""
        meter.check(folder)
        results = {"raw": measure("validation")}
        if averaged:
            with averaged.applied():
                results["ema"] = measure("validation")
        for weights, result in results.items():
            log(done, "validation", weights=weights, **result.values)
        if main_process:
            named = {f"validation {weights}": result for weights, result in results.items()}
            progress.write(table(f"step {done}", named))
        return results

    def save(done: int):
        meter.check(folder)
        state = {"loss_sums": accelerator.gather(meter.loss_sum).tolist(), "bad_images": all_bad_images(rows)}
        if config.streaming:
            state["places"] = gather_object([rows["train"].state_dict()])
        try:
            with meter.pause():
                save_checkpoint(accelerator, folder, done, state, averaged, config.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise stop(f"step {done} cannot be saved: {error}; {last_good(folder)}") from error
        if config.hub_strategy == "every_save" and config.push_to_hub:
            with meter.pause():
                with averaged.applied() if averaged else contextlib.nullcontext():
                    export()
                if main_process:
                    try:
                        share(config, folder, f"step {done}")
                    except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
                        progress.write(f"step {done} on the Hub: {error}")  # the next may do better

    def export():
        """The weights that the network has now, its config and its code; called by every process."""
        weights = accelerator.get_state_dict(model)
        if main_process:
            network.save_pretrained(folder, state_dict=dict(denormalize_head(weights, labels)))

    batches = augmented_batches(rows["train"], augment, config, first_step, meter.waiting)
    progress = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", disable=not main_process)
    model.train()
    with signals_noted() as signals, progress:
        for step in range(first_step, total_steps):
            for batch in range(accumulation):
                x, targets = next(batches)
                with contextlib.nullcontext() if batch + 1 == accumulation else accelerator.no_sync(model):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=in_bf16):
                        logits = model(x).logits
                    loss = loss_of(logits.float(), targets) / accumulation
                    accelerator.backward(loss)
                meter.add(loss.detach())
            meter.look(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf), step + 1)
            factor = schedule(step, total_steps, config.warmup_steps, config.lr_scheduler_type, config.decay_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                optimizer.step()
                optimizer.zero_grad()
            if averaged:
                averaged.update(step)

            done = step + 1
            progress.update()
            if done % config.logging_steps == 0 or done == total_steps:
                meter.check(folder)
                summed = step % config.logging_steps + 1
                values = {**meter.read(summed, batch_size * processes), "lr": config.learning_rate * factor}
                log(done, "train", **values)
                progress.set_postfix_str(
                    f"loss {values['loss']:.3f}, lr {values['lr']:.1e}, {values['images_per_second']:.0f} images/s, "
                    f"waiting {values['data_wait']:.1%}"
                )
            if "validation" in rows and (done % eval_steps == 0 or done == total_steps):
                results = validate(done)
            stopping = agreed(accelerator, signals, done % config.logging_steps == 0)
            if done < total_steps and (stopping or done % config.save_steps == 0):
                save(done)
                if stopping:
                    accelerator.print(
                        f"stopped by a signal, step {done} is saved; go on with the same options and\n"
                        f"  --output_dir {folder} --resume_from_checkpoint latest"
                    )
                    accelerator.end_training()
                    raise SystemExit(128 + max(signals, default=signal.SIGTERM))

    best = "ema" if averaged else "raw"
    if averaged and "validation" in rows and results["raw"].score > results["ema"].score:
        best = "raw"
    with averaged.applied() if best == "ema" else contextlib.nullcontext():
        export()
        split = next((name for name in ("test", "validation") if name in rows), None)
        result = measure(split) if split else None
    if split == "test":
        per_class = dict(zip(labels.class_names, result.per_class))
        log(total_steps, "test", weights=best, **result.values, per_class=per_class)
        accelerator.print(table("end", {"test " + best: result}))
    else:
        if split:
            log(total_steps, split, weights=best, **result.values)  # of the weights that are saved
        accelerator.print("no labelled test split: nothing was tested")
    if main_process:
        plot_curves(folder)
        if split and result.per_class:
            print(class_table(split, result, labels.class_names))
        if split and result.confusion is not None:
            title = f"{split}: {result.values['correct']} of {result.values['count']} right"
            plot_confusion(result.confusion.numpy(), labels.class_names, title, folder / "confusion.png")
        if split and rows[split].data.channels in (1, 3):
            show_predictions(rows[split], augment, folder)
        if first_step == 0:
            record(folder, seconds=round(time.perf_counter() - started, 1))
        write_atomically(folder / "README.md", build_card(folder, config.hub_model_id, license=config.license))


def show_predictions(rows: MapStyleSplit | StreamingSplit, augment: Augment, folder: Path):
    """Writes predictions.png: some images of a split, and what the saved network says of them."""
    few = rows.samples(SHOWN)
    if not few:
        return
    pixels, targets = rows.decode.stack([image for image, _ in few]), [target for _, target in few]
    network = ViTSimpleForImageClassification(ViTSimpleConfig.from_pretrained(folder)).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        logits = network.to(augment.mean.device)(augment.normalize(pixels.to(augment.mean.device))).logits.cpu()
    plot_predictions(pixels, captions(logits, targets, rows.data.labels), folder / "predictions.png")


def share(config: TrainConfig, folder: Path, what: str) -> str:
    """Pushes the folder; returns the commit."""
    options = {"private": config.hub_private_repo, "license": config.license}
    return push(folder, config.hub_model_id, commit_message=f"{what} of {folder.resolve().name}", **options)


def base_of(path: str | None) -> dict:
    """Licence and base model of a run that goes on from a checkpoint, in a folder or on the Hub."""
    if path is None or Path(path).exists():
        return inherited(Path(path)) if path else {}
    with contextlib.suppress(ValueError, *NETWORK_ERRORS):
        return inherited(Path(hf_hub_download(path, "README.md")).parent) | {"base_model": path}
    return {"base_model": path}


def check_hub(config: TrainConfig):
    """Raises ValueError where a push at the end could only fail."""
    if config.license is None and "license" not in base_of(config.model_name_or_path):
        raise ValueError("--license: expected one beside --push_to_hub, such as apache-2.0")
    try:
        with_retries(HfApi().whoami)
    except NETWORK_ERRORS as error:
        raise ValueError(f"--push_to_hub: expected a login (hf auth login, or HF_TOKEN): {error}") from error


def record_run(config: TrainConfig, data: ImageData, folder: Path):
    """Writes down what the card tells of a run and no other file does."""
    base = base_of(config.model_name_or_path)
    base["base_model_relation"] = "finetune" if "base_model" in base else None
    name, revision = config.dataset_name, config.dataset_revision
    on_hub = not Path(name).exists() and not (ROOT / name).exists()
    if on_hub:
        with contextlib.suppress(*NETWORK_ERRORS):
            revision = HfApi().dataset_info(name, revision=revision).sha
    dataset = {
        "name": name if on_hub else Path(name).resolve().name,
        "on_hub": on_hub,
        "config": config.dataset_config_name,
        "revision": revision,
        "images": data.sizes["train"],
    }
    record(folder, dataset=dataset, **base)


def evaluate_only(
    config: TrainConfig,
    accelerator: Accelerator,
    network: ViTSimpleForImageClassification,
    rows: dict[str, MapStyleSplit | StreamingSplit],
    augment: Augment,
):
    model, results = accelerator.prepare(network), {}
    for split, part in rows.items():
        results[split] = evaluate(model, part, augment, accelerator, config.per_device_eval_batch_size)
    accelerator.print(table("evaluation", results))
    for split, result in results.items():
        if result.per_class:
            accelerator.print(class_table(split, result, network.config.id2label.values()))


def agreed(accelerator: Accelerator, signals: list[int], in_step: bool) -> bool:
    """Whether to stop; several processes stop after the same step, so they ask each other where they meet anyway."""
    if accelerator.num_processes == 1:
        return bool(signals)
    if not in_step:
        return False
    return accelerator.reduce(torch.tensor([len(signals)], device=accelerator.device), "sum").item() > 0


def main(arguments: list[str] | None = None):
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments, __doc__)
        accelerator = build_accelerator(config)
        first = contextlib.nullcontext() if config.streaming else accelerator.local_main_process_first()
        with first:  # the others read what it has prepared
            data = load_image_data(
                config.dataset_name,
                config_name=config.dataset_config_name,
                revision=config.dataset_revision,
                image_column=config.image_column_name,
                label_column=config.label_column_name,
                validation_fraction=config.train_val_split,
                max_train_samples=config.max_train_samples,
                max_eval_samples=config.max_eval_samples,
                seed=config.seed,
                streaming=config.streaming,
                count_classes=config.class_weights is not None,
                on_main_process=functools.partial(on_main_process, accelerator),
            )
        check_labels(config, data.labels)
        if config.push_to_hub:
            check_hub(config)
        check_batch_size(config, data.sizes["train"], accelerator.num_processes)
        network = build_model(config, data.labels, data.channels)
        rows, processor_content = build_splits(config, data, pair(network.config.image_size), accelerator)
        processor = next(iter(rows.values())).decode.processor
        augment = Augment(processor, len(data.labels.class_names), **config.group("augmentation"))
        folder = checkpoint = None
        if not config.eval_only:
            folder, checkpoint = on_main_process(accelerator, lambda: open_folder(config, accelerator.num_processes))
    except ValueError as error:
        raise stop(str(error)) from error

    sizes = ", ".join(f"{part.size} {split}" for split, part in rows.items())
    classes = f"{len(data.labels.class_names)} {'outputs' if data.labels.kind == 'number' else 'classes'}"
    accelerator.print(f"{config.dataset_name}: {sizes} images, {classes}")
    if config.streaming and "validation" not in rows and not config.eval_only:
        accelerator.print("there is no validation split, and a stream is not split: nothing is validated on the way")
    devices = f"{accelerator.num_processes} x {accelerator.device}"
    accelerator.print(f"ViTSimple: {network.num_parameters():,} parameters, {devices}")
    augment = augment.to(accelerator.device)
    if config.torch_compile and accelerator.device.type == "cuda":
        augment.compile()
    try:
        if config.eval_only:
            evaluate_only(config, accelerator, network, rows, augment)
        else:
            if accelerator.is_main_process:
                write_atomically(folder / "preprocessor_config.json", json.dumps(processor_content, indent=2) + "\n")
                record_run(config, data, folder)
            train(config, accelerator, network, rows, augment, folder, checkpoint)
    except BadImage as error:
        raise stop(str(error)) from error
    skipped = [f"{row}: {why}" for bad in all_bad_images(rows).values() for row, why in bad.items()]
    if skipped:
        accelerator.print("\n  ".join([f"skipped {len(skipped)} images that cannot be used:", *skipped]))
    if not config.eval_only:
        accelerator.print(
            f"saved in {folder}; load it anywhere on this machine with\n"
            f'  transformers.pipeline("image-classification", "{folder.resolve()}", trust_remote_code=True)'
        )
        if config.push_to_hub and accelerator.is_main_process:
            try:
                share(config, folder, "end")
            except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
                again = f"python push_to_hub.py {folder} {config.hub_model_id}"
                raise stop(f"--push_to_hub: {error}\nthe folder is complete, to be pushed by: {again}") from error
    accelerator.wait_for_everyone()  # a gather that is still being cleaned up can deadlock gloo's end
    accelerator.end_training()


if __name__ == "__main__":
    main()
