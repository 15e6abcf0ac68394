"""How far the exported models of a checkpoint agree with PyTorch on real images, and how fast each is."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import BaseImageProcessor

from ..configuration_vit_simple import ViTSimpleConfig, pair
from ..data.augment import Augment
from ..data.dataloader import LoaderContext, MapStyleSplit
from ..data.decoding import Decoder
from ..data.labels import MULTI, REGRESSION, SINGLE
from ..data.loading import load_image_data
from ..files import UserError

BATCH_SIZE = 8
EAGER = "PyTorch, eager"
PACKAGED = {"name": "data/digits"}  # the digits that come with this package


class Images:
    """Random images of a dataset, as a model takes them.

    Args:
        dataset: the arguments of `load_image_data`.
        count: the largest number of images.
        bit_depth: of gray images with more than 8 bits.

    Raises:
        UserError: the dataset cannot be loaded, or has another number of channels than the model.
    """

    def __init__(
        self, dataset: dict, config: ViTSimpleConfig, processor: BaseImageProcessor, count: int, bit_depth: int = 16
    ):
        data = load_image_data(**dataset, validation_fraction=0)
        if data.channels != config.num_channels:
            channels = f"{config.num_channels} channel{'s' if config.num_channels > 1 else ''}"
            default = ", the default because no dataset on the Hub is recorded: give --dataset_name"
            raise UserError(
                f"--dataset_name: expected images of {channels} for this model, "
                f"got {data.channels} in {dataset['name']}{default if dataset == PACKAGED else ''}"
            )
        self.name = dataset["name"]
        self.split = next(split for split in ("test", "validation", "train") if split in data.splits)
        shape = (data.channels, *pair(config.image_size))
        is_array = data.array_shape is not None
        decode = Decoder(processor, shape, is_array, sources=data.sources, bit_depth=bit_depth)
        split = MapStyleSplit(data, self.split, decode, LoaderContext(torch.device("cpu")), "skip")
        pixels, targets = zip(*split.samples(count))
        self.pixels = torch.stack(pixels)  # uint8 (N, C, H, W)
        self.normalize = Augment(processor, 0).normalize
        has_classes = data.labels.problem_type == SINGLE and data.labels.class_names == list(config.id2label.values())
        self.classes = torch.tensor(targets) if has_classes else None  # (N,), if they are those of the model

    def __len__(self) -> int:
        return len(self.pixels)


def agreement(expected: torch.Tensor, outputs: torch.Tensor, problem: str | None) -> float:
    """How far outputs (N, K) agree with the expected ones, in [0, 1].

    Args:
        problem: of the config. SINGLE or None: the fraction of images with the same top class. MULTI: the fraction of
            labels that both or neither predict. REGRESSION, or "features" for vectors: 1 - the relative error.
    """
    if problem == MULTI:
        return ((expected > 0) == (outputs > 0)).float().mean().item()
    if problem in (REGRESSION, "features"):
        return 1 - ((outputs - expected).norm() / expected.norm()).item()
    return (expected.argmax(-1) == outputs.argmax(-1)).float().mean().item()


@torch.no_grad()
def measure(models: dict[str, Callable], images: Images, problem: str | None) -> dict[str, dict]:
    """Compares models, which alternate from batch to batch, with the one called EAGER.

    Returns:
        For each model: `difference`, the largest one of an output; `agreement`, see there; `accuracy`, if the dataset
        has the classes of the model; `images_per_second`, the median of all full batches but the first.
    """
    outputs, seconds = {name: [] for name in models}, {name: [] for name in models}
    for batch in images.pixels.split(BATCH_SIZE):
        pixels = images.normalize(batch)
        for name, model in models.items():
            start = time.perf_counter()
            outputs[name].append(model(pixels).float())
            if len(batch) == BATCH_SIZE:
                seconds[name].append(time.perf_counter() - start)
    expected, results = torch.cat(outputs[EAGER]), {}
    for name in models:
        output, timed = torch.cat(outputs[name]), seconds[name][1:]
        results[name] = {
            "difference": (output - expected).abs().max().item(),
            "agreement": agreement(expected, output, problem),
            "images_per_second": BATCH_SIZE / statistics.median(timed) if timed else None,
        }
        if images.classes is not None:
            results[name]["accuracy"] = (output.argmax(-1) == images.classes).float().mean().item()
    return results
