"""How much the maps of explain.py depend on what a model has learned (Adebayo et al., arXiv:1810.03292, section 3).

    python -m benchmarks.sanity outputs/digits

compares the maps of a checkpoint with those of copies whose blocks have random weights, on the first 50 test images of
the packaged digits, and prints the mean rank correlation of each of three copies. A good map is below 0.5. Weights are
drawn again, as before training, or are the trained ones in random order. The last line compares the relevance for an
image's label with that for the next label, in the trained model.
"""

import argparse
import copy
import statistics

import numpy as np
import torch
from datasets import load_dataset

from vit_simple.files import ROOT
from vit_simple.inference.explain import explain_image
from vit_simple.inference.explanation import Explanation
from vit_simple.inference.opening import open_model

MAPS = {
    "relevance": lambda seen: seen.relevance,
    "attention of the last block": lambda seen: seen.attention[-1].mean(dim=0),
    "rollout": lambda seen: seen.rollout,
}


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of two maps without ties."""
    ranks = torch.stack([each.flatten().argsort().argsort().double() for each in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def randomized(model: torch.nn.Module, way: str, seed: int) -> torch.nn.Module:
    """A copy of a model whose blocks have random weights."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    if way == "newly drawn":
        for module in model.blocks.modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)
    else:
        for parameter in model.blocks.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a model for the digits")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    model, processor = open_model(arguments.checkpoint)
    rows = load_dataset(str(ROOT / "data" / "digits"), split="test").select(range(arguments.images))
    images = [(np.array(row["image"].convert("RGB")), row["label"]) for row in rows]

    def explanations(model: torch.nn.Module, shift: int = 0) -> list[Explanation]:
        return [explain_image(model, processor, image, label=(label + shift) % 10) for image, label in images]

    trained = explanations(model)
    found: dict[str, dict[str, list[str]]] = {name: {} for name in MAPS}
    for way in "newly drawn", "random order":
        for seed in range(arguments.seeds):
            others = explanations(randomized(model, way, seed))
            for name, of in MAPS.items():
                mean = statistics.mean(rank_correlation(of(a), of(b)) for a, b in zip(trained, others))
                found[name].setdefault(way, []).append(f"{round(mean, 2) + 0:.2f}")
    print("| map | newly drawn | random order |\n|---|---|---|")
    for name, ways in found.items():
        print(f"| {name} | {' | '.join(', '.join(values) for values in ways.values())} |")
    others = explanations(model, shift=1)
    mean = statistics.mean(rank_correlation(a.relevance, b.relevance) for a, b in zip(trained, others))
    print(f"relevance for the next label: {mean:.2f}")


if __name__ == "__main__":
    main()
