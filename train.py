"""Trains ViTSimple on an image dataset, from scratch or from a checkpoint, on one device or several.

python train.py                                    # the digits recipe
python train.py recipes/cifar10.yaml --seed 1
python train.py --dataset_name path/to/images --model_name_or_path outputs/vit-b16
torchrun --nproc_per_node 8 train.py recipes/imagenet_s16.yaml
"""

import contextlib
import functools
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vit_simple import ViTSimpleForImageClassification
from vit_simple.configuration_vit_simple import pair
from vit_simple.data.augment import Augment
from vit_simple.data.fingerprint import fingerprint
from vit_simple.data.labels import Labels
from vit_simple.files import command_errors, terminal_text, write_atomically
from vit_simple.inference.features import are_fixed, quick_probe, train_on_features
from vit_simple.sharing.card import build_card
from vit_simple.sharing.record import record
from vit_simple.sharing.run import BackgroundPush, check_hub, record_run, share
from vit_simple.training.calibration import Fitted, divide_head
from vit_simple.training.checkpoint import Checkpoints, count_changed_images, log_metrics, resume_metrics, save_result
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.devices import build_accelerator, end_together, mixed_precision_of, on_main_process
from vit_simple.training.evaluation import evaluate, evaluate_splits
from vit_simple.training.folder import check_output_dir, how_to_resume, mark_finished, open_folder, start_in
from vit_simple.training.interrupt import catch_signals, should_stop
from vit_simple.training.meter import Meter
from vit_simple.training.metrics import Evaluation, table
from vit_simple.training.optim import EMA, build_optimizers, schedule
from vit_simple.training.plots import plot_run, predict_samples
from vit_simple.training.report import (
    optional,
    print_confidence,
    print_end,
    print_image_notes,
    print_probe,
    print_results,
    print_setup,
)
from vit_simple.training.setup import build_model, build_splits, denormalize_head, open_inputs
from vit_simple.training.step import augmented_batches, can_capture, can_train_on_features, capture, criterion, probes


def export(
    config: TrainConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    raw_model: ViTSimpleForImageClassification,
    labels: Labels,
    folder: Path,
    fitted: Fitted | None = None,
):
    """Saves the model's present weights, its config and its code, with what was fitted on the validation split.

    Called by every process.
    """
    weights, fitted = accelerator.get_state_dict(model), fitted or Fitted()
    if accelerator.is_main_process:
        weights = divide_head(denormalize_head(weights, labels), fitted.divisor)
        save_result(raw_model, weights, folder, config.adapter_base)
        record(folder, **asdict(fitted))


def write_card(config: TrainConfig, folder: Path):
    write_atomically(folder / "README.md", build_card(folder, config.hub_model_id, license=config.license))


