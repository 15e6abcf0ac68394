"""Trains a linear classifier on the features of a frozen checkpoint: fast, and a good first test of a pretrained model.

    python examples/linear_probe.py
    python examples/linear_probe.py --model your-name/your-vit --dataset path/to/images

The backbone processes every image once. The classifier becomes the head of a checkpoint that loads in one line.
"""

import argparse

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="checkpoint: a folder or a Hub id")
    parser.add_argument("--dataset", default="data/digits", help="splits train and test, columns image and label")
    parser.add_argument("--output_dir", default="outputs/probe")
    parser.add_argument("--weight_decay", type=float, default=1e-4, help="of the classifier")
    return parser.parse_args()


@torch.no_grad()
def extract(model, processor, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the head (N, D) and the labels (N,)."""
    features, labels = [], []
    with model.head.register_forward_pre_hook(lambda head, inputs: features.append(inputs[0].float())):
        for batch in tqdm(rows.iter(64), total=-(-len(rows) // 64), leave=False):
            model(processor(batch["image"], return_tensors="pt").pixel_values.to(model.device, model.dtype))
            labels += batch["label"]
    return torch.cat(features), torch.tensor(labels, device=model.device)


def fit(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor, weight_decay: float):
    """Logistic regression by L-BFGS."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + weight_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def main():
    options = parse_arguments()
    dataset = load_dataset(options.dataset)
    names = dataset["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForImageClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        trust_remote_code=True,
    ).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    train, test = (extract(model, processor, dataset[split]) for split in ("train", "test"))
    fit(model.head, *train, options.weight_decay)
    correct = (model.head(test[0]).argmax(-1) == test[1]).sum().item()
    print(f"{correct} of {len(test[1])} test images correct")
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
