"""Fine-tunes the checkpoint in a folder with Trainer, which pushes at every save and at the end.

python push_with_trainer.py FOLDER
"""

import sys

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder)
examples = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 10} for number in range(32)]
arguments = TrainingArguments(
    "trained",
    max_steps=4,
    save_steps=2,
    hub_strategy="every_save",
    push_to_hub=True,
    hub_model_id="user/trained",
    hub_always_push=True,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=examples, processing_class=processor)
trainer.save_model()  # so that the code is there before the first push
trainer.train()
trainer.push_to_hub()
