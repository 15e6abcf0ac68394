"""The host side of the data: from a data set on the Hub or on disk to batches of `uint8` pixels.

Every random choice is a function of (seed, epoch, row), so that any step can be repeated by any number of workers.
"""

import contextlib
import io
import itertools
import math
import random
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kornia_rs
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor

CACHE_BYTES = 4 * 2**30  # the largest split that is kept decoded
DECODE_BATCH = 256  # images decoded at a time for that
JPEG_DECODER = kornia_rs.io.ImageDecoder()
IGNORED = -100  # the label of what does not count, as in torch.nn.functional.cross_entropy


# From a name to splits whose columns and labels are known


@dataclass
class ImageData:
    """A data set, its images not decoded yet; `splits` has "train" and, where they exist, "validation" and "test"."""

    splits: DatasetDict
    image_column: str
    label_column: str
    class_names: list[str]


def find_column(dataset: Dataset, feature: type, name: str | None, option: str) -> str:
    """The column called `name` or, without a name, the only one whose feature is of the type.

    Raises:
        ValueError: the named column is missing or of another type; without a name, none or several fit.
    """
    fitting = [column for column, kind in dataset.features.items() if isinstance(kind, feature)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name in fitting:
        return name
    columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in dataset.features.items())
    wanted = f"one {feature.__name__} column" if name is None else f"the {feature.__name__} column {name!r}"
    raise ValueError(f"{option}: expected {wanted}, got the columns {columns}")


