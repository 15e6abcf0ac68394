import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from vit_simple.augment import Augment
from vit_simple.train import write_processor


@pytest.fixture
def processor(tmp_path):
    write_processor(tmp_path, (8, 8))
    return AutoImageProcessor.from_pretrained(tmp_path)


def test_without_augmentation_pixels_equal_the_processors_bit_for_bit(processor):
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert raw.dtype == torch.uint8
    assert torch.equal(Augment(processor)(raw), processor(image, return_tensors="pt").pixel_values)


def test_every_image_gets_its_own_map_and_a_seed_repeats_it(processor):
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(16, -1, -1, -1)
    augment = Augment(processor, degrees=15, translate=0.1, scale=0.1, shear=10)
    torch.manual_seed(0)
    first = augment(pixels)
    assert first.dtype == torch.float32 and first.shape == pixels.shape and first.abs().max() <= 1
    assert len(first.flatten(1).unique(dim=0)) == 16
    torch.manual_seed(0)
    assert torch.equal(augment(pixels), first)


@pytest.mark.parametrize("option", ["degrees", "translate", "scale", "shear"])
def test_each_option_moves_pixels(processor, option):
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    amount = 15 if option in ("degrees", "shear") else 0.2
    assert not torch.allclose(Augment(processor, **{option: amount})(pixels), Augment(processor)(pixels))


def test_a_plain_image_stays_plain_up_to_its_border(processor):
    pixels = torch.full((4, 3, 8, 8), 200, dtype=torch.uint8)
    moved = Augment(processor, degrees=30, translate=0.3, scale=0.2, shear=10)(pixels)
    torch.testing.assert_close(moved, torch.full_like(moved, 200 / 255 * 2 - 1), rtol=0, atol=1e-5)
