"""Features of images, computed once and kept on the disk, and two classifiers on them: k-NN and logistic regression.

    features, classes = images_with_class(*cached_features(model, split))
    head = fit_logistic(features, classes, num_classes=10, strength=choose_strength(features, classes))

`N` images, `D` width of the features, `K` classes.
"""

import contextlib
import copy
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.modeling_outputs import ImageClassifierOutput

from .. import ViTSimpleForImageClassification, ViTSimpleModel, __version__
from ..configuration_vit_simple import OWN_FIELDS
from ..data.augment import Augment
from ..data.dataloader import MapStyleSplit, RowNotes, seed_for
from ..data.fingerprint import digest, hash_images
from ..data.labels import SINGLE, Labels
from ..files import UserError
from .opening import hash_weights

CACHE = Path(constants.HF_HOME) / "vit_simple" / "features"
STRENGTHS = np.logspace(-5, 2, 8)  # cross-validation chooses one
USUAL_STRENGTH = 0.1  # without cross-validation
FOLDS = 5
MAX_SEARCH_IMAGES = 10_000  # on which the strength is chosen; more of them take long and change little
MAX_PROBE_IMAGES = 2_000  # of `quick_probe`
QUERIES = 1024  # images whose neighbors are found at a time


def require_classes(labels: Labels, program: str):
    """Raises UserError, which begins with `program`, unless each image has one class."""
    if labels.problem_type != SINGLE:
        advice = f"; if the numbers are classes, give --problem_type {SINGLE}" if labels.kind == "number" else ""
        raise UserError(f"{program} needs one class for each image, but the labels are {labels.problem_type}{advice}")


# Features


def without_crops(split: MapStyleSplit) -> MapStyleSplit:
    """The split with images as in evaluation, although training crops them at random."""
    if not split.decode.crop_min_area:
        return split
    whole = copy.copy(split)
    whole.decode = copy.copy(split.decode)
    whole.decode.crop_min_area = 0.0
    return whole


