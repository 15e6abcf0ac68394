"""Fine-tunes a checkpoint with Trainer: whole, stopped and resumed, with LoRA, and its head alone.

python fine_tune.py CHECKPOINT DIGITS
"""

import copy
import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

folder, adapter, digits = sys.argv[1], "adapter", load_dataset(sys.argv[2])
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
        work,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=rate,
        seed=0,
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=digits["train"].select(range(480)),
        eval_dataset=digits["test"],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )


def accuracy(model, work="evaluated"):
    return trainer(model, work, 0.0).evaluate()["eval_accuracy"]


@torch.no_grad()
def logits(model):
    return model.eval()(collate(digits["test"])["pixel_values"]).logits


results = {"start": accuracy(open_model())}
best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 2}
best |= {"metric_for_best_model": "accuracy", "bf16": True, "gradient_checkpointing": True, "num_train_epochs": 3}


class StopAfterOneEpoch(TrainerCallback):
    def on_epoch_end(self, arguments, state, control, **others):
        control.should_training_stop = state.epoch >= 1


whole = trainer(open_model(), "whole", 1e-3, **best)
whole.train()
stopped = trainer(open_model(), "resumed", 1e-3, **best)
stopped.add_callback(StopAfterOneEpoch())
stopped.train()
resumed = trainer(open_model(), "resumed", 1e-3, **best)
resumed.train(resume_from_checkpoint=True)
results["whole"] = accuracy(whole.model)
results["best"] = max(row.get("eval_accuracy", 0) for row in whole.state.log_history)
results["resumed"] = (logits(resumed.model) - logits(whole.model)).abs().max().item()
whole.save_model()
torch.save(whole.model.state_dict(), "whole.pt")

lora = get_peft_model(open_model(), LoraConfig(target_modules=["qkv"], modules_to_save=["head"], r=8))
trainer(lora, "lora", 5e-3, num_train_epochs=4, save_strategy="no", gradient_checkpointing=True).train()
results["lora"] = accuracy(lora)
lora.save_pretrained(adapter)
merged = PeftModel.from_pretrained(open_model(), adapter).merge_and_unload()
results["merged"] = (logits(merged) - logits(lora)).abs().max().item()
torch.save(logits(lora), "logits.pt")

probe = open_model()
probe.requires_grad_(False)
probe.head.requires_grad_(True)
before = copy.deepcopy(probe.state_dict())
trainer(probe, "probe", 1e-2, num_train_epochs=4, save_strategy="no").train()
results["changed"] = [name for name, tensor in probe.state_dict().items() if not torch.equal(tensor, before[name])]
results["probe"] = accuracy(probe)
print(json.dumps(results))
