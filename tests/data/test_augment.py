import kornia.augmentation
import kornia.enhance
import kornia.geometry
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from vit_simple.data.augment import Augment, draw_affine, draw_erase, draw_mix
from vit_simple.data.collator import TrainerCollator, mark_for_augmentation
from vit_simple.data.processors import open_processor
from vit_simple.data.randaugment import OPERATIONS, RandAugment, warp
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


def gray_outside(function, x, amount):
    return function(x - 0.5, amount) + 0.5


def along(axis: int, amount: torch.Tensor) -> torch.Tensor:
    return F.pad(amount[:, None], (axis, 1 - axis))


def stretched(x, kind: str):
    """AutoContrast and Equalize by their definition, one channel after the other."""
    result = x.clone()
    for channel, out in zip(x.flatten(0, 1), result.flatten(0, 1)):
        levels = (channel * 255).round()
        if kind == "AutoContrast":
            out.copy_((levels - levels.min()) / (levels.max() - levels.min()))
        else:
            below = (levels.flatten() <= levels[..., None]).sum(-1)  # (H, W)
            out.copy_((below - below.min()) / (below.max() - below.min()))
    return result


SINGLE = {  # kornia's operations on x with a strength for each image
    "Identity": lambda x, s: x,
    "AutoContrast": lambda x, s: stretched(x, "AutoContrast"),
    "Equalize": lambda x, s: stretched(x, "Equalize"),
    "Posterize": lambda x, s: kornia.enhance.posterize(x, 8 - round(4 * s[0].abs().item())),
    "Solarize": lambda x, s: kornia.enhance.solarize(x, 1 - s.abs()),
    "Brightness": lambda x, s: kornia.enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s),
    "Color": lambda x, s: kornia.enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * s),
    "Contrast": lambda x, s: kornia.enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s),
    "Sharpness": lambda x, s: kornia.enhance.sharpness(x, 1 + 0.9 * s),
    "Rotate": lambda x, s: gray_outside(kornia.geometry.rotate, x, 30 * s),
    "ShearX": lambda x, s: gray_outside(kornia.geometry.shear, x, along(0, 0.3 * s)),
    "ShearY": lambda x, s: gray_outside(kornia.geometry.shear, x, along(1, 0.3 * s)),
    "TranslateX": lambda x, s: gray_outside(kornia.geometry.translate, x, along(0, 0.45 * x.shape[3] * s)),
    "TranslateY": lambda x, s: gray_outside(kornia.geometry.translate, x, along(1, 0.45 * x.shape[2] * s)),
}


def images(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Images whose values are levels of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, 220, (count, 3, height, width), generator=generator) / 255


def applied(x: torch.Tensor, names: list[str], direction: int, magnitude: float) -> torch.Tensor:
    """x after the same operations for all images, one in each round; direction 1 or -1."""
    augment = RandAugment(len(names), magnitude)
    drawn = [[2 * OPERATIONS.index(name) + (direction < 0)] * len(x) for name in names]
    return augment(x, torch.from_numpy(augment.table(np.array(drawn), *x.shape[2:])).float())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_operation_equals_kornias_to_half_a_level(name, shape):
    x = images(6, *shape)
    for magnitude in (9.0, 4.0, 0.0):
        for direction in (1, -1):
            expected = SINGLE[name](x, torch.full((6,), direction * magnitude / 10)).clamp(0, 1)
            found = applied(x, [name], direction, magnitude)
            torch.testing.assert_close(found, expected, rtol=0, atol=0.505 / 255, msg=f"{magnitude} {direction}")


@pytest.mark.parametrize("names", [["Contrast", "Rotate"], ["Rotate", "Contrast"], ["Equalize", "Solarize"]])
def test_two_operations_keep_their_order(names):
    x, strength = images(6), torch.full((6,), 0.9)
    expected = SINGLE[names[1]](SINGLE[names[0]](x, strength).clamp(0, 1), strength).clamp(0, 1)
    difference = (applied(x, names, 1, 9.0) - expected).abs()  # a level may be rounded before it is inverted
    assert (difference > 1.5 / 255).float().mean() < 0.01


def test_two_geometric_operations_are_one_interpolation():
    x = images(6)
    there = applied(x, ["Rotate", "TranslateX"], 1, 9.0)
    twice = SINGLE["TranslateX"](SINGLE["Rotate"](x, torch.full((6,), 0.9)), torch.full((6,), 0.9))
    smooth = F.avg_pool2d(there - twice, 5)  # the second interpolation blurs, the place is the same
    assert smooth.abs().mean() < 0.02 and there.std() > twice.std()


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_channel_of_one_level_has_nothing_to_stretch(name):
    x = torch.full((2, 3, 16, 16), 204 / 255)
    assert torch.equal(applied(x, [name], 1, 9.0), x)


def test_randaugment_draws_every_operation_and_direction_equally_often():
    augment, count = RandAugment(2, 9.0), 28 * 2000
    torch.manual_seed(0)
    drawn = augment.draw(count, 8, 8)[6:8].astype(int)
    for row in drawn:
        counts = np.bincount(row, minlength=28)
        assert len(counts) == 28 and (abs(counts - 2000) < 5 * 2000**0.5).all()
    pairs = np.bincount(28 * drawn[0] + drawn[1], minlength=28**2)
    assert ((pairs - count / 28**2) ** 2 / (count / 28**2)).sum() < 28**2 + 5 * (2 * 28**2) ** 0.5