@torch.no_grad()
def extract_features(
    model: ViTSimpleForImageClassification, split: MapStyleSplit, rows: list[int] | None = None, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the head for each image, float32 (N, D), and its target, both on the CPU.

    Args:
        rows: the rows to use; by default, all.
    """
    split, device = without_crops(split), split.context.device
    normalize = Augment(split.decode.processor, len(split.data.labels.class_names)).to(device).normalize
    rows = list(range(split.size)) if rows is None else rows
    keys = [(0, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    features, labels, was_training = [], [], model.training
    model.eval().to(device)
    for pixels, targets in tqdm(split.batches(keys), f"features of {split.split}", len(keys), leave=False):
        if pixels.ndim == 2:  # see train_on_features
            features.append(pixels.cpu())
        else:
            features.append(ViTSimpleModel.forward(model, normalize(pixels)).pooler_output.float().cpu())
        labels.append(targets.cpu())
    model.train(was_training)
    return torch.cat(features), torch.cat(labels)


def cached_features(model: ViTSimpleForImageClassification, split: MapStyleSplit) -> tuple[torch.Tensor, torch.Tensor]:
    """`extract_features` of all rows, read from the disk if they were computed before.

    The file's name is a hash of the images, the labels, the image processor, the config and the weights. The file also
    says which images could not be used, or have other pixels in a pipeline.

    Raises:
        BadImage: an image cannot be used, and may not be skipped.
    """
    file = CACHE / f"{key_of(model, split)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as stored:
        notes = RowNotes(**json.loads(stored.metadata()["notes"]))
        split.record(notes)
        return stored.get_tensor("features"), stored.get_tensor("targets")
    features, targets = extract_features(model, split)
    with contextlib.suppress(OSError, SafetensorError):  # they can be computed again
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        metadata = {"notes": json.dumps({"bad": split.bad, "changed": split.changed})}
        save_file({"features": features, "targets": targets}, unfinished, metadata)
        unfinished.replace(file)
    return features, targets


def key_of(model: ViTSimpleForImageClassification, split: MapStyleSplit) -> str:
    """A hash of everything that the features and the targets of a split depend on."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    data, rows = split.data, split.rows
    images = hash_images(rows, data.image_column, data.sources, sample=False)
    config = {name: getattr(model.config, name) for name in OWN_FIELDS}
    labels = [data.labels.class_names, data.labels.mean, data.labels.std, rows[data.labels.column][:]]
    pixels = [split.decode.processor.to_dict(), split.decode.bit_depth]
    return digest([__version__, config, hash_weights(weights), pixels, split.split, labels, images])


def images_with_class(features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The features and the classes of the images that are not bad."""
    return features[targets >= 0], targets[targets >= 0]


# Training a head on features


class FeatureAugment(Augment):
    """Takes features (B, D) for images and leaves them as they are; it makes the targets."""

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels if pixels.ndim == 2 else super().normalize(pixels)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pixels, self.targets(labels)


def are_fixed(model: ViTSimpleForImageClassification, split: MapStyleSplit) -> bool:
    """Whether an image has the same features each time: no random crop, no dropout."""
    config = model.config
    drops = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate)
    return not split.decode.crop_min_area and not any(drops)


def train_on_features(
    model: ViTSimpleForImageClassification, splits: dict[str, MapStyleSplit], label_smoothing_factor: float
) -> Augment:
    """Replaces the images of all splits by their features, and lets the model take both; returns what augments them.

    The backbone then runs once for each image, instead of once in each epoch.
    """
    labels = next(iter(splits.values())).data.labels
    for split in splits.values():
        features, targets = cached_features(model, split)
        padding = labels.ignored_targets(1)
        split.cached = tuple(split.to_device(features, torch.cat([targets, padding])))
    whole = model.forward

    def forward(x: torch.Tensor, **options) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=model.head(x)) if x.ndim == 2 else whole(x, **options)

    model.forward = forward
    processor = next(iter(splits.values())).decode.processor
    return FeatureAugment(processor, len(labels.class_names), label_smoothing_factor=label_smoothing_factor)


# Classifiers


def knn_votes(
    train: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor, num_classes: int, k: int
) -> torch.Tensor:
    """The votes of the k nearest training images by cosine, (N, K), in [0, 1] (Caron et al., 2021, arXiv:2104.14294).

    A neighbor has the vote exp(cosine / 0.07), as a fraction of all k votes.

    Args:
        train: features and classes of the training images.
    """
    stored, one_hot = F.normalize(train[0]), F.one_hot(train[1], num_classes).float()
    votes = []
    for queries in F.normalize(features).split(QUERIES):
        cosine, nearest = (queries @ stored.T).topk(min(k, len(stored)))  # (N, k)
        weights = (cosine / 0.07).softmax(-1)
        votes.append((weights[..., None] * one_hot[nearest]).sum(1))  # (N, k, K) -> (N, K)
    return torch.cat(votes)


def logistic_regression(strength: float = USUAL_STRENGTH):
    """scikit-learn's logistic regression on standardized features, with the inverse strength C of its L2 penalty."""
    # not at the top: it takes a second, and most training runs need none of it
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def choose_strength(features: torch.Tensor, classes: torch.Tensor) -> float | None:
    """The C of `logistic_regression` that is best in cross-validation, by log-likelihood.

    It is chosen from a grid, as in DINOv2's evaluation (arXiv:2304.07193, section 7.1). Classes with one image are left
    out; None if fewer than two others remain.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    sample = np.sort(np.random.default_rng(0).permutation(len(classes))[:MAX_SEARCH_IMAGES])
    x, y = features[sample].double().numpy(), classes[sample].numpy()
    found, counts = np.unique(y, return_counts=True)
    usable = counts > 1
    if usable.sum() < 2:
        return None
    rows = np.isin(y, found[usable])
    folds = StratifiedKFold(min(FOLDS, counts[usable].min()), shuffle=True, random_state=0)
    grid = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(logistic_regression(), grid, scoring="neg_log_loss", cv=folds, refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(x[rows], y[rows])
    return float(search.best_params_["logisticregression__C"])


def fit_logistic(
    features: torch.Tensor, classes: torch.Tensor, num_classes: int, strength: float = USUAL_STRENGTH
) -> torch.nn.Linear:
    """A `logistic_regression` as the head of a model, which includes the standardization.

    Raises:
        UserError: all images have the same class.
    """
    from sklearn.exceptions import ConvergenceWarning

    x, y = features.double().numpy(), classes.numpy()
    found = np.unique(y)
    if len(found) < 2:
        raise UserError("expected training images of at least two classes, got one")
    scaler, regression = classifier = logistic_regression(strength)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(x, y)

    weight, bias = regression.coef_ / scaler.scale_, regression.intercept_
    bias = bias - weight @ scaler.mean_
    if len(found) == 2:  # scikit-learn has one row, for the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    head = torch.nn.Linear(x.shape[1], num_classes).requires_grad_(False)
    head.weight.zero_()
    head.bias.fill_(-30)  # of a class without training images; the best of the others is above 0
    head.weight[found], head.bias[found] = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    return head


def quick_probe(
    model: ViTSimpleForImageClassification, splits: dict[str, MapStyleSplit], images: int
) -> tuple[int, int] | None:
    """How many of how many validation images a logistic regression on features gets right, before a training.

    It takes at most 2,000 images and less than a tenth of the training's time: a training image costs as much as three
    that are only evaluated. None if these are too few.

    Args:
        images: that training will use, in all epochs together.
    """
    limit = min(MAX_PROBE_IMAGES, images // 5)
    held_out = min(splits["validation"].size, limit // 2)
    parts = []
    for name, count in (("train", limit - held_out), ("validation", held_out)):
        split = splits[name]
        generator = torch.Generator().manual_seed(seed_for(split.seed, "probe"))
        rows = torch.randperm(split.size, generator=generator)[:count].tolist()
        parts.append(images_with_class(*extract_features(model, split, rows)) if rows else None)
    if None in parts or len(parts[0][1].unique()) < 2 or not len(parts[1][1]):
        return None
    head = fit_logistic(*parts[0], model.config.num_labels)
    features, classes = parts[1]
    return (head(features).argmax(-1) == classes).sum().item(), len(classes)
