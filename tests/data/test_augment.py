import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vit_simple.data.augment import OPERATIONS, Augment, rand_augment
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.data.processors import open_processor
from vit_simple.training.config import OPTIONS, TrainConfig
from vit_simple.training.setup import processor_content

# Each option of Augment that moves pixels, switched on.
PIXELS = [
    {"crop_padding": 2},
    {"horizontal_flip": 0.5},
    {"affine_degrees": 15},
    {"affine_translate": 0.2},
    {"affine_scale": 0.2},
    {"affine_shear": 15},
    {"randaugment_num_ops": 2},
    {"random_erasing": 1.0},
    {"mixup_alpha": 1.0},
    {"cutmix_alpha": 1.0},
]


@pytest.fixture(scope="module")
def processor():
    return open_processor(processor_content(TrainConfig(), (16, 16), cropped=False))


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(24) % 5


def test_without_augmentation_pixels_equal_the_processors(processor):
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    expected = processor(image, return_tensors="pt").pixel_values
    augment = Augment(processor, 5)
    assert raw.dtype == torch.uint8
    torch.testing.assert_close(augment.normalize(raw), expected, rtol=0, atol=1e-6)
    x, targets = augment(raw, torch.tensor([3]))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert torch.equal(targets, F.one_hot(torch.tensor([3]), 5).float())


@pytest.mark.parametrize("option", PIXELS, ids=lambda option: next(iter(option)))
def test_each_image_has_draws_of_its_own_that_a_seed_repeats(processor, pixels, option):
    same = pixels[:1].expand(24, -1, -1, -1)
    mixes = {"mixup_alpha", "cutmix_alpha"} & set(option)
    given = pixels if mixes else same
    before, augment = given.clone(), Augment(processor, 5, **option)
    torch.manual_seed(0)
    first, targets = augment(given, LABELS)
    assert first.dtype == torch.float32 and first.shape == pixels.shape and torch.isfinite(first).all()
    assert torch.equal(given, before), "the caller's pixels were changed"
    assert len(first.flatten(1).unique(dim=0)) > (1 if "horizontal_flip" in option else 10)
    torch.manual_seed(0)
    again, again_targets = augment(given, LABELS)
    assert torch.equal(again, first) and torch.equal(again_targets, targets)
    torch.manual_seed(1)
    assert not torch.equal(augment(given, LABELS)[0], first)


def test_a_padded_crop_moves_the_image_and_leaves_black_behind(processor):
    pixels = torch.full((200, 3, 16, 16), 255, dtype=torch.uint8)
    x, _ = Augment(processor, 5, crop_padding=3)(pixels, torch.zeros(200, dtype=torch.long))
    white = x == 1
    assert (white | (x == -1)).all()
    rows, columns = white[:, 0].any(2).sum(1), white[:, 0].any(1).sum(1)
    assert torch.equal(white[:, 0].sum((1, 2)), rows * columns)  # always a rectangle
    assert set(rows.tolist()) == set(columns.tolist()) == {13, 14, 15, 16}


def test_a_flip_mirrors_about_as_many_images_as_it_should(processor, pixels):
    many = pixels[:1].expand(400, -1, -1, -1)
    plain, augment = Augment(processor, 5).normalize(many), Augment(processor, 5, horizontal_flip=0.25)
    x, _ = augment(many, torch.zeros(400, dtype=torch.long))
    flipped = (x == plain.flip(3)).flatten(1).all(1)
    assert (flipped | (x == plain).flatten(1).all(1)).all() and 60 < flipped.sum() < 140


def test_a_plain_image_stays_plain_up_to_its_border(processor):
    pixels = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    options = {"affine_degrees": 30, "affine_translate": 0.3, "affine_scale": 0.2, "affine_shear": 10}
    moved, _ = Augment(processor, 5, **options)(pixels, LABELS[:4])
    torch.testing.assert_close(moved, torch.full_like(moved, 200 / 255 * 2 - 1), rtol=0, atol=1e-5)


# RandAugment


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_what_its_name_says(name):
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    strong = OPERATIONS[name](x, torch.ones(4))
    assert strong.shape == x.shape and torch.isfinite(strong).all()
    gray = (strong == 0.5).all(1)  # (B, H, W), where the image has moved away
    expected = {
        "Identity": lambda: torch.equal(strong, x),
        "AutoContrast": lambda: strong.amin((2, 3)).max() < 1e-4 and strong.amax((2, 3)).min() > 1 - 1e-4,
        "Equalize": lambda: (strong.sort(-1)[0].mean() - 0.5).abs() < 0.02 and strong.std() > 1.4 * x.std(),
        "Posterize": lambda: len((strong * 255).round().unique()) <= 16 and (strong - x).abs().max() < 16.5 / 255,
        "Solarize": lambda: torch.allclose(strong, 1 - x),
        "Brightness": lambda: torch.allclose(strong, (1.9 * x).clamp(max=1)),
        "Color": lambda: strong.std(1).mean() > 1.5 * x.std(1).mean(),
        "Contrast": lambda: strong.std() > 1.5 * x.std(),
        "Sharpness": lambda: strong.diff(dim=3).abs().mean() > 1.2 * x.diff(dim=3).abs().mean(),
        "Rotate": lambda: gray[:, 0, 0].all() and gray[:, -1, -1].all() and not gray[:, 7:9, 7:9].any(),
        "ShearX": lambda: torch.allclose(strong[:, :, 7:9].mean(), x[:, :, 7:9].mean(), atol=0.02),
        "ShearY": lambda: torch.allclose(strong[:, :, :, 7:9].mean(), x[:, :, :, 7:9].mean(), atol=0.02),
        "TranslateX": lambda: (
            torch.allclose(strong[:, :, :, :7], torch.tensor(0.5)) and strong[:, :, :, 9:].std() > 0.1
        ),
        "TranslateY": lambda: torch.allclose(strong[:, :, :7], torch.tensor(0.5)) and strong[:, :, 9:].std() > 0.1,
    }
    assert expected[name]()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"Identity", "AutoContrast", "Equalize", "Posterize"}))
