import random

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset

from vit_simple.data import (
    IGNORED,
    BadImage,
    ImageData,
    Images,
    equal_sizes,
    evaluation_keys,
    fits,
    load_image_data,
    random_crop,
    training_keys,
)
from vit_simple.options import ROOT, TrainConfig
from vit_simple.prepare import open_processor, processor_content

DIGITS = str(ROOT / "data/digits")
PICTURES = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(40)]
CPU = torch.device("cpu")


def processor(size: int, cropped: bool = False):
    return open_processor(processor_content(TrainConfig(), (size, size), cropped))


def save(folder, labels, names=("a", "b"), split="train", **columns):
    """A local data set of parquet files."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(names)), **dict.fromkeys(columns, Image())})
    rows = {"image": PICTURES[: len(labels)], "label": labels, **columns}
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(name, fraction=0.25, **options):
    return load_image_data(name, validation_fraction=fraction, **options)


def test_digits_are_split_by_class_and_the_test_split_stays_whole():
    data = load(DIGITS, fraction=0.1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert data.class_names == [str(digit) for digit in range(10)]
    counts = np.bincount(data.splits["validation"]["label"])
    assert counts.min() >= 14 and counts.max() <= 15


def test_the_validation_part_is_a_function_of_the_seed():
    first, again, other = (load(DIGITS, seed=seed).splits["validation"]["label"][:] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_validation_split_of_the_data_is_used_as_it_is(tmp_path, name):
    for split, labels in (("train", [0, 1] * 4), (name, [1, 0])):
        file = save(tmp_path / "files", labels, split=split) + f"/{split}-00000-of-00001.parquet"
        load_dataset("parquet", data_files=file, split="train").save_to_disk(tmp_path / "set" / split)
    (tmp_path / "set/dataset_dict.json").write_text(f'{{"splits": ["train", "{name}"]}}')
    data = load(str(tmp_path / "set"))
    assert len(data.splits["train"]) == 8 and data.splits["validation"]["label"][:] == [1, 0]


def test_a_folder_of_pictures_is_a_data_set(tmp_path):
    from PIL import Image as Pillow

    for name in ("cat", "dog"):
        for number in range(4):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Pillow.new("L", (8 + number, 8), 50).save(path)
    assert load(str(tmp_path)).class_names == ["cat", "dog"]


def test_every_form_of_a_data_set_is_loaded(tmp_path):
    rows = load_dataset(save(tmp_path / "parquet", [0, 1] * 4), split="train")
    DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows")
    for name in ("parquet", "parquet/train-00000-of-00001.parquet", "rows", "rows/data-00000-of-00001.arrow"):
        assert len(load(str(tmp_path / name), fraction=0).splits["train"]) == 8
    before = sorted(tmp_path.rglob("*"))
    data = load(str(tmp_path / "splits"), fraction=0.25, max_train_samples=4)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "validation": 2, "test": 2}
    assert sorted(tmp_path.rglob("*")) == before, "something was written into the data"


def test_a_part_of_a_data_set_is_drawn_by_seed():
    small, other = (load(DIGITS, max_train_samples=50, max_eval_samples=20, seed=seed).splits for seed in (0, 1))
    assert {split: len(rows) for split, rows in small.items()} == {"train": 50, "validation": 20, "test": 20}
    assert small["train"]["label"][:] != other["train"]["label"][:] and len(set(small["train"]["label"])) == 10
    assert len(load(DIGITS, max_train_samples=10**6).splits["train"]) == 1077


def test_no_validation_split_is_made_where_none_is_wanted():
    assert {split: len(rows) for split, rows in load(DIGITS, fraction=0).splits.items()} == {"train": 1437, "test": 360}


def test_a_data_set_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset_name: '.*nowhere' cannot be loaded: "):
        load(str(tmp_path / "nowhere"))


def test_columns_that_do_not_fit_are_named_with_those_there_are(tmp_path):
    folder = save(tmp_path / "set", [0, 1] * 4, thumbnail=PICTURES[:8])
    columns = r"got the columns image \(Image\), label \(ClassLabel\), thumbnail \(Image\)"
    with pytest.raises(ValueError, match=f"--image_column_name: expected one Image column, {columns}"):
        load(folder)
    with pytest.raises(ValueError, match=f"--image_column_name: expected the Image column 'img', {columns}"):
        load(folder, image_column="img")
    with pytest.raises(ValueError, match="--label_column_name: expected the ClassLabel column 'thumbnail'"):
        load(folder, image_column="image", label_column="thumbnail")
    assert load(folder, image_column="thumbnail").image_column == "thumbnail"


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([], ["a", "b"], 'cannot be loaded: Instruction "train" corresponds to no data'),
        ([0, 1, None, 1], ["a", "b"], r"expected labels from 0 to 1, got None in row 2 of the split 'train' \(1 such"),
        ([0, 1, -1, -1], ["a", "b"], r"expected labels from 0 to 1, got -1 in row 2 of the split 'train' \(2 such"),
        ([1, 1, 1, 1], ["a", "b"], "expected several classes in the split 'train', got 1 only"),
        ([0, 0, 0, 0], ["a"], r"expected at least two classes in 'label', got \['a'\]"),
        ([0, 0, 0, 1], ["a", "b"], "--train_val_split: 0.25 does not suit"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path, labels, names, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "set", labels, names))


def test_a_label_beyond_the_classes_is_found_in_any_split(tmp_path):
    save(tmp_path / "set", [0, 1] * 4)
    folder = save(tmp_path / "set", [0, 2], names=["a", "b", "c"], split="test")
    with pytest.raises(ValueError, match="expected labels from 0 to 1, got 2 in row 1 of the split 'test'"):
        load(folder)


@pytest.mark.parametrize("secret", [-1, None])
def test_a_test_split_whose_labels_are_secret_is_left_out(tmp_path, secret):
    save(tmp_path / "set", [0, 1] * 4)
    assert "test" not in load(save(tmp_path / "set", [secret, secret], split="test")).splits
    with pytest.raises(ValueError, match=f"got {secret} in row 1 of the split 'test'"):
        load(save(tmp_path / "set", [0, secret], split="test"))


def test_a_data_set_without_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a 'train' split in .*, got test"):
        load(save(tmp_path / "set", [0, 1], split="test"))


# Pixels


def photographs(folder, sizes=((90, 60), (60, 90), (120, 120), (300, 200))) -> list[str]:
    """Files of smooth JPEG pictures, of which no two are alike."""
    files = []
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width] / max(width, height)
        pixels = np.stack([x * 200, y * 200, np.full_like(x, 20 * number)], -1)
        files.append(str(folder / f"{number}.jpg"))
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(files[-1], quality=95)
    return files


def data_of(files: list[str | None], labels: list[int]) -> ImageData:
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": files, "label": labels}, features)
    return ImageData(DatasetDict(train=rows, test=rows), "image", "label", ["a", "b"])


def read(images: Images, workers: int = 0, rows=None, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = list(range(len(images))) if rows is None else rows
    pixels, labels = zip(*images.batches([(epoch, rows[i : i + 3]) for i in range(0, len(rows), 3)], CPU, workers))
    return torch.cat(pixels), torch.cat(labels)


def test_pixels_are_the_processors_own_before_it_scales_them():
    images = Images(load(DIGITS), "test", processor(8), (8, 8))
    pixels, labels = read(images)
    assert pixels.shape == (360, 3, 8, 8) and pixels.dtype == torch.uint8
    raw = load_dataset(DIGITS, split="test")
    assert np.array_equal(pixels[7, 0].numpy(), np.array(raw[7]["image"])) and labels.tolist() == raw["label"][:]


def test_photographs_are_turned_and_cropped_as_the_pipeline_does(tmp_path):
    files = photographs(tmp_path)
    turned = PIL.Image.open(files[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(files[0], exif=exif, quality=95)
    chosen = processor(32, cropped=True)
    pixels, _ = read(Images(data_of(files, [0, 1, 0, 1]), "train", chosen, (32, 32)))
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(files[0]))
    assert upright.size == (60, 90)
    expected = chosen(upright, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert torch.equal(pixels[:1], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_pixels_equal_those_decoded_again(workers):
    kept, again = (Images(load(DIGITS, max_train_samples=100), "train", processor(8), (8, 8)) for _ in range(2))
    kept.keep(CPU, workers, quiet=True)
    for one, other in zip(read(kept), read(again, workers)):
        assert torch.equal(one, other)


def test_random_crops_are_a_function_of_seed_epoch_and_row(tmp_path):
    data = data_of(photographs(tmp_path), [0, 1, 0, 1])
    images, other = (Images(data, "train", processor(24), (24, 24), 0.2, seed=seed) for seed in (0, 1))
    first, _ = read(images)
    assert first.shape == (4, 3, 24, 24) and first.dtype == torch.uint8
    for workers in (0, 1, 3):
        assert torch.equal(read(images, workers)[0], first)
    assert torch.equal(read(images, rows=[3, 1])[0], first[[3, 1]])
    for different in (read(images, epoch=1)[0], read(other)[0]):
        assert (different != first).flatten(1).any(1).all()


def test_a_random_crop_keeps_the_part_and_the_ratio_that_it_should():
    draw, boxes = random.Random(0), []
    for _ in range(500):
        left, upper, right, lower = random_crop(300, 200, 0.25, draw)
        assert 0 <= left < right <= 300 and 0 <= upper < lower <= 200
        boxes.append(((right - left) * (lower - upper) / 60000, (right - left) / (lower - upper)))
    areas, ratios = np.array(boxes).T
    assert 0.25 <= areas.min() < 0.3 and 0.8 < areas.max() <= 1
    assert 0.75 - 1e-9 <= ratios.min() < 0.8 and 1.25 < ratios.max() <= 4 / 3 + 1e-9
    assert random_crop(1000, 10, 0.9, draw) == pytest.approx((493.333, 0, 506.667, 10), abs=1e-3)  # none fits


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_shows_the_place_that_it_was_cut_from(tmp_path, monkeypatch, orientation):
    """Red and green are the place in the picture: its corners must be those of the box, on JPEG drafts, too."""
    (file,) = photographs(tmp_path, sizes=[(1200, 900)])
    if orientation == 6:  # stored on its side
        upright = PIL.Image.open(file)
        exif = upright.getexif()
        exif[0x0112] = 6
        upright.transpose(PIL.Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)
    monkeypatch.setattr("vit_simple.data.random_crop", lambda *_: (100.0, 300.0, 1100.0, 850.0))
    pixels, _ = read(Images(data_of([file], [0]), "train", processor(32), (32, 32), 0.5))
    x, y = (channel.float() / 200 * 1200 for channel in pixels[0, :2])
    assert x.mean(0)[[0, -1]].tolist() == pytest.approx([116, 1084], abs=15)
    assert y.mean(1)[[0, -1]].tolist() == pytest.approx([309, 841], abs=15)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_crop_of_a_jpeg_is_one_of_pillows_pixels(tmp_path, monkeypatch, mode):
    PIL.Image.effect_noise((60, 50), 80).convert(mode).save(tmp_path / "noise.jpg", quality=90)
    monkeypatch.setattr("vit_simple.data.random_crop", lambda *_: (10.0, 20.0, 42.0, 36.0))
    images = Images(data_of([str(tmp_path / "noise.jpg")], [0]), "train", processor(32), (16, 32), 0.5)
    pixels, _ = read(images)
    expected = PIL.Image.open(tmp_path / "noise.jpg").convert("RGB").crop((10, 20, 42, 36))
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.array(expected))


def test_only_images_of_one_size_are_equal_and_only_small_splits_fit(tmp_path):
    assert equal_sizes(load(DIGITS).splits["train"], "image")
    assert not equal_sizes(data_of(photographs(tmp_path), [0, 1, 0, 1]).splits["train"], "image")
    assert fits(1_300_000, (32, 32)) and not fits(1_300_000, (224, 224))


# Keys


def test_each_epoch_has_every_row_once_but_for_an_unfilled_step():
    keys = training_keys(103, 5, 2, rank=0, world=1, seed=0, first_step=0)
    epochs = [[next(keys) for _ in range(20)] for _ in range(2)]
    rows = [[row for _, part in epoch for row in part] for epoch in epochs]
    assert [len(set(order)) for order in rows] == [100, 100] and rows[0] != rows[1]
    assert [{number for number, _ in epoch} for epoch in epochs] == [{0}, {1}]


def test_a_step_has_the_same_rows_with_any_number_of_processes_and_from_any_start():
    alone = training_keys(103, 20, 1, rank=0, world=1, seed=3, first_step=0)
    shared = [training_keys(103, 5, 1, rank=rank, world=4, seed=3, first_step=0) for rank in range(4)]
    late = training_keys(103, 20, 1, rank=0, world=1, seed=3, first_step=7)
    for step in range(20):
        epoch, rows = next(alone)
        assert [row for part in shared for row in next(part)[1]] == rows
        if step >= 7:
            assert next(late) == (epoch, rows)


def test_evaluation_sees_every_row_once_in_as_many_full_batches_for_each_process():
    parts = [evaluation_keys(23, 4, rank, 3) for rank in range(3)]
    assert [[len(rows) for _, rows in part] for part in parts] == [[4, 4]] * 3
    rows = [row for part in parts for _, batch in part for row in batch]
    assert sorted(row for row in rows if row >= 0) == list(range(23)) and rows.count(-1) == 1


# Bad images


def bad_files(folder) -> dict[str, str]:
    """Files that are no usable images, each with a word of its reason."""
    picture = folder / "0.jpg"
    (folder / "truncated.jpg").write_bytes(picture.read_bytes()[:400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    PIL.Image.effect_noise((40, 40), 50).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:600])
    header = b"P6 20000 20000 255\n"  # 400 million pixels
    (folder / "bomb.ppm").write_bytes(header)
    (folder / "large.ppm").write_bytes(b"P6 10000 10000 255\n")  # of which Pillow only warns
    return {
        "truncated.jpg": "truncated",
        "empty.jpg": "empty",
        "half.png": "truncated",
        "text.jpg": "not an image that Pillow knows",
        "broken.png": "not an image that Pillow knows|Error",
        "bomb.ppm": "more than 89478485 pixels",
        "large.ppm": "more than 89478485 pixels",
        "missing.jpg": "FileNotFoundError",
    }


@pytest.mark.parametrize("crop, workers", [(0.0, 0), (0.0, 1), (0.5, 0)])
def test_each_kind_of_bad_image_is_named_with_its_reason(tmp_path, crop, workers):
    good = photographs(tmp_path, sizes=[(40, 40)] * 3)
    for name, reason in [*bad_files(tmp_path).items(), (None, "there is none")]:
        data = data_of([good[0], name and str(tmp_path / name), *good[1:]], [0, 1, 0, 1])
        with pytest.raises(BadImage, match=rf"--on_bad_image: expected an image, got row 1 of .* 'train'.*({reason})"):
            read(Images(data, "train", processor(16), (16, 16), crop), workers)

        train = Images(data, "train", processor(16), (16, 16), crop, on_bad_image="skip")
        _, labels = read(train, workers)
        assert labels.tolist() == [0, 0, 0, 1]  # the next row takes its place
        assert list(train.bad) == [1] and (name is None or name in train.bad[1])
        test = Images(data, "test", processor(16), (16, 16), on_bad_image="skip")
        _, labels = read(test, workers)
        assert labels.tolist() == [0, IGNORED, 0, 1] and list(test.bad) == [1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_bad_images_alone_cannot_be_skipped(split):
    with pytest.raises(BadImage, match=f"expected an image to be left in the split '{split}', got none"):
        read(Images(data_of([None] * 3, [0, 1, 0]), split, processor(16), (16, 16), on_bad_image="skip"))
