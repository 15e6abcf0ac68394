import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset

from tests.conftest import DIGITS, data_of, images_of, photographs, processor
from vit_simple.data.dataloader import evaluation_keys, fits_in_cache, have_equal_sizes, training_keys
from vit_simple.data.decoding import BadImage
from vit_simple.data.labels import IGNORED
from vit_simple.data.loading import load_image_data


def read(images, workers: int = 0, rows=None, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images.context.num_workers = workers
    rows = list(range(images.size)) if rows is None else rows
    pixels, labels = zip(*images.batches([(epoch, rows[i : i + 3]) for i in range(0, len(rows), 3)]))
    return torch.cat(pixels), torch.cat(labels)


def test_pixels_are_the_processors_own_before_it_scales_them():
    images = images_of(load_image_data(DIGITS), "test", processor(8), (8, 8))
    pixels, labels = read(images)
    assert pixels.shape == (360, 3, 8, 8) and pixels.dtype == torch.uint8
    raw = load_dataset(DIGITS, split="test")
    assert np.array_equal(pixels[7, 0].numpy(), np.array(raw[7]["image"])) and labels.tolist() == raw["label"][:]
    cropped = processor(8, cropped=True)
    pixels, _ = read(images_of(load_image_data(DIGITS), "test", cropped, (8, 8)), rows=[7])
    expected = cropped(raw[7]["image"].convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt")
    assert torch.equal(pixels, expected.pixel_values)


def test_photographs_are_turned_and_cropped_as_the_pipeline_does(tmp_path):
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


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_pixels_equal_those_decoded_again(monkeypatch, workers):
    monkeypatch.setattr("vit_simple.data.dataloader.MANY", 0)
    monkeypatch.setattr("vit_simple.data.dataloader.DECODE_BATCH", 32)
    kept, again = (
        images_of(load_image_data(DIGITS, max_train_samples=100), "train", processor(8), (8, 8)) for _ in range(2)
    )
    kept.context.cache_workers = workers
    kept.cache(quiet=True)
    for one, other in zip(read(kept), read(again, workers)):
        assert torch.equal(one, other)


def test_random_crops_are_a_function_of_seed_epoch_and_row(tmp_path):
    data = data_of(photographs(tmp_path), [0, 1, 0, 1])
    images, other = (images_of(data, "train", processor(24), (24, 24), 0.2, seed=seed) for seed in (0, 1))
    first, _ = read(images)
    assert first.shape == (4, 3, 24, 24) and first.dtype == torch.uint8
    for workers in (0, 1, 3):
        assert torch.equal(read(images, workers)[0], first)
    assert torch.equal(read(images, rows=[3, 1])[0], first[[3, 1]])
    for different in (read(images, epoch=1)[0], read(other)[0]):
        assert (different != first).flatten(1).any(1).all()


@pytest.mark.parametrize("kind, orientation", [("JPEG", 1), ("JPEG", 6), ("PNG", 6), ("TIFF", 6), ("WEBP", 6)])
def test_a_crop_shows_the_place_that_it_was_cut_from(tmp_path, monkeypatch, kind, orientation):
    """Red and green are the place in the picture: its corners must be those of the box, on JPEG drafts, too."""
    (file,) = photographs(tmp_path, sizes=[(1200, 900)])
    upright = PIL.Image.open(file)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(PIL.Image.Transpose.ROTATE_90) if orientation == 6 else upright.copy()  # on its side
    stored.save(file, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 95}))
    monkeypatch.setattr("vit_simple.data.decoding.sample_crop_box", lambda *_: (100.0, 300.0, 1100.0, 850.0))
    pixels, _ = read(images_of(data_of([file], [0]), "train", processor(32), (32, 32), 0.5))
    x, y = (channel.float() / 200 * 1200 for channel in pixels[0, :2])
    assert x.mean(0)[[0, -1]].tolist() == pytest.approx([116, 1084], abs=15)
    assert y.mean(1)[[0, -1]].tolist() == pytest.approx([309, 841], abs=15)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_crop_of_a_jpeg_is_one_of_pillows_pixels(tmp_path, monkeypatch, mode):
    PIL.Image.effect_noise((60, 50), 80).convert(mode).save(tmp_path / "noise.jpg", quality=90)
    monkeypatch.setattr("vit_simple.data.decoding.sample_crop_box", lambda *_: (10.0, 20.0, 42.0, 36.0))
    images = images_of(data_of([str(tmp_path / "noise.jpg")], [0]), "train", processor(32), (16, 32), 0.5)
    pixels, _ = read(images)
    expected = PIL.Image.open(tmp_path / "noise.jpg").convert("RGB").crop((10, 20, 42, 36))
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.array(expected))


def test_only_images_of_one_size_are_equal_and_only_small_splits_fit(tmp_path):
    assert have_equal_sizes(load_image_data(DIGITS).splits["train"], "image")
    assert not have_equal_sizes(data_of(photographs(tmp_path), [0, 1, 0, 1]).splits["train"], "image")
    assert fits_in_cache(1_300_000, (3, 32, 32)) and not fits_in_cache(1_300_000, (3, 224, 224))


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
            read(images_of(data, "train", processor(16), (16, 16), crop), workers)

        train = images_of(data, "train", processor(16), (16, 16), crop, on_bad_image="skip")
        _, labels = read(train, workers)
        assert labels.tolist() == [0, 0, 0, 1]  # the next row takes its place
        assert [row.split(" (")[0] for row in train.bad] == ["row 1 of the split 'train'"]
        assert name is None or name in next(iter(train.bad))
        test = images_of(data, "test", processor(16), (16, 16), on_bad_image="skip")
        _, labels = read(test, workers)
        assert labels.tolist() == [0, IGNORED, 0, 1] and len(test.bad) == 1
        assert sorted(target for _, target in test.samples(9)) == [0, 0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_bad_images_alone_cannot_be_skipped(split):
    with pytest.raises(BadImage, match=f"expected an image to be left in the split '{split}', got none"):
        read(images_of(data_of([None] * 3, [0, 1, 0]), split, processor(16), (16, 16), on_bad_image="skip"))