def test_an_operation_without_strength_changes_nothing(name):
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(OPERATIONS[name](x, torch.zeros(2)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_channel_of_one_level_has_nothing_to_stretch(name):
    x = torch.full((2, 3, 16, 16), 0.8)
    assert torch.equal(OPERATIONS[name](x, torch.ones(2)), x)


def test_images_of_a_batch_are_changed_as_each_would_be_alone():
    x = torch.rand(8, 3, 16, 16)
    strength = torch.tensor([1.0, -1.0]).repeat(4) * 0.7
    for name, operation in OPERATIONS.items():
        alone = torch.cat([operation(x[i : i + 1], strength[i : i + 1]) for i in range(8)])
        torch.testing.assert_close(operation(x, strength), alone, msg=name)


def test_randaugment_draws_an_operation_for_each_image():
    same = torch.rand(1, 3, 16, 16).expand(64, -1, -1, -1)
    changed = rand_augment(same, 1, 9.0)
    assert 10 < len(changed.flatten(1).unique(dim=0)) <= 2 * len(OPERATIONS)
    assert changed.min() >= 0 and changed.max() <= 1
    assert len(rand_augment(same, 2, 9.0).flatten(1).unique(dim=0)) > 40


# Erasing and mixing


def test_erasing_leaves_all_but_a_rectangle(processor, pixels):
    plain = Augment(processor, 5).normalize(pixels)
    x, _ = Augment(processor, 5, random_erasing=1.0)(pixels, LABELS)
    erased = (x != plain).any(1)  # (B, H, W)
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.sum((1, 2)), rows * columns) and (erased.sum((1, 2)) <= 256 / 3 * 1.4).all()
    assert erased.flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(Augment(processor, 5, random_erasing=0.0)(pixels, LABELS)[0], plain)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_a_mixed_target_is_the_share_of_each_image_in_the_pixels(processor, alphas):
    """Every image has the brightness of its class, so that the mean of the pixels tells what its target must be."""
    labels = torch.arange(64) % 2
    pixels = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    augment = Augment(processor, 2, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    x, targets = augment(pixels, labels)
    torch.testing.assert_close((x.mean((1, 2, 3)) + 1) / 2, targets[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(targets.sum(0).sum(), torch.tensor(64.0))
    pure = ((x == 1) | (x == -1)).flatten(1).all(1)  # CutMix never blends
    least, most = {(0.8, 0.0): (0, 0), (0.0, 1.0): (1, 1), (0.8, 1.0): (0.25, 0.75)}[alphas]
    assert least <= pure.float().mean() <= most


def test_label_smoothing_equals_that_of_cross_entropy(processor, pixels):
    logits = torch.randn(24, 5)
    _, targets = Augment(processor, 5, label_smoothing_factor=0.1)(pixels, LABELS)
    expected = F.cross_entropy(logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_its_options_are_those_of_a_run(processor):
    names = {name for name, item in OPTIONS.items() if item.metadata["group"] == "augmentation"}
    assert {name for option in PIXELS for name in option} <= names
    Augment(processor, 5, **TrainConfig().group("augmentation"))


def test_a_processor_that_does_not_normalize_is_refused():
    content = processor_content(TrainConfig(), (16, 16), cropped=False) | {"do_normalize": False}
    with pytest.raises(ValueError, match="expected do_rescale and do_normalize"):
        Augment(open_processor(content), 5)


# The collator for Trainer


def test_the_collator_mixes_marked_rows_alone(processor):
    rows = [{"image": Image.new("L", (20, 30), 10 * number), "label": number % 5} for number in range(8)]
    marked = mark_for_augmentation({"image": [row["image"] for row in rows], "label": [row["label"] for row in rows]})
    marked = [dict(zip(marked, values)) for values in zip(*marked.values())]
    collate = TrainerCollator(processor, Augment(processor, 5, mixup_alpha=1.0, label_smoothing_factor=0.1))
    plain, mixed = collate(rows), collate(marked)
    expected = processor([row["image"] for row in rows], return_tensors="pt").pixel_values
    torch.testing.assert_close(plain["pixel_values"], expected, rtol=0, atol=1e-6)
    assert plain["labels"].tolist() == [row["label"] for row in rows]
    assert mixed["labels"].shape == (8, 5) and mixed["labels"].dtype == torch.float32
    assert not torch.equal(mixed["pixel_values"], expected)
    with pytest.raises(ValueError, match="expected all or none of a batch to be marked for augmentation, got some"):
        collate([rows[0], marked[1]])
