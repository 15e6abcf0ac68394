"""What a user reads where transformers needs torchvision and it is not installed: one line, from each command."""

import json

import pytest

from tests.conftest import DIGITS, tiny
from vit_simple.convert_checkpoint import main as convert
from vit_simple.data.processors import stock_processor
from vit_simple.push_to_hub import main as push
from vit_simple.train import main as train

LINE = (
    r"^{command}: error: (preprocessor_config\.json: )?transformers [\d.]+ needs torchvision to open an image "
    r"processor: pip install torchvision, or pip install 'transformers>=5\.18'$"
)


@pytest.fixture
def folder(tmp_path):
    names = {number: name for number, name in enumerate("abcde")}
    tiny(id2label=names, label2id={name: number for number, name in names.items()}).save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(stock_processor((16, 16))))
    return tmp_path / "model"


def test_commands_say_in_one_line_that_torchvision_is_missing(folder, tmp_path):
    with pytest.raises(SystemExit, match=LINE.format(command="train.py")):
        train(
            ["--dataset_name", DIGITS, "--image_size", "8", "--variant", "Ti/4", "--output_dir", str(tmp_path / "run")]
        )
    with pytest.raises(SystemExit, match=LINE.format(command="convert_checkpoint.py")):
        convert([str(folder), str(tmp_path / "converted")])
    with pytest.raises(SystemExit, match=LINE.format(command="push_to_hub.py")):
        push([str(folder), "user/name", "--license", "mit", "--dry_run"])
