"""Fine-tunes a checkpoint with transformers' Trainer, with the augmentation and parameter groups of train.py.

    python examples/fine_tune_trainer.py
    python examples/fine_tune_trainer.py --model your-name/your-vit --dataset path/to/images --bf16

The best epoch is chosen on a tenth of the training images. If the dataset has another number of classes than the
checkpoint, the model gets a new head.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from vit_simple.data.augment import Augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.training.optim import parameter_groups


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--dataset", default="data/digits", help="dataset with the columns image and label")
    parser.add_argument("--output_dir", default="outputs/fine-tuned")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; needs a GPU")
    return parser.parse_args()


def main():
    options = parse_arguments()
    dataset = load_dataset(options.dataset)
    parts = dataset["train"].train_test_split(test_size=0.1, seed=0, stratify_by_column="label")
    names = dataset["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForImageClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",  # mixup makes labels soft; they stay probabilities of one class
        dtype=torch.float32,  # also with --bf16, which autocasts the matrix products only
        trust_remote_code=True,
    )
    augment = Augment(processor, num_classes=len(names), crop_padding=1, mixup_alpha=0.2, label_smoothing_factor=0.1)
    arguments = TrainingArguments(
        options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        bf16=options.bf16,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        remove_unused_columns=False,  # the collator needs the images
        report_to="none",
    )
    groups = parameter_groups(model, learning_rate=5e-4, weight_decay=0.05, layer_decay=0.75)
    trainer = Trainer(
        model,
        arguments,
        data_collator=TrainerCollator(processor, augment),  # augments only the rows that are marked
        train_dataset=parts["train"].with_transform(mark_for_augmentation),
        eval_dataset=parts["test"],
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
        processing_class=processor,
        optimizers=(torch.optim.AdamW(groups), None),  # None: Trainer's own schedule
    )
    trainer.train()  # after an interruption: trainer.train(resume_from_checkpoint=True)
    print(trainer.evaluate(dataset["test"]))
    trainer.save_model()  # weights, config, code and image processor


if __name__ == "__main__":
    main()