def test_randaugment_of_many_draws_has_the_mean_and_the_spread_of_kornias_operations():
    x, count = images(1), 28 * 300
    torch.manual_seed(0)
    augment = RandAugment(1, 9.0)
    found = augment(x.expand(count, -1, -1, -1), torch.from_numpy(augment.draw(count, 16, 16)).float())
    single = [SINGLE[name](x, torch.tensor([sign * 0.9])).clamp(0, 1) for name in OPERATIONS for sign in (1, -1)]
    expected = torch.cat(single)
    error = expected.std(0) / count**0.5
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error + 0.5 / 255).all()
    torch.testing.assert_close(found.std(0), expected.std(0, correction=0), rtol=0.1, atol=0.5 / 255)


def test_images_of_a_batch_are_changed_as_each_would_be_alone():
    x, augment = images(40), RandAugment(2, 9.0)
    torch.manual_seed(0)
    drawn = torch.randint(28, (2, 40)).numpy()
    together = augment(x, torch.from_numpy(augment.table(drawn, 16, 16)).float())
    for row in range(40):
        alone = augment(x[row : row + 1], torch.from_numpy(augment.table(drawn[:, row : row + 1], 16, 16)).float())
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1.01 / 255)


# The operations that are dispatched


EVERYTHING = {"crop_padding": 2, "horizontal_flip": 0.5, "affine_degrees": 15, "affine_translate": 0.1}
EVERYTHING |= {"randaugment_num_ops": 2, "random_erasing": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
EVERYTHING |= {"label_smoothing_factor": 0.1}
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"detach", "alias", "as_strided", "_reshape_alias", "unfold", "split", "unbind"}
WAITING = {"nonzero", "_local_scalar_dense", "masked_select", "item", "is_nonzero", "unique", "_unique2", "bincount"}


class Dispatched(TorchDispatchMode):
    """The names of the operations that are dispatched, except views; fails for one that waits for its device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        assert name not in WAITING
        if name == "index":
            assert not any(item is not None and item.dtype == torch.bool for item in args[1]), "indexed by a mask"
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [32, 512])
def test_batch_with_everything_on_dispatches_at_most_150_operations_and_never_waits(processor, batch):
    pixels = torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)
    augment = Augment(processor, 5, **EVERYTHING)
    with Dispatched() as seen:
        augment(pixels, torch.arange(batch) % 5)
    assert len(seen.names) <= 150


def test_augmentation_compiles_as_one_region(processor, pixels):
    augment = Augment(processor, 5, **EVERYTHING)
    draws = augment.draw(pixels)
    whole = torch.compile(augment.apply_draws, backend="eager", fullgraph=True)
    for found, expected in zip(whole(pixels, LABELS, *draws), augment.apply_draws(pixels, LABELS, *draws)):
        torch.testing.assert_close(found, expected)


# Erasing, affine maps and mixing


def test_affine_map_equals_kornias():
    x, options = images(200), {"degrees": 20.0, "translate": 0.2, "scale": 0.3, "shear": 10.0}
    theirs = kornia.augmentation.RandomAffine(20.0, (0.2, 0.2), (0.7, 1.3), 10.0, padding_mode="border", p=1.0)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    maps = torch.from_numpy(draw_affine(200, 16, 16, **options)).float()
    torch.testing.assert_close(warp(x, maps, "border"), expected, rtol=0, atol=1e-4)


def test_erased_rectangles_have_the_areas_and_ratios_of_the_paper():
    torch.manual_seed(0)
    _, _, half_height, half_width = draw_erase(20_000, 100, 100, 0.25)
    erased = half_height > 0
    assert abs(erased.mean() - 0.25) < 0.02
    height, width = 2 * half_height[erased], 2 * half_width[erased]
    inside = (height < 100) & (width < 100)
    area, ratio = (height * width)[inside] / 100**2, np.log(height / width)[inside]
    assert area.min() > 0.015 and area.max() < 0.345 and abs(np.median(area) - 0.17) < 0.01
    assert abs(ratio).max() < np.log(3.3) + 0.15 and abs(ratio.mean()) < 0.03


def test_mixed_images_keep_what_the_beta_distributions_draw():
    betas = {"mixup": torch.distributions.Beta(0.8, 0.8), "cutmix": torch.distributions.Beta(1.0, 1.0)}
    torch.manual_seed(0)
    kept, _, _, half_height, half_width = draw_mix(40_000, 100, 100, betas)
    cut = half_height > 0
    assert abs(cut.mean() - 0.5) < 0.02 and (kept[cut] == 1).all() and (half_width[cut] > 0).all()
    area = 4 * (half_height * half_width)[cut] / 100**2  # 1 - Beta(1, 1) is uniform
    quantiles = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    assert abs(np.quantile(area, quantiles) - quantiles).max() < 0.02
    expected = np.quantile(betas["mixup"].sample((40_000,)).numpy(), quantiles)
    assert abs(np.quantile(kept[~cut & (kept < 1)], quantiles) - expected).max() < 0.02


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