def load_splits(name: str, config_name: str | None = None, revision: str | None = None) -> DatasetDict:
    """A Hub id, a folder of images, parquet or arrow files, what `save_to_disk` wrote, or one parquet or arrow file."""
    path = Path(name)
    if not path.exists() and (Path(__file__).parent / name).is_dir():
        path = Path(__file__).parent / name
    try:
        if path.suffix in (".parquet", ".arrow") and path.is_file():
            return load_dataset(path.suffix[1:], data_files=str(path))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = load_from_disk(str(path))
            return splits if isinstance(splits, DatasetDict) else DatasetDict(train=splits)
        return load_dataset(str(path) if path.exists() else name, config_name, revision=revision)
    except Exception as error:  # the Hub, the file system and every builder have errors of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"--dataset_name: {name!r} cannot be loaded: {reason}") from error


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Loads a data set and checks all its labels once.

    Args:
        name, config_name, revision: as for `load_splits`; `data/digits` is also found beside this file.
        image_column, label_column: their names, needed where a data set has several candidates.
        validation_fraction: the part of "train", in [0, 1), that becomes "validation" where the data set has none (nor
            "valid", "val" or "dev"): stratified by class, and always the same for a seed.
        max_train_samples, max_eval_samples: at most so many rows of "train" and of each other split, drawn by seed.

    Raises:
        ValueError: no such data set, column or "train" split, an empty split, fewer than two classes, or a label
            that is not one of them; a `validation_fraction` too small or too large for the classes.
    """
    splits = load_splits(name, config_name, revision)
    if "train" not in splits:
        raise ValueError(f"--dataset_name: expected a 'train' split in {name!r}, got {', '.join(splits)}")
    image_column = find_column(splits["train"], Image, image_column, "--image_column_name")
    label_column = find_column(splits["train"], ClassLabel, label_column, "--label_column_name")
    class_names = splits["train"].features[label_column].names
    if len(class_names) < 2:
        raise ValueError(f"--label_column_name: expected at least two classes in {label_column!r}, got {class_names}")

    validation = next((split for split in ("validation", "valid", "val", "dev") if split in splits), None)
    names = {"train": "train", "validation": validation, "test": "test"}
    used = DatasetDict({name: splits[split] for name, split in names.items() if split in splits})
    used = used.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
    if "test" in used and set(used["test"][label_column][:]) <= {None, -1}:  # kept secret, as for ImageNet-1k
        del used["test"]
    for split, rows in used.items():
        check_labels(split, rows[label_column][:], class_names)
    if "validation" not in used and validation_fraction:
        rows = used["train"].select_columns([label_column]).with_format("arrow")[:]
        rows = Dataset(rows.append_column("row", [range(len(rows))]))  # in memory: splitting it writes no file
        try:
            parts = rows.train_test_split(validation_fraction, seed=seed, stratify_by_column=label_column)
        except ValueError as error:
            raise ValueError(f"--train_val_split: {validation_fraction} does not suit {name!r}: {error}") from error
        train = used["train"]
        used["train"], used["validation"] = (train.select(parts[part]["row"]) for part in ("train", "test"))
    for split, rows in used.items():
        most = max_train_samples if split == "train" else max_eval_samples
        if most is not None and most < len(rows):
            used[split] = rows.select(np.random.default_rng(seed).permutation(len(rows))[:most])
    return ImageData(used, image_column, label_column, class_names)


def check_labels(split: str, labels: list, class_names: list[str]):
    """Raises ValueError unless every row has one of the classes, and "train" more than one of them."""
    bad = [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(class_names)]
    if bad:
        raise ValueError(
            f"--label_column_name: expected labels from 0 to {len(class_names) - 1}, got {labels[bad[0]]} in row "
            f"{bad[0]} of the split {split!r} ({len(bad)} such rows)"
        )
    if split == "train" and len(set(labels)) == 1:
        raise ValueError(f"--dataset_name: expected several classes in the split 'train', got {labels[0]} only")


# From a row to pixels


class BadImage(ValueError):
    """An image that cannot be decoded, or is too large to be decoded."""


@contextlib.contextmanager
def reasons():
    """Within it, whatever Pillow has against an image is a BadImage; a decompression bomb, too, of which it only warns.

    Raises:
        BadImage: says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise BadImage(f"more than {PIL.Image.MAX_IMAGE_PIXELS} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise BadImage("not an image that Pillow knows") from error
    except BadImage:
        raise
    except Exception as error:  # every format has errors of its own
        raise BadImage(f"{type(error).__name__}: {error}") from error


def open_image(value: dict | None) -> PIL.Image.Image:
    """The image of an undecoded row, its header read and no more."""
    if value is None:
        raise BadImage("there is none")
    data = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    if not data:
        raise BadImage("empty")
    return PIL.Image.open(io.BytesIO(data))


def load_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an opened image, turns it as its EXIF orientation says and makes it RGB, as pipelines do."""
    PIL.ImageOps.exif_transpose(image, in_place=True)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def random_crop(width: int, height: int, min_area: float, generator: random.Random) -> tuple[float, ...]:
    """A box (left, upper, right, lower) of at least `min_area` of the image, its sides 3:4 to 4:3.

    Szegedy et al., 2014, arXiv:1409.4842, section 6. Where none fits in ten draws: the largest in the middle.
    """
    for _ in range(10):
        area = generator.uniform(min_area, 1) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def random_resized_crop(
    value: dict | None, size: tuple[int, int], min_area: float, generator: random.Random
) -> torch.Tensor:
    """Decodes an undecoded row, crops it and resizes it, bilinear with antialiasing, to uint8 (3, height, width).

    JPEG is decoded at a half to an eighth of its size where that is enough, and otherwise, if it needs no turning, with
    libjpeg-turbo directly: the pixels are Pillow's, the copies are saved. Resizing is torch's, faster than Pillow's.
    """
    image = open_image(value)
    orientation = image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1)
    width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    left, upper, right, lower = random_crop(width, height, min_area, generator)
    needed = max(size[1] / (right - left), size[0] / (lower - upper))
    pixels = None
    if image.format == "JPEG" and orientation == 1 and needed > 0.5:
        with contextlib.suppress(Exception):  # CMYK, and what is broken: Pillow decodes it or says why not
            pixels = JPEG_DECODER.decode(image.fp.getvalue())
    if pixels is None:
        image.draft("RGB", tuple(math.ceil(side * needed) for side in image.size))
        pixels = np.array(load_rgb(image))
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    left, upper = int(left * x), int(upper * y)
    right, lower = max(left + 1, round(right * x)), max(upper + 1, round(lower * y))
    cropped = torch.from_numpy(pixels[upper:lower, left:right].copy()).permute(2, 0, 1)
    return F.interpolate(cropped[None], size, mode="bilinear", antialias=True)[0]


def fits(count: int, size: tuple[int, int]) -> bool:
    """Whether so many RGB images may be kept decoded."""
    return count * 3 * math.prod(size) <= CACHE_BYTES


def equal_sizes(rows: Dataset, column: str) -> bool:
    """Whether all images have one size; reads headers, up to the first that differs. Bad images are not counted."""
    first = None
    for batch in rows.select_columns([column]).iter(DECODE_BATCH):
        for value in batch[column]:
            with contextlib.suppress(BadImage), reasons():
                size = open_image(value).size
                first = first or size
                if size != first:
                    return False
    return True


# From keys to batches


def seed_for(*key) -> int:
    """A seed that is a pure function of its key, as (seed, step, rank): a step that is repeated draws the same."""
    return random.Random(repr(key)).getrandbits(63)


class Images(torch.utils.data.Dataset):
    """One split as uint8 pixels: what the processor does before it scales them, or a random crop of the same size.

    A key is (epoch, rows); the row -1 is padding. Padding and bad images of an evaluation split get the label IGNORED;
    a bad training image makes room for the next row.

    Args:
        data, split: the rows.
        processor: the checkpoint's image processor.
        size: height and width of its pixels.
        crop_min_area: the smallest part of a training image that a random crop keeps; 0: no random crop.
        on_bad_image: "error" or "skip".
        seed: decides the crops.
    """

    def __init__(
        self,
        data: ImageData,
        split: str,
        processor: BaseImageProcessor,
        size: tuple[int, int],
        crop_min_area: float = 0.0,
        on_bad_image: str = "error",
        seed: int = 0,
    ):
        self.data, self.split, self.processor, self.size = data, split, processor, size
        self.crop_min_area, self.on_bad_image, self.seed = crop_min_area, on_bad_image, seed
        self.rows = data.splits[split]
        self.bad = {}  # row -> reason, of what was skipped so far
        self.kept = None  # pixels and labels of the whole split

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, row: int, value: dict | None, epoch: int) -> PIL.Image.Image | torch.Tensor:
        if self.crop_min_area == 0:
            return load_rgb(open_image(value))
        generator = random.Random(repr((self.seed, "crop", epoch, row)))
        return random_resized_crop(value, self.size, self.crop_min_area, generator)

    def __getitems__(self, key: tuple[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        epoch, rows = key
        columns = self.rows[[max(row, 0) for row in rows]]
        images, labels, bad = [], torch.full((len(rows),), IGNORED), {}
        for slot, (row, value, label) in enumerate(zip(rows, *columns.values())):
            image = None
            while row >= 0 and image is None:
                try:
                    with reasons():
                        image, labels[slot] = self.decode(row, value, epoch), label
                except BadImage as error:
                    path = f" ({value['path']})" if value and value["path"] else ""
                    bad[row] = f"row {row} of the split {self.split!r}{path}: {error}"
                    if self.split != "train" or self.on_bad_image == "error" or len(bad) == len(self):
                        break
                    row = (row + 1) % len(self)
                    value, label = self.rows[row].values()
            images.append(image)
        if self.crop_min_area:
            blank = torch.zeros(3, *self.size, dtype=torch.uint8)
            return torch.stack([blank if image is None else image for image in images]), labels, bad
        blank = PIL.Image.new("RGB", self.size[::-1])
        images = [blank if image is None else image for image in images]
        pixels = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return pixels, labels, bad

    def note(self, bad: dict[int, str]):
        """Takes down what was skipped.

        Raises:
            BadImage: nothing may be skipped, or nothing would be left.
        """
        if bad and self.on_bad_image == "error":
            raise BadImage(f"--on_bad_image: expected an image, got {next(iter(bad.values()))}; skip passes over it")
        self.bad.update(bad)
        if len(self.bad) == len(self):
            raise BadImage(f"--on_bad_image: expected an image to be left in the split {self.split!r}, got none")

    def read(self, keys: Iterable, workers: int, pin: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        options = {"num_workers": workers, "worker_init_fn": leave_signals_to_the_parent, "pin_memory": pin}
        loader = DataLoader(self, batch_sampler=keys, collate_fn=as_it_is, **options)
        for pixels, labels, bad in loader:
            self.note(bad)
            yield pixels, labels

    def keep(self, device: torch.device, workers: int, quiet: bool):
        """Decodes the whole split once, onto the device."""
        pixels = torch.empty(len(self), 3, *self.size, dtype=torch.uint8)
        labels = torch.full((len(self) + 1,), IGNORED)  # the last is that of padding
        starts = range(0, len(self), DECODE_BATCH)
        keys = [(0, list(range(start, min(start + DECODE_BATCH, len(self))))) for start in starts]
        progress = tqdm(total=len(self), desc=f"decoding {self.split}", unit="image", leave=False, disable=quiet)
        for start, (batch, batch_labels) in zip(starts, self.read(keys, workers)):
            pixels[start : start + len(batch)], labels[start : start + len(batch)] = batch, batch_labels
            progress.update(len(batch))
        progress.close()
        self.kept = pixels.to(device), labels.to(device)

    def batches(
        self, keys: Iterable, device: torch.device, workers: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """On the device: uint8 pixels (B, 3, H, W) and labels (B,) for each key."""
        if self.kept is None:
            for pixels, labels in self.read(keys, workers, pin=device.type == "cuda"):
                yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        else:
            for _, rows in keys:
                rows = torch.tensor(rows).to(device, non_blocking=True)
                yield self.kept[0][rows], self.kept[1][rows]


def as_it_is(batch):
    return batch


def leave_signals_to_the_parent(worker: int):
    """Ctrl-C and SIGTERM may reach the whole group of processes while the parent still needs the batches of its step.

    SIGTERM may also be the parent's own, for a worker that does not end: it then ends a little later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))  # seconds; SIGALRM ends it


def training_keys(count: int, batch_size: int, accumulation: int, rank: int, world: int, seed: int, first_step: int):
    """The keys of one process, for every batch from a step on, without end.

    Each epoch has an order of its own; what does not fill a step (batch_size * accumulation * world) is left out.
    Processes take turns, so that a step has the same rows with any number of them.
    """
    per_epoch = count // (batch_size * accumulation * world) * accumulation
    order_epoch, order = None, None
    for number in itertools.count(first_step * accumulation):
        epoch, position = divmod(number, per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
            order_epoch, order = epoch, torch.randperm(count, generator=generator)
        first = (position * world + rank) * batch_size
        yield epoch, order[first : first + batch_size].tolist()


def evaluation_keys(count: int, batch_size: int, rank: int, world: int) -> list[tuple[int, list[int]]]:
    """The keys of one process for one pass over all rows: full batches, as many for each process, padded with -1."""
    steps = math.ceil(count / (batch_size * world))
    rows = [row if row < count else -1 for row in range(steps * batch_size * world)]
    starts = range(rank * batch_size, len(rows), batch_size * world)
    return [(0, rows[start : start + batch_size]) for start in starts]
