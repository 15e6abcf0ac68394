"""Training with transformers' Trainer."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.conftest import tiny
from vit_simple.data.augment import Augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.data.processors import open_processor, stock_processor
from vit_simple.files import ROOT
from vit_simple.training.optim import parameter_groups

ROWS = [
    {"pixel_values": pixels, "labels": label % 3}
    for label, pixels in enumerate(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
]


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", disable_tqdm=True, seed=0, **options)


@pytest.mark.parametrize("micro_batch, accumulation", [(4, 4), (8, 2)])
def test_gradient_accumulation_gives_the_loss_and_gradients_of_the_whole_batch(tmp_path, micro_batch, accumulation):
    results = []
    for size, steps in [(16, 1), (micro_batch, accumulation)]:
        model = tiny(num_labels=3)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        trainer = Trainer(
            model,
            arguments(tmp_path / str(size), max_steps=1, logging_steps=1, save_strategy="no", **options),
            train_dataset=ROWS[:16],
            optimizers=(optimizer, constant),
        )
        trainer.train()
        gradients = {name: before[name] - parameter for name, parameter in model.named_parameters()}
        results.append((trainer.state.log_history[0]["loss"], gradients))
    (loss, gradients), (accumulated_loss, accumulated) = results
    assert accumulated_loss == pytest.approx(loss, rel=1e-4)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
def test_collator_augments_training_rows_and_evaluates_as_train_py_did(run_folder, tmp_path):
    last_line = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    processor = AutoImageProcessor.from_pretrained(run_folder)
    options = {"problem_type": "single_label_classification"}
    model = AutoModelForImageClassification.from_pretrained(run_folder, **options)
    augment = Augment(processor, 10, mixup_alpha=0.2, label_smoothing_factor=0.1)
    digits = load_dataset(str(ROOT / "data/digits"))
    trainer = Trainer(
        model,
        arguments(
            tmp_path / "run",
            num_train_epochs=4,
            per_device_train_batch_size=32,
            remove_unused_columns=False,
            logging_steps=50,
        ),
        data_collator=TrainerCollator(processor, augment),
        train_dataset=digits["train"].with_transform(mark_for_augmentation),
        eval_dataset=digits["test"],
        compute_metrics=lambda result: {"correct": int((result.predictions.argmax(-1) == result.label_ids).sum())},
        optimizers=(torch.optim.AdamW(parameter_groups(model, learning_rate=5e-4, weight_decay=0.05)), None),
    )
    before = trainer.evaluate()
    assert before["eval_correct"] == last_line["correct"]
    assert before["eval_loss"] == pytest.approx(last_line["loss"], rel=1e-4)
    trainer.train()
    mixed = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]  # ten seeds: by 0.67 on average, with a deviation of 0.11
    assert mixed > after["eval_loss"]  # mixed and smoothed labels are harder than those of the evaluation
    trainer.save_model()
    assert (
        AutoModelForImageClassification.from_pretrained(tmp_path / "run").config.problem_type == options["problem_type"]
    )


def test_random_crops_are_parts_of_the_marked_images_only():
    processor = open_processor(stock_processor((32, 32)))
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    ramp = PIL.Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8))
    rows = {"image": [ramp] * 64, "label": [0] * 64}
    augment = Augment(processor, num_classes=2)
    collator = TrainerCollator(processor, augment, random_resized_crop=0.25)

    def pixels(rows: dict) -> torch.Tensor:
        batch = collator([dict(zip(rows, values)) for values in zip(*rows.values())])
        return batch["pixel_values"] * augment.std + augment.mean

    torch.manual_seed(0)
    red, green, _ = pixels(mark_for_augmentation(rows)).unbind(1)
    width, height = (shades.flatten(1).amax(1) - shades.flatten(1).amin(1) for shades in (red, green))
    assert (width * height > 0.2).all() and (width * height).std() > 0.1
    assert (width / height).clamp(0.7, 1.4).equal(width / height)
    whole = processor(rows["image"], return_tensors="pt")["pixel_values"] * augment.std + augment.mean
    torch.testing.assert_close(pixels(rows), whole, rtol=0, atol=1e-6)


class StopAfterOneEpoch(TrainerCallback):
    def on_epoch_end(self, arguments, state, control, **others):
        control.should_training_stop = state.epoch >= 1


def test_trainer_resumes_a_stopped_run_with_the_same_weights(tmp_path):
    def trainer(name: str, *callbacks) -> Trainer:
        options = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "epoch"}
        return Trainer(
            tiny(num_labels=3),
            arguments(tmp_path / name, gradient_checkpointing=True, use_cpu=True, **options),
            train_dataset=ROWS,
            callbacks=list(callbacks),
        )

    whole = trainer("whole")
    whole.train()
    trainer("parts", StopAfterOneEpoch()).train()
    parts = trainer("parts")
    parts.train(resume_from_checkpoint=True)
    assert parts.state.global_step == whole.state.global_step == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name
