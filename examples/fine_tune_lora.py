"""Fine-tunes a checkpoint with LoRA (Hu et al., 2021, arXiv:2106.09685) through PEFT: pip install peft.

    python examples/fine_tune_lora.py
    python examples/fine_tune_lora.py --model your-name/your-vit --dataset path/to/images

Saves the adapter, which is small, and a checkpoint with the adapter merged into the weights.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--dataset", default="data/digits", help="splits train and test, columns image and label")
    parser.add_argument("--output_dir", default="outputs/lora")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    return parser.parse_args()


def main():
    options = parse_arguments()
    adapter = f"{options.output_dir}/adapter"
    dataset = load_dataset(options.dataset)
    names = dataset["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    processor = AutoImageProcessor.from_pretrained(options.model)

    def load_base():
        return AutoModelForImageClassification.from_pretrained(options.model, trust_remote_code=True, **labels)

    def collate(rows):
        pixel_values = processor([row["image"] for row in rows], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.tensor([row["label"] for row in rows])}

    # The adapter changes the attention projections; the head is trained and saved with it.
    model = get_peft_model(load_base(), LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        options.output_dir,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=16,
        label_names=["labels"],  # Trainer does not see the model's signature through the adapter
        remove_unused_columns=False,  # the collator needs the images
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )
    trainer.train()
    print(trainer.evaluate())
    model.save_pretrained(adapter)

    # The base model is loaded with the labels of the adapter, so that its head has the same size.
    merged = PeftModel.from_pretrained(load_base(), adapter).merge_and_unload()
    merged.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
