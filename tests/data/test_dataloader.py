import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image, load_dataset

from tests.conftest import DIGITS, data_of, images_of, photographs, processor
from vit_simple.data.dataloader import evaluation_keys, fits_in_cache, have_equal_sizes, training_keys
from vit_simple.data.decoding import random_resized_crop
from vit_simple.data.labels import IGNORED
from vit_simple.data.loading import load_image_data
from vit_simple.data.reading import BadImage


def read(images, num_workers: int = 0, rows=None, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images.context.num_workers = num_workers
    rows = list(range(images.size)) if rows is None else rows
    pixels, labels = zip(*images.batches([(epoch, rows[i : i + 3]) for i in range(0, len(rows), 3)]))
    return torch.cat(pixels), torch.cat(labels)


def test_pixels_equal_those_of_the_processor_before_it_scales_them():
    images = images_of(load_image_data(DIGITS), "test", processor(8), (8, 8))
    pixels, labels = read(images)
    assert pixels.shape == (360, 3, 8, 8) and pixels.dtype == torch.uint8
    raw = load_dataset(DIGITS, split="test")
    assert np.array_equal(pixels[7, 0].numpy(), np.array(raw[7]["image"])) and labels.tolist() == raw["label"][:]
    cropped = processor(8, cropped=True)
    pixels, _ = read(images_of(load_image_data(DIGITS), "test", cropped, (8, 8)), rows=[7])
    expected = cropped(raw[7]["image"].convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert torch.equal(pixels, expected.pixel_values)


def test_exif_orientation_is_applied_before_the_processor_crops(tmp_path):
    files = photographs(tmp_path)
    turned = PIL.Image.open(files[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(files[0], exif=exif, quality=95)
    chosen = processor(32, cropped=True)
    pixels, _ = read(images_of(data_of(files, [0, 1, 0, 1]), "train", chosen, (32, 32)))
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(files[0]))
    assert upright.size == (60, 90)
    expected = chosen(upright, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert torch.equal(pixels[:1], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_pixels_equal_those_that_are_not(num_workers):
    data = load_image_data(DIGITS, max_train_samples=100)
    cached, uncached = (images_of(data, "train", processor(8), (8, 8)) for _ in range(2))
    cached.context.cache_workers = num_workers
    cached.cache(quiet=True, batch_size=32, min_size_for_workers=0)
    (pixels, labels), (expected_pixels, expected_labels) = read(cached), read(uncached, num_workers)
    assert torch.equal(pixels, expected_pixels) and torch.equal(labels, expected_labels)


def test_random_crops_are_a_function_of_seed_epoch_and_row(tmp_path):
    data = data_of(photographs(tmp_path), [0, 1, 0, 1])
    images, other = (images_of(data, "train", processor(24), (24, 24), 0.2, seed=seed) for seed in (0, 1))
    first, _ = read(images)
    assert first.shape == (4, 3, 24, 24) and first.dtype == torch.uint8
    for num_workers in (0, 1, 3):
        assert torch.equal(read(images, num_workers)[0], first)
    assert torch.equal(read(images, rows=[3, 1])[0], first[[3, 1]])
    for different in (read(images, epoch=1)[0], read(other)[0]):
        assert (different != first).flatten(1).any(1).all()


class Box:
    """Stands in for a random generator, so that `random_resized_crop` takes this box (left, upper, right, lower)."""

    def __init__(self, image_size, left, upper, right, lower):
        width, height = right - left, lower - upper
        area, ratio = width * height / math.prod(image_size), math.log(width / height)
        self.draws = iter([area, ratio, left, upper])

    def uniform(self, low, high):
        return next(self.draws)


@pytest.mark.parametrize("kind, orientation", [("JPEG", 1), ("JPEG", 6), ("PNG", 6), ("TIFF", 6), ("WEBP", 6)])
def test_random_resized_crop_shows_its_box(tmp_path, kind, orientation):
    """Red and green encode x and y, so that the corners must be those of the box, also if JPEG decodes at half size."""
    (file,) = photographs(tmp_path, sizes=[(1200, 900)])
    upright = PIL.Image.open(file)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(PIL.Image.Transpose.ROTATE_90) if orientation == 6 else upright.copy()  # on its side
    stored.save(file, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95}))
    box = Box(upright.size, 100, 300, 1100, 850)
    pixels = random_resized_crop(Path(file).read_bytes(), (32, 32), 0.5, box)
    x, y = (channel.float() / 200 * 1200 for channel in pixels[:2])
    assert x.mean(0)[[0, -1]].tolist() == pytest.approx([116, 1084], abs=15)
    assert y.mean(1)[[0, -1]].tolist() == pytest.approx([309, 841], abs=15)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_random_resized_crop_of_jpeg_has_pillows_pixels(tmp_path, mode):
    file = str(tmp_path / "noise.jpg")
    PIL.Image.effect_noise((60, 50), 80).convert(mode).save(file, quality=90)
    box = Box((60, 50), 10, 20, 42, 36)
    pixels = random_resized_crop(Path(file).read_bytes(), (16, 32), 0.5, box)
    expected = PIL.Image.open(file).convert("RGB").crop((10, 20, 42, 36))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(expected))


def test_have_equal_sizes_and_fits_in_cache(tmp_path):
    assert have_equal_sizes(load_image_data(DIGITS))
    assert not have_equal_sizes(data_of(photographs(tmp_path), [0, 1, 0, 1]))
    assert fits_in_cache(1_300_000, (3, 32, 32)) and not fits_in_cache(1_300_000, (3, 224, 224))


# Keys


def test_training_keys_have_every_row_once_per_epoch_except_unfilled_step():
    keys = training_keys(103, 5, 2, rank=0, world_size=1, seed=0, first_step=0)
    epochs = [[next(keys) for _ in range(20)] for _ in range(2)]
    rows = [[row for _, batch in epoch for row in batch] for epoch in epochs]
    assert [len(set(order)) for order in rows] == [100, 100] and rows[0] != rows[1]
    assert [{number for number, _ in epoch} for epoch in epochs] == [{0}, {1}]


def test_training_keys_of_a_step_do_not_depend_on_processes_or_first_step():
    alone = training_keys(103, 20, 1, rank=0, world_size=1, seed=3, first_step=0)
    shared = [training_keys(103, 5, 1, rank=rank, world_size=4, seed=3, first_step=0) for rank in range(4)]
    late = training_keys(103, 20, 1, rank=0, world_size=1, seed=3, first_step=7)
    for step in range(20):
        epoch, rows = next(alone)
        assert [row for keys in shared for row in next(keys)[1]] == rows
        if step >= 7:
            assert next(late) == (epoch, rows)


def test_evaluation_keys_have_every_row_once_and_equally_many_batches_per_process():
    keys_of_ranks = [evaluation_keys(23, 4, rank, 3) for rank in range(3)]
    assert [[len(rows) for _, rows in keys] for keys in keys_of_ranks] == [[4, 4]] * 3
    rows = [row for keys in keys_of_ranks for _, batch in keys for row in batch]
    assert sorted(row for row in rows if row >= 0) == list(range(23)) and rows.count(-1) == 1


# Bad images


def bad_files(folder) -> dict[str, str]:
    """Writes files that are not usable images; file name -> pattern of the reason."""
    (folder / "truncated.jpg").write_bytes((folder / "0.jpg").read_bytes()[:400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    PIL.Image.effect_noise((40, 40), 50).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:600])
    header = b"P6 20000 20000 255\n"  # 400 million pixels
    (folder / "bomb.ppm").write_bytes(header)
    (folder / "large.ppm").write_bytes(b"P6 10000 10000 255\n")  # of which Pillow only warns
    return {
        "truncated.jpg": "[Tt]runcated",
        "empty.jpg": "empty",
        "half.png": "[Tt]runcated",
        "text.jpg": "not an image that Pillow knows",
        "broken.png": "not an image that Pillow knows|Error",
        "bomb.ppm": "more than 89478485 pixels",
        "large.ppm": "more than 89478485 pixels",
        "missing.jpg": "there is no file",
    }


def test_bad_image_has_the_row_number_of_the_dataset_that_was_given(tmp_path):
    images = [{"path": None, "bytes": f"train {row}".encode()} for row in range(40)]
    rows = Dataset.from_dict({"image": images, "label": [None, None, *["a", "b"] * 19]})
    rows.cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    options = {"on_missing_label": "skip", "validation_fraction": 0.25, "max_train_samples": 20}
    data = load_image_data(str(tmp_path), **options)
    for split in ("train", "validation"):
        loader = images_of(data, split, processor(8), (8, 8))
        for row in range(loader.size):
            _, _, notes = loader.read_batch(0, [row])
            kind, number = data.splits[split][row]["image"]["bytes"].decode().split()
            assert list(notes.bad) == [f"row {number} of the split {kind!r}"]


@pytest.mark.parametrize("crop, num_workers", [(0.0, 0), (0.0, 1), (0.5, 0)])
def test_bad_images_are_named_with_their_reason_or_skipped(tmp_path, crop, num_workers):
    good = photographs(tmp_path, sizes=[(40, 40)] * 3)
    for name, reason in [*bad_files(tmp_path).items(), (None, "missing|no image")]:
        data = data_of([good[0], name and str(tmp_path / name), *good[1:]], [0, 1, 0, 1])
        with pytest.raises(BadImage, match=rf"row 1 of .* 'train'.* cannot be used: .*({reason})"):
            read(images_of(data, "train", processor(16), (16, 16), crop), num_workers)

        train = images_of(data, "train", processor(16), (16, 16), crop, on_bad_image="skip")
        _, labels = read(train, num_workers)
        assert labels.tolist() == [0, 0, 0, 1]  # the next row takes its place
        assert [row.split(" (")[0] for row in train.bad] == ["row 1 of the split 'train'"]
        assert name is None or name in next(iter(train.bad))
        test = images_of(data, "test", processor(16), (16, 16), on_bad_image="skip")
        _, labels = read(test, num_workers)
        assert labels.tolist() == [0, IGNORED, 0, 1] and len(test.bad) == 1
        assert sorted(target for _, target in test.samples(9)) == [0, 0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_of_bad_images_only_raises(split):
    with pytest.raises(BadImage, match=f"every row of the split '{split}' is bad"):
        read(images_of(data_of([None] * 3, [0, 1, 0]), split, processor(16), (16, 16), on_bad_image="skip"))
