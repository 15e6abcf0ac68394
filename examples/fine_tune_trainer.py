"""Fine-tunes a checkpoint with transformers' Trainer, with the options and the parameter groups of train.py.

    python examples/fine_tune_trainer.py
    python examples/fine_tune_trainer.py --model your-name/your-vit --dataset path/to/images --bf16

The learning rate, the number of epochs and other options depend on the number of training images, as in train.py. A
tenth of them is held out and evaluated after each epoch. If the dataset has another number of classes than the
checkpoint, the model gets a new head.
"""

import argparse
import math

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from vit_simple.data.augment import Augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.training.defaults import fine_tuning_options
from vit_simple.training.optim import parameter_groups


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--dataset", default="data/digits", help="splits train and test, columns image and label")
    parser.add_argument("--output_dir", default="outputs/fine-tuned")
    parser.add_argument("--epochs", type=int, help="default: what suits the number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; needs a GPU")
    return parser.parse_args()


def main():
    options = parse_arguments()
    set_seed(options.seed)  # of the new head
    dataset = load_dataset(options.dataset)
    parts = dataset["train"].train_test_split(test_size=0.1, seed=options.seed, stratify_by_column="label")
    names = dataset["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForImageClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",  # augmented labels are probabilities of one class
        dtype=torch.float32,  # also with --bf16, which autocasts the matrix products only
        trust_remote_code=True,
    )
    chosen = fine_tuning_options(len(parts["train"]), model.config.hidden_size)
    epochs, batch_size = options.epochs or chosen["num_train_epochs"], chosen["per_device_train_batch_size"]
    arguments = TrainingArguments(
        options.output_dir,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.1 * epochs * len(parts["train"]) / batch_size),
        seed=options.seed,
        bf16=options.bf16,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        remove_unused_columns=False,  # the collator needs the images
        report_to="none",
    )
    collator = TrainerCollator(  # augments only the rows that are marked
        processor, Augment(processor, num_classes=len(names)), random_resized_crop=chosen["random_resized_crop"]
    )
    groups = parameter_groups(model, chosen["learning_rate"], weight_decay=0.05, layer_decay=chosen["layer_decay"])
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator,
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
