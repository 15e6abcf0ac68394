"""Trains like transformers' examples/pytorch/image-classification/run_image_classification_no_trainer.py.

torchvision opens, crops, flips and normalizes each image in a DataLoader without workers, the example's default. It
uses Accelerate, AdamW and a linear schedule, evaluates on a fraction of train after each epoch, and saves the model:
transformers' own ViT built from a config (for `benchmarks.train`) or a checkpoint (for `benchmarks.fine_tune`).
"""

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from torchvision.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_scheduler,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--image_column_name", default="image")
    parser.add_argument("--config", type=json.loads, help="fields of ViTConfig as JSON")
    parser.add_argument("--model_name_or_path", help="checkpoint of vit_simple")
    parser.add_argument("--image_size", type=int, help="of the checkpoint's model")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--train_val_split", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(arguments.seed)
    splits = load_dataset(arguments.dataset_name)
    if "validation" not in splits:
        halves = splits["train"].train_test_split(arguments.train_val_split, seed=arguments.seed)
        splits = {"train": halves["train"], "validation": halves["test"]}
    labels = splits["train"].features["label"].names
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    if arguments.model_name_or_path is not None:
        path, size = arguments.model_name_or_path, arguments.image_size
        model = AutoModelForImageClassification.from_pretrained(path, image_size=size, trust_remote_code=True, **names)
        stored = AutoImageProcessor.from_pretrained(path)
        colors = {"image_mean": stored.image_mean, "image_std": stored.image_std}
    else:
        model = ViTForImageClassification(ViTConfig(**arguments.config, **names))
        size, colors = arguments.config["image_size"], {}
    processor = ViTImageProcessor(size={"height": size, "width": size}, **colors)

    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    training = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalize])
    evaluation = Compose([Resize(size), CenterCrop(size), ToTensor(), normalize])

    def preprocess_with(transform: Compose):
        def preprocess(batch):
            batch["pixel_values"] = [transform(image.convert("RGB")) for image in batch[arguments.image_column_name]]
            return batch

        return preprocess

    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    batch_size, eval_batch_size = arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size
    train_rows = splits["train"].with_transform(preprocess_with(training))
    train_loader = DataLoader(train_rows, shuffle=True, collate_fn=collate, batch_size=batch_size)
    eval_rows = splits["validation"].with_transform(preprocess_with(evaluation))
    eval_loader = DataLoader(eval_rows, collate_fn=collate, batch_size=eval_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    steps = arguments.num_train_epochs * len(train_loader)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )

    progress = tqdm(total=steps, disable=not accelerator.is_local_main_process)
    for _ in range(arguments.num_train_epochs):
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.update(1)
        model.eval()
        correct = count = 0
        for batch in eval_loader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            correct += (predictions == references).sum().item()
            count += len(references)
    progress.close()
    accelerator.unwrap_model(model).save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(f"{correct} of {count} held-out images correct")


if __name__ == "__main__":
    main()
