import pytest

from tests.conftest import classes
from vit_simple.data.augment import Augment
from vit_simple.data.processors import open_processor
from vit_simple.files import ROOT, UserError
from vit_simple.train import main
from vit_simple.training.config import TrainConfig, parse_config
from vit_simple.training.setup import build_model_config, processor_content


def test_command_line_overrides_recipe_overrides_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nseed: 3\nnum_train_epochs: 7\nmodel: {image_size: 8, patch_size: 2}\n")
    config = parse_config([str(recipe), "--seed", "4", "--output_dir", "x"])
    assert (config.learning_rate, config.seed, config.num_train_epochs) == (1e-3, 4, 7)
    assert config.model == {"image_size": 8, "patch_size": 2} and config.output_dir == "x"
    assert config.weight_decay == TrainConfig().weight_decay


def test_digits_recipe_is_the_default_without_dataset_name():
    assert parse_config(["--seed", "1"]).optim == "muon"
    assert parse_config(["--dataset_name", "cifar10"]) == TrainConfig(dataset_name="cifar10")


def test_variant_of_command_line_replaces_model_of_recipe():
    config = parse_config(["--variant", "Ti/4", "--image_size", "8"])
    assert (config.model, config.variant, config.optim) == (None, "Ti/4", "muon")


def test_image_size_of_command_line_changes_the_model_of_the_recipe():
    model = parse_config([str(ROOT / "recipes/cifar10.yaml")]).model
    config = parse_config([str(ROOT / "recipes/cifar10.yaml"), "--image_size", "64"])
    assert config.model == model | {"image_size": 64} and config.image_size is None
    with pytest.raises(UserError, match="--image_size: expected a number in"):
        parse_config([str(ROOT / "recipes/cifar10.yaml"), "--image_size", "0"])


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, default in vars(TrainConfig()).items():
        shown = str(default).lower() if isinstance(default, bool) else default
        assert f"--{name} " in printed and (default in (None, False) or f"(default: {shown})" in printed)


@pytest.mark.parametrize("recipe", ["digits", "cifar10", "imagenet_s16", "finetune_b16"])
def test_recipe_options_exist_and_its_model_can_be_built(recipe):
    config = parse_config([str(ROOT / f"recipes/{recipe}.yaml")])
    processor = open_processor(processor_content(TrainConfig(), (32, 32), cropped=False))
    Augment(processor, 10, **config.group("augmentation"))
    if config.model_name_or_path is None:
        assert build_model_config(config, classes(*map(str, range(1000)))).num_labels == 1000


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: " + "[" * 3000 + "]" * 3000, "nested at most 10 deep"),
        ("model: &a [x, x]\nseed: *a", r"without aliases, got \*a"),
        ("image_size: 010", "expected a decimal number without leading zeros, or quotes, got 010"),
        ("image_size: 3:44", "expected a decimal number .* got 3:44"),
    ],
)
def test_yaml_that_explodes_or_is_misread_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_config([str(tmp_path / "recipe.yaml")])
    with pytest.raises(UserError, match=message):
        parse_config(["--model", "{" + text.replace("\n", ", ") + "}"])


def test_numbers_and_quoted_texts_of_a_recipe_are_read_as_they_are_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "dataset_name: '010'\nseed: 0\nimage_size: 10\nema_decay: 0.9\nlearning_rate: 1e-3\n"
    )
    config = parse_config([str(tmp_path / "recipe.yaml")])
    assert (config.dataset_name, config.seed, config.image_size) == ("010", 0, 10)
    assert (config.ema_decay, config.learning_rate) == (0.9, 1e-3)
