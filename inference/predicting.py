"""Predictions of a checkpoint for many images, as a table.

    predictor = open_predictor("outputs/pets", find_images(["photos"]))
    table = Predictions(predictor, Path("predictions.csv")).run()

Each thread reads, decodes and classifies whole batches on one core: decoding then overlaps with the model, and no core
waits for another. `B` batch, `C` channels, `H W` pixels, `K` labels.
"""

import contextlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.compute
import torch
from tqdm import tqdm
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from .. import __version__
from ..configuration_vit_simple import pair
from ..data.augment import Augment
from ..data.decoding import Decoder, PixelBatch
from ..data.fingerprint import digest
from ..data.labels import MULTI, REGRESSION, SINGLE
from ..data.reading import MACHINE_ERRORS, WAITS, BadImage
from ..files import RECORD, RunError, UserError
from ..modeling_vit_simple import ViTSimpleForImageClassification
from .images import Images
from .opening import hash_weights, open_model, open_record, trained_bit_depth
from .tables import Table

TOP = 5  # labels in the table
SHOWN = 5  # bad images that are printed; the table has all
NONE = "none of these"  # the decision if no label is likely enough
RECORD_FIELDS = {
    "thresholds": dict[str, float] | None,
    "keep_score": float | None,
}


@dataclass
class Decision:
    """From the outputs of a model to the rows of a table.

    Args:
        problem: SINGLE, MULTI or REGRESSION.
        names: of the K labels.
        thresholds: of MULTI, the probabilities from which a label is chosen, (K,).
        keep_score: if the highest probability is lower, the decision is NONE.
    """

    problem: str
    names: list[str]
    thresholds: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keep_score: float = 0.0

    @classmethod
    def of(cls, config: PretrainedConfig, record: dict) -> "Decision":
        """As the checkpoint's record says, otherwise the likeliest label or, for MULTI, those from 0.5.

        Raises:
            UserError: the model predicts several numbers, or the record has thresholds, but not of every label.
        """
        names = [config.id2label[number] for number in range(config.num_labels)]
        problem = config.problem_type
        if problem == REGRESSION and len(names) > 1:
            raise UserError(f"expected a model that predicts labels or one number, got one of {len(names)} numbers")
        if problem != REGRESSION:
            problem = MULTI if problem == MULTI or len(names) == 1 else SINGLE  # as a pipeline does
        thresholds = record.get("thresholds") or dict.fromkeys(names, 0.5)
        if missing := [name for name in names if name not in thresholds]:
            raise UserError(
                f"{RECORD}: expected a threshold of each label of the model, got none of {missing[0]!r}: rename the "
                "thresholds as the labels, or remove all to decide from 0.5"
            )
        values = torch.tensor([thresholds[name] for name in names])
        return cls(problem, names, values, record.get("keep_score") or 0.0)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        text, number = pa.string(), pa.float64()
        if self.problem == REGRESSION:
            return {"value": number}
        columns = {"decision": text, "label": text, "probability": number}
        for place in range(2, min(TOP, len(self.names)) + 1):
            columns |= {f"label_{place}": text, f"probability_{place}": number}
        return columns | {"margin": number}

    def rows(self, logits: torch.Tensor) -> list[dict]:
        """The `columns` of each image, for the model's outputs (B, K)."""
        if self.problem == REGRESSION:
            return [{"value": float(f"{value:.7g}")} for value in logits[:, 0].tolist()]
        probabilities = logits.sigmoid() if self.problem == MULTI else logits.softmax(-1)  # (B, K)
        rows = []
        for image in probabilities:
            values, labels = image.topk(min(TOP, len(self.names)))
            names = [self.names[label] for label in labels.tolist()]
            row = {"decision": self.decide(image, names[0]), "margin": self.margin(image, values)}
            for place, (name, value) in enumerate(zip(names, values.tolist()), 1):
                end = "" if place == 1 else f"_{place}"
                row |= {f"label{end}": name, f"probability{end}": round(value, 6)}
            rows.append(row)
        return rows

    def decide(self, probabilities: torch.Tensor, first: str) -> str:
        if probabilities.max() < self.keep_score:
            return NONE
        if self.problem != MULTI:
            return first
        chosen = (probabilities >= self.thresholds).nonzero()[:, 0].tolist()
        return "; ".join(self.names[label] for label in chosen) or NONE

    def margin(self, probabilities: torch.Tensor, highest: torch.Tensor) -> float:
        """How far the probabilities are from another decision; small where the model is uncertain."""
        if self.problem == MULTI:
            return round((probabilities - self.thresholds).abs().min().item(), 6)
        return round((highest[0] - highest[1]).item(), 6)


