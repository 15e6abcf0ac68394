"""transformers' Trainer on a saved folder."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from tests.conftest import environment_without_package, run_python, tiny
from vit_simple.data.augment import Augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.files import ROOT
from vit_simple.training.optim import parameter_groups

ROWS = [
    {"pixel_values": pixels, "labels": label % 3}
    for label, pixels in enumerate(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
]


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", disable_tqdm=True, seed=0, **options)


@pytest.mark.parametrize("micro_batch, accumulation", [(4, 4), (8, 2)])
def test_accumulated_micro_batches_give_the_loss_and_gradients_of_the_batch(tmp_path, micro_batch, accumulation):
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


def test_the_collator_mixes_in_training_and_evaluates_as_the_run_did(run_folder, tmp_path):
    said = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
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
        optimizers=(torch.optim.AdamW(parameter_groups(model, learning_rate=2e-3, weight_decay=0.05)), None),
    )
    before = trainer.evaluate()
    assert before["eval_correct"] == said["correct"] and before["eval_loss"] == pytest.approx(said["loss"], rel=1e-4)
    trainer.train()
    mixed = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert mixed > after["eval_loss"]  # mixed and smoothed labels are harder than those of the evaluation
    trainer.save_model()
    assert (
        AutoModelForImageClassification.from_pretrained(tmp_path / "run").config.problem_type == options["problem_type"]
    )


FINE_TUNE = """
import copy, json, sys, torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers import Trainer, TrainerCallback, TrainingArguments

folder, adapter, every_digit = sys.argv[1], "adapter", load_dataset(sys.argv[2])
digits = every_digit.filter(lambda label: label < 2, input_columns="label")  # easy, whatever the seed
processor = AutoImageProcessor.from_pretrained(folder)
names = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}

def collate(rows):
    pixel_values = processor([row["image"] for row in rows], return_tensors="pt").pixel_values
    return {"pixel_values": pixel_values, "labels": torch.tensor([row["label"] % 2 for row in rows])}

def open_model():
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **names)

def trainer(model, work, rate, **options):
    arguments = TrainingArguments(
        work, per_device_train_batch_size=16, gradient_accumulation_steps=2, learning_rate=rate, seed=0, use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], report_to="none", disable_tqdm=True, **options,
    )
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=digits["train"], eval_dataset=digits["test"],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )

def accuracy(model, work="evaluated"):
    return trainer(model, work, 0.0).evaluate()["eval_accuracy"]

@torch.no_grad()
def logits(model):
    return model.eval()(collate(every_digit["test"])["pixel_values"]).logits

said = {}
best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 2}
best |= {"metric_for_best_model": "accuracy", "bf16": True, "gradient_checkpointing": True, "num_train_epochs": 3}

class Stop(TrainerCallback):
    def on_epoch_end(self, arguments, state, control, **others):
        control.should_training_stop = state.epoch >= 1

whole = trainer(open_model(), "whole", 5e-4, **best)
whole.train()
parts = trainer(open_model(), "parts", 5e-4, **best)
parts.add_callback(Stop())
parts.train()
parts = trainer(open_model(), "parts", 5e-4, **best)
parts.train(resume_from_checkpoint=True)
said["whole"] = accuracy(whole.model)
said["best"] = max(row.get("eval_accuracy", 0) for row in whole.state.log_history)
said["resumed"] = (logits(parts.model) - logits(whole.model)).abs().max().item()
whole.save_model()
torch.save(whole.model.state_dict(), "whole.pt")

lora = get_peft_model(open_model(), LoraConfig(target_modules=["qkv"], modules_to_save=["head"], r=8))
trainer(lora, "lora", 5e-3, num_train_epochs=4, save_strategy="no", gradient_checkpointing=True).train()
said["lora"] = accuracy(lora)
lora.save_pretrained(adapter)
merged = PeftModel.from_pretrained(open_model(), adapter).merge_and_unload()
said["merged"] = (logits(merged) - logits(lora)).abs().max().item()
torch.save(logits(lora), "logits.pt")

probe = open_model()
probe.requires_grad_(False)
probe.head.requires_grad_(True)
before = copy.deepcopy(probe.state_dict())
trainer(probe, "probe", 1e-2, num_train_epochs=4, save_strategy="no").train()
said["changed"] = [name for name, tensor in probe.state_dict().items() if not torch.equal(tensor, before[name])]
said["probe"] = accuracy(probe)
print(json.dumps(said))
"""
OPEN_ELSEWHERE = """
import sys, torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, work, digits, remote = *sys.argv[1:4], {"trust_remote_code": True}
whole = AutoModelForImageClassification.from_pretrained(f"{work}/whole", **remote)
assert list(whole.config.id2label.values()) == ["even", "odd"]
adapter, remote["num_labels"] = f"{work}/adapter", 2
images = load_dataset(digits)["test"]["image"]
pixel_values = AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt").pixel_values
with torch.no_grad():
    for model in (
        AutoModelForImageClassification.from_pretrained(adapter, **remote),
        PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(folder, **remote), adapter),
    ):
        assert torch.equal(model.eval()(pixel_values).logits, torch.load(f"{work}/logits.pt"))
for name, tensor in torch.load(f"{work}/whole.pt").items():
    assert torch.equal(tensor, whole.state_dict()[name]), name
"""


def test_remote_code_is_fine_tuned_by_trainer_by_lora_and_as_a_probe(run_folder, tmp_path):
    python = environment_without_package(tmp_path / "environment")
    digits = ROOT / "data/digits"
    said = json.loads(run_python(python, tmp_path / "work", FINE_TUNE, run_folder, digits).splitlines()[-1])
    assert min(said["whole"], said["lora"], said["probe"]) > 0.75, said  # 0.5 is chance
    assert said["whole"] == pytest.approx(said["best"], abs=0.03)  # while it trained, it was evaluated in bfloat16
    assert said["resumed"] == 0 and said["merged"] < 1e-4
    assert said["changed"] == ["head.weight", "head.bias"]
    assert (tmp_path / "work/whole/modeling_vit_simple.py").exists()
    run_python(python, tmp_path / "again", OPEN_ELSEWHERE, run_folder, tmp_path / "work", digits)