@command_errors("train.py")
def main(arguments: list[str] | None = None):
    # Set up: data, model, and the folder of the run

    config = parse_config(sys.argv[1:] if arguments is None else arguments, __doc__)
    check_output_dir(config)
    accelerator = build_accelerator(config)
    config.mixed_precision = mixed_precision_of(config)
    config, data, base = open_inputs(config, accelerator)
    if config.push_to_hub:
        check_hub(config, base)
    raw_model = build_model(config, data.labels, data.channels, base)
    splits, processor_content = build_splits(config, data, pair(raw_model.config.image_size), accelerator, base)
    processor = next(iter(splits.values())).decode.processor
    augment = Augment(processor, len(data.labels.class_names), **config.group("augmentation")).to(accelerator.device)
    print_setup(accelerator, splits, raw_model, config.dataset_name, base)
    if can_train_on_features(config, accelerator) and are_fixed(raw_model, splits["train"]):
        with accelerator.main_process_first():
            augment = train_on_features(raw_model, splits, config.label_smoothing_factor).to(accelerator.device)
    use_bf16, on_gpu = config.mixed_precision == "bf16", accelerator.device.type == "cuda"
    if config.torch_compile and on_gpu:
        augment.compile()
    eval_options = augment, accelerator, config.per_device_eval_batch_size, use_bf16 and on_gpu, config.calibrate
    if config.eval_only:
        model = accelerator.prepare(raw_model)
        results = evaluate_splits(model, splits, *eval_options)
        print_results(accelerator, "evaluation", results, data.labels.class_names)
        print_confidence(accelerator, results, config.model_name_or_path)
        print_image_notes(accelerator, splits)
        return end_together(accelerator)
    is_main, dataset = accelerator.is_main_process, (config.dataset_name, config.dataset_config_name)
    identity = on_main_process(accelerator, lambda: fingerprint(data, *dataset, config.dataset_revision))
    folder, checkpoint = on_main_process(accelerator, lambda: open_folder(config, accelerator.num_processes, identity))

    batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps_per_epoch = splits["train"].size // (batch_size * accumulation * accelerator.num_processes)
    total_steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    eval_steps = config.eval_steps or steps_per_epoch
    loss_fn = criterion(data.labels, data.labels.weights().to(accelerator.device) if config.class_weights else None)
    muon_lr = config.muon_learning_rate if config.optim == "muon" else None
    optimizers = build_optimizers(raw_model, config.learning_rate, config.weight_decay, config.layer_decay, muon_lr)
    model, *optimizers = accelerator.prepare(raw_model, *optimizers)
    if can_capture(config, accelerator):
        accelerator.print(f"compiled in {capture(raw_model, batch_size, use_bf16):.0f} s")
    ema = EMA(raw_model, config.ema_decay)
    if config.report_to:
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.init_trackers("vit_simple", {name: str(value) for name, value in asdict(config).items()})

    start, meter = time.perf_counter(), Meter(accelerator, model, ema)
    checkpoints = Checkpoints(accelerator, folder, meter, splits, ema, config.save_total_limit, identity)
    if checkpoint is not None:
        checkpoints.load(checkpoint)
    elif config.resume_from_checkpoint:
        accelerator.print(terminal_text(f"no complete checkpoint in {folder}: starting from the first step"))
    first_step = checkpoints.first_step
    if is_main:
        start_in(folder, config)
        write_atomically(folder / "preprocessor_config.json", json.dumps(processor_content, indent=2) + "\n")
        record_run(config, data, base, folder)
        if config.resume_from_checkpoint:
            resume_metrics(folder, first_step)
    if probes(config, data, accelerator) and checkpoint is None:
        images = total_steps * batch_size * accumulation * accelerator.num_processes
        found = on_main_process(accelerator, functools.partial(quick_probe, raw_model, splits, images))
        if is_main and found is not None:
            record(folder, probe=print_probe(*found, splits["validation"].size))
    log = functools.partial(log_metrics, accelerator, folder, steps_per_epoch)
    advice = functools.partial(how_to_resume, folder)
    background_push = BackgroundPush(config, folder)

    # The loop

    batches = augmented_batches(splits["train"], augment, config, first_step, meter.waiting)
    progress = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", disable=not is_main)
    model.train()
    validations: dict[str, Evaluation] = {}
    with command_errors("train.py", advice), catch_signals() as signals, progress:
        for step in range(first_step, total_steps):
            for micro_step in range(accumulation):
                x, targets = next(batches)
                is_last = micro_step + 1 == accumulation
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=use_bf16):
                        logits = model(x).logits
                    loss = loss_fn(logits.float(), targets) / accumulation
                    accelerator.backward(loss)
                meter.add(loss.detach())
            gradient_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            meter.note_gradient_norm(gradient_norm, step + 1)
            lr_factor = schedule(step, total_steps, config.warmup_steps, config.lr_scheduler_type, config.decay_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * lr_factor
                optimizer.step()
                optimizer.zero_grad()
            ema.update(step)

            done = step + 1
            progress.update()
            is_logging_step, is_end = done % config.logging_steps == 0, done == total_steps

            # Once in a while: log
            if is_logging_step or is_end:
                meter.raise_if_not_finite(done if is_end else None)
                summary = meter.summary(step % config.logging_steps + 1, batch_size * accelerator.num_processes)
                log(done, "train", **summary, lr=config.learning_rate * lr_factor)
                progress.set_postfix_str(
                    f"loss {summary['loss']:.3f}, lr {config.learning_rate * lr_factor:.1e}, "
                    f"{summary['images_per_second']:.0f} images/s, waiting {summary['data_wait']:.1%}"
                )

            # Once in a while: evaluate the raw and the averaged weights
            if "validation" in splits and (done % eval_steps == 0 or is_end):
                meter.raise_if_not_finite(done)
                validations = {}
                for weights in ema.variants:
                    with meter.paused(), ema.weights(weights):
                        validations[weights] = evaluate(model, splits["validation"], *eval_options, fits=is_end)
                    log(done, "validation", weights=weights, **validations[weights].values)
                if is_main:
                    rows = {f"validation {weights}": result for weights, result in validations.items()}
                    progress.write(table(f"step {done}", rows))

            # Once in a while, or at a signal: save, and push
            stopping = should_stop(accelerator, signals, is_logging_step)
            if not is_end and (stopping or done % config.save_steps == 0):
                with meter.paused():
                    checkpoints.save(done)
                    if config.push_to_hub and config.hub_strategy == "every_save" and not stopping:
                        with ema.weights(ema.variants[-1]):
                            export(config, accelerator, model, raw_model, data.labels, folder)
                        if is_main:
                            progress.write(terminal_text(background_push.start(done)))
                if stopping:
                    accelerator.print("\n" + terminal_text(f"stopped by a signal: {how_to_resume(folder)}"))
                    end_together(accelerator)
                    raise SystemExit(128 + max(signals, default=signal.SIGTERM))

    # The end: save the better weights, evaluate them once, and share them

    best = ema.variants[-1]
    if "validation" in splits and validations["raw"].score > validations[best].score:
        best = "raw"
    fitted = validations[best].fitted if validations else None
    last_split = next((name for name in ("test", "validation") if name in splits), None)
    result = samples = None
    with command_errors("train.py", advice), ema.weights(best):
        if is_main:
            checkpoints.replace_earlier()
        export(config, accelerator, model, raw_model, data.labels, folder, fitted)
        if is_main:
            write_card(config, folder)  # so that the card is not an earlier result's
        if last_split is not None:
            result = evaluate(model, splits[last_split], *eval_options, fitted=fitted)
            values = {"weights": best, **result.values}
            if last_split == "test":
                values["per_class"] = dict(zip(data.labels.class_names, result.per_class))
            log(total_steps, last_split, **values)
        counts = count_changed_images(splits)
        if is_main:
            record(folder, seconds=None if first_step else round(time.perf_counter() - start, 1), changed_images=counts)
            write_card(config, folder)
            mark_finished(folder, total_steps)
        if last_split is not None and config.card_images:
            with optional("predictions.png"):
                samples = predict_samples(model, splits[last_split], augment)

    # Last, what the weights do not need: the run is complete without it

    if is_main:
        with optional("the list of plots in README.md"):
            if numbered := plot_run(folder, last_split, data.labels, result, samples):
                record(folder, classes_shown_by_number=numbered)
            write_card(config, folder)
    print_end(accelerator, folder, splits, last_split, best, result, validations.get(best))
    if config.push_to_hub and is_main:
        command = shlex.join(["python", "push_to_hub.py", str(folder), config.hub_model_id])
        with command_errors("train.py", lambda: f"the folder is complete; push it with {command}"):
            if message := background_push.wait():
                accelerator.print(terminal_text(message))
            share(config, folder, "end")
    end_together(accelerator)


if __name__ == "__main__":
    main()