@dataclass
class Predictor:
    """Reads, decodes and classifies batches of images.

    Args:
        decode: makes pixels of an image.
        normalize: uint8 pixels to those that the model takes.
    """

    model: PreTrainedModel
    images: Images
    decode: Decoder
    normalize: Callable[[torch.Tensor], torch.Tensor]
    decision: Decision

    def __post_init__(self):
        # On a GPU, one batch at a time: more would only take more memory.
        self.turn = contextlib.nullcontext() if self.model.device.type == "cpu" else threading.Lock()

    def batch(self, rows: range) -> list[dict]:
        """The rows of the table for these images; a bad image has an error instead of predictions.

        Raises:
            RunError: the machine failed to read an image several times.
        """
        table, good, pixels = [], [], PixelBatch(self.decode)
        for row, (line, value) in zip(rows, self.images.read(rows)):
            table.append(line)
            try:
                pixels.append(self.decode(value, 0, row))
                good.append(line)
            except BadImage as error:
                line["error"] = str(error)
            except MACHINE_ERRORS as error:
                reason = str(error) or type(error).__name__
                raise RunError(f"{line['path']} cannot be read, after {len(WAITS) + 1} attempts: {reason}") from error
        if good:
            for line, columns in zip(good, self.decision.rows(self.logits(pixels.pixels()))):
                line |= columns
        return table

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Outputs (B, K) on the CPU for uint8 pixels (B, C, H, W)."""
        with self.turn:
            return self.model(self.normalize(pixels.to(self.model.device))).logits.float().cpu()


def open_predictor(checkpoint: str, images: Images) -> Predictor:
    """What predicts the images with a checkpoint, a folder or a Hub id.

    Raises:
        UserError: it cannot be opened, has no head, or its image processor makes images of another size.
    """
    model, processor = open_model(checkpoint)
    if not isinstance(model, ViTSimpleForImageClassification):
        raise UserError(f"expected a model with a head, got {checkpoint}, which predicts no labels; see probe.py")
    record, size = open_record(checkpoint, RECORD_FIELDS), pair(model.config.image_size)
    decode = Decoder(processor, (3, *size), sources=images.sources, bit_depth=trained_bit_depth(checkpoint) or 16)
    made = tuple(decode.stack([PIL.Image.new("RGB", (60, 50))]).shape[2:])
    if made != size:
        raise UserError(f"expected an image processor that makes images of {size} pixels for this model, got {made}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    normalize = Augment(processor, 0).to(model.device).normalize
    return Predictor(model, images, decode, normalize, Decision.of(model.config, record))


def origin(predictor: Predictor, processor: BaseImageProcessor, batch_size: int) -> dict[str, str]:
    """What the predictions depend on."""
    model, decision = predictor.model, predictor.decision
    choice = [decision.thresholds.tolist(), decision.keep_score]
    config = model.config.to_diff_dict()
    return {
        "model": digest([__version__, config, hash_weights(model.state_dict()), processor.to_dict(), choice]),
        "list of images": predictor.images.fingerprint(),
        "batch size": str(batch_size),
    }


class Predictions:
    """The table of predictions of a checkpoint, begun or continued.

    Args:
        batch_size: images that the model takes at a time.
        sort_by: a column; by default, the table has the order of the images.
    """

    def __init__(self, predictor: Predictor, output: Path, batch_size: int = 16, sort_by: str | None = None):
        if sort_by is not None and sort_by not in predictor.decision.columns:
            raise UserError("--sort uncertain: expected a model that predicts labels, got one that predicts a number")
        self.predictor, self.batch_size, self.sort_by = predictor, batch_size, sort_by
        columns = {**predictor.images.columns, **predictor.decision.columns, "error": pa.string()}
        self.table = Table(output, pa.schema(columns), origin(predictor, predictor.decode.processor, batch_size))
        self.begun = self.table.num_rows
        total = len(predictor.images)
        self.report = [f"continues after {self.begun} of {total} images"] if self.begun else []

    def run(self) -> pa.Table:
        """Predicts what is missing, writes the complete table and returns it."""
        total = len(self.predictor.images)
        starts = range(self.begun, total, self.batch_size)
        batches = (range(start, min(start + self.batch_size, total)) for start in starts)
        with (
            tqdm(total=total, initial=self.begun, unit="image") as progress,
            warnings.catch_warnings(),
            one_core_each() as threads,
            contextlib.closing(in_order(self.predictor.batch, batches, threads)) as predicted,
        ):
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)  # in all threads
            for rows in predicted:
                self.table.append(rows)
                progress.update(len(rows))
        return self.table.finish(self.sort_by)


@contextlib.contextmanager
def one_core_each() -> Iterator[int]:
    """Lets each thread compute on one core; gives the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_order(function: Callable, items: Iterable, threads: int) -> Generator:
    """`function` of each item, in order, computed by threads, which are a few items ahead."""
    pool, pending = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def summary(table: pa.Table, output: Path) -> list[str]:
    """How many images there were, and the first bad ones with the reason."""
    bad = table.filter(pa.compute.field("error").is_valid())
    lines = []
    for line in bad.slice(0, SHOWN).to_pylist():
        place = line["path"] or f"row {line['row']}"  # not every dataset has paths
        lines.append(f"{place}: {line['error']}")
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    images = f"{len(table)} image{'' if len(table) == 1 else 's'}"
    found = f"{images}, of which {len(bad)} cannot be used" if lines else images
    return [*lines, *more, f"{found}: {output}"]


def require_usable(table: pa.Table):
    """Raises RunError if no image can be used."""
    if table["error"].null_count == 0:
        raise RunError("none of the images can be used; the column error of the table says why")
