"""Loads what fine_tune.py saved in another process, and compares.

python load_fine_tuned.py CHECKPOINT WORK DIGITS
"""

import sys

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, work, digits = sys.argv[1:4]
whole = AutoModelForImageClassification.from_pretrained(f"{work}/whole", trust_remote_code=True)
assert list(whole.config.id2label.values()) == ["even", "odd"]
adapter, options = f"{work}/adapter", {"trust_remote_code": True, "num_labels": 2}
images = load_dataset(digits)["test"]["image"]
pixel_values = AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt").pixel_values
model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(folder, **options), adapter)
with torch.no_grad():
    assert torch.equal(model.eval()(pixel_values).logits, torch.load(f"{work}/logits.pt"))
for name, tensor in torch.load(f"{work}/whole.pt").items():
    assert torch.equal(tensor, whole.state_dict()[name]), name
