import json
import re

import numpy as np
import PIL.Image
import pytest
from huggingface_hub import EvalResult, ModelCard

from tests.conftest import TINY, tiny
from tests.sharing.conftest import edit
from vit_simple import ViTSimpleConfig, ViTSimpleModel, __version__
from vit_simple.data.processors import stock_processor
from vit_simple.files import UserError, read_metrics
from vit_simple.inference.exporting import recorded_dataset
from vit_simple.sharing.card import BEGIN, END, OLD_BEGIN, build_card, user_text
from vit_simple.sharing.card_text import confidence_interval


def write_metrics(folder, *lines: dict):
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


# The user's part


def test_card_is_built_again_as_it_was(folder):
    card = (folder / "README.md").read_text()
    assert build_card(folder) == card and card.count(BEGIN) == card.count(END) == 1


def test_card_keeps_the_users_text_and_replaces_the_generated_text(folder):
    edit(folder / "README.md", BEGIN, f"# Mine\n\n{BEGIN}")
    edit(folder / "README.md", END, f"{END}\nMine, too.")
    edit(folder / "README.md", "plain Vision Transformer", "changed Vision Transformer")
    card = build_card(folder, "user/digits")
    text = ModelCard(card).text.strip()
    assert text.startswith("# Mine") and text.endswith("Mine, too.")
    assert "changed Vision Transformer" not in card and 'model="user/digits"' in card


def test_card_with_the_old_marker_is_updated(folder):
    card = (folder / "README.md").read_text()
    edit(folder / "README.md", BEGIN, f"# Mine\n\n{OLD_BEGIN}")
    assert user_text((folder / "README.md").read_text()) == "# Mine"
    assert build_card(folder) == card.replace(BEGIN, f"# Mine\n\n{BEGIN}")


def test_card_without_markers_keeps_its_text_and_gets_metadata(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nBy the user.\n")
    card = ModelCard(build_card(folder))
    assert card.text.strip() == "By the user." and card.data.library_name == "transformers"


@pytest.mark.parametrize("text", [BEGIN, f"{END} {BEGIN}"])
def test_card_with_incomplete_markers_is_refused(folder, text):
    with pytest.raises(UserError, match="once and in this order"):
        build_card(folder, old_card=f"---\nlicense: mit\n---\n{text}\n")


def test_user_text_is_what_is_not_generated(folder):
    assert user_text(build_card(folder)) == user_text("") == ""
    assert user_text("---\nlicense: mit\n---\nTheir text.\n") == "Their text."


def test_card_keeps_the_users_metadata(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.license, card.data.pipeline_tag, card.data.language = "gpl-3.0", "other", "ja"
    card.save(folder / "README.md")
    data = ModelCard(build_card(folder)).data
    assert (data.license, data.pipeline_tag, data.language) == ("gpl-3.0", "other", "ja")
    assert ModelCard(build_card(folder, license="mit")).data.license == "mit"


def test_card_of_the_hub_gets_the_metadata_of_the_folder_that_it_lacks(folder):
    edit(folder / "README.md", "license: mit", "license: mit\nlanguage: en")
    card = ModelCard(build_card(folder, old_card="---\nlanguage: ja\n---\nTheirs.\n"))
    assert (card.text.strip(), card.data.license, card.data.language) == ("Theirs.", "mit", "ja")


def test_card_keeps_results_on_other_datasets(folder):
    card = ModelCard.load(folder / "README.md")
    other = EvalResult("image-classification", "uoft-cs/cifar10", "CIFAR-10", "accuracy", 0.5, dataset_split="test")
    card.data.eval_results.append(other)
    card.save(folder / "README.md")
    datasets = [result.dataset_type for result in ModelCard(build_card(folder)).data.eval_results]
    assert datasets.count("uoft-cs/cifar10") == 1 and datasets.count("imagefolder") == 2


# The generated part


def test_card_states_versions_only_if_they_are_recorded(folder):
    assert f"vit_simple {__version__}" in build_card(folder)
    (folder / "provenance.json").unlink()
    card = build_card(folder)
    assert "versions" not in card and "## Results" in card


def test_card_is_built_of_a_record_without_what_may_be_absent(folder):
    absent = dict.fromkeys(["commands", "hardware", "versions", "commit", "seconds", "method", "remarks"])
    record = {"dataset": {"name": "user/pets", "on_hub": True}, **absent}
    (folder / "provenance.json").write_text(json.dumps(record))
    edit(folder / "config.json", '"id2label": {', '"id2label": null, "removed": {')
    card = ModelCard(build_card(folder))
    assert "- dataset: user/pets\n- length: " in card.text and "None" not in card.text
    assert card.data.eval_results[0].dataset_revision is None
    assert recorded_dataset(folder) == {"name": "user/pets", "config_name": None, "revision": None}


def test_card_in_mid_training_states_the_step_of_the_last_validation(folder):
    lines = read_metrics(folder)
    validation = next(line for line in lines if line["split"] == "validation")
    write_metrics(folder, validation, lines[0] | {"step": 90})
    assert "validation images of digits" in build_card(folder) and "at step 40:" in build_card(folder)


def test_card_refuses_damaged_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a JSON object in each line"):
        build_card(folder)


def test_card_counts_the_parameters_of_all_shards(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert f"{model.num_parameters() / 1e6:.2f} million" in build_card(tmp_path)


def call_snippet(card: str, folder, **names):
    """The value of the last line of the card's snippet, for the checkpoint in `folder`."""
    snippet = re.search("```python\n(.*?)\n```", card, flags=re.DOTALL)[1]
    lines = re.sub('"your-name/.*?"', repr(str(folder)), snippet).splitlines()
    exec("\n".join(lines[:-1]), names)
    return eval(lines[-1], names)


def test_card_of_a_model_without_head_shows_how_to_compute_features(tmp_path, monkeypatch):
    ViTSimpleModel(ViTSimpleConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor((16, 16))))
    PIL.Image.new("L", (20, 30)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    assert call_snippet(build_card(tmp_path), tmp_path).shape == (1, 32)


def test_card_of_a_model_of_arrays_shows_how_to_call_it(tmp_path):
    tiny(num_channels=2).save_pretrained(tmp_path)
    content = stock_processor((16, 16)) | {"do_convert_rgb": False, "do_resize": False}
    content |= {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert call_snippet(build_card(tmp_path), tmp_path, array=np.zeros((2, 16, 16), np.uint8)).shape == (1, 5)


def test_card_of_a_clip_projection_is_one_of_features(tmp_path):
    names = {index: f"feature {index}" for index in range(5)}
    tiny(id2label=names, label2id={name: index for index, name in names.items()}).save_pretrained(tmp_path)
    card = ModelCard(build_card(tmp_path))
    assert "Its logits are features, not classes." in card.text and "AutoModelForImageClassification" in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"


def test_card_of_a_regression_asks_the_pipeline_for_raw_outputs_and_has_no_intervals(folder):
    edit(folder / "config.json", '"pre_norm"', '"problem_type": "regression", "pre_norm"')
    edit(folder / "provenance.json", '"name": "digits"', '"name": "ages"')
    write_metrics(folder, {"step": 40, "split": "test", "count": 360, "mae": 1.5, "r2": 0.75, "loss": 3.2})
    text = ModelCard(build_card(folder)).text
    assert 'function_to_apply="none"' in text and "not class probabilities" in text and "It always" not in text
    assert "Loss, mean absolute error and learning rate" in text
    assert "On 360 test images of ages:\n\n| metric | value |\n| --- | --- |\n| mean absolute error | 1.5 |" in text


def test_card_of_a_multi_label_model_lists_its_classes(folder):
    edit(folder / "config.json", '"pre_norm"', '"problem_type": "multi_label_classification", "pre_norm"')
    write_metrics(folder, {"step": 40, "split": "test", "count": 360, "weights": "ema", "map": 0.8123, "loss": 0.2})
    text = ModelCard(build_card(folder)).text
    assert "On 360 test images of digits, using the EMA weights:" in text
    assert "| mean average precision | 0.8123 |" in text
    assert "For each image, it predicts any number of its 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in text


CONFIDENCE = {"expected_calibration_error": 0.106, "negative_log_likelihood": 0.181, "brier_score": 0.0573}


def record_facts(folder, **facts):
    record = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(record | facts))


def test_card_says_how_sure_the_model_is(folder):
    line = {"step": 40, "split": "test", "count": 360, "top1": 0.9, **CONFIDENCE}
    both = {"before": CONFIDENCE, "after": CONFIDENCE | {"brier_score": 0.0123}}
    write_metrics(folder, line | {"calibration": both})
    record_facts(folder, temperature=0.5215, calibrated=False, keep_score=0.674)
    text = ModelCard(build_card(folder)).text
    assert "is 10.6 percentage points away from how often it is right" in text
    assert "is 0.5215. The weights do not contain it: divide the logits by it before the softmax." in text
    assert (
        "| as trained | 0.1060 | 0.1810 | 0.0573 |\n| divided by the temperature | 0.1060 | 0.1810 | 0.0123 |" in text
    )
    assert "95% of the validation images have a highest probability of at least 0.674." in text
    record_facts(folder, calibrated=True)
    assert "The head was divided by 0.5215" in build_card(folder)
    write_metrics(folder, {"step": 40, "split": "test", "count": 360, "top1": 0.9})  # of an earlier version
    assert "How sure it is" not in build_card(folder)


def test_card_of_a_multi_label_model_has_the_thresholds_of_few_classes(folder):
    edit(folder / "config.json", '"pre_norm"', '"problem_type": "multi_label_classification", "pre_norm"')
    write_metrics(folder, {"step": 40, "split": "test", "count": 360, "map": 0.8, **CONFIDENCE})
    record_facts(folder, temperature=None, calibrated=False, keep_score=None, thresholds={"a|b": 0.3, "<b>": 0.61})
    text = ModelCard(build_card(folder)).text
    assert "No temperature was fitted." in text
    assert "| class | threshold |\n| --- | --- |\n| a\\|b | 0.300 |\n| &lt;b&gt; | 0.610 |" in text
    record_facts(folder, thresholds={str(number): number / 40 for number in range(40)})
    assert "provenance.json has them, from 0 to 0.975." in build_card(folder)


HOSTILE = [
    "<!-- vit_simple: end -->",
    "<img src=x onerror=alert(1)>",
    "x](http://evil.example)\n\n## Heading",
    "日本語",
]


def test_card_with_hostile_names_is_built_again_and_has_no_markup_of_them(folder):
    config, record = (json.loads((folder / name).read_text()) for name in ("config.json", "provenance.json"))
    config["id2label"] = {str(number): HOSTILE[number % 4] for number in range(10)}
    record["dataset"]["name"] = record["hardware"] = HOSTILE[0]
    record["base_model"], record["remarks"] = HOSTILE[2], HOSTILE
    record["commands"] = ["python train.py ```\n## Heading\n<!-- vit_simple: end -->"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps(record))
    recipe = folder / "train_config.yaml"
    recipe.write_text(recipe.read_text() + "note: '<!-- vit_simple: end -->'\n")
    card = build_card(folder)
    (folder / "README.md").write_text(card)
    assert build_card(folder) == card
    text = ModelCard(card).text
    assert text.count(END) == 1 and "<img" not in text and "](http:" not in text and "日本語" in text
    assert "\n## Heading" not in text and "\n````bash\n" in text


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("provenance.json", {"dataset": "digits"}, "expected dataset to be dict, got 'digits'"),
        ("provenance.json", {"dataset": {"name": "digits"}}, "expected dataset.on_hub to be bool, got nothing"),
        ("provenance.json", {"versions": ["a"]}, "expected versions to be dict.* or nothing, got "),
        ("provenance.json", {"thresholds": {"cat": "0.5"}}, r"expected thresholds\.cat to be float, got '0.5'"),
        ("provenance.json", {"commands": "python"}, "expected commands to be list.* or nothing, got 'python'"),
        ("config.json", {"id2label": {"0": 0}}, r"expected id2label\.0 to be str, got 0"),
        ("metrics.jsonl", ["step"], "line 1: expected a JSON object, got list"),
        ("metrics.jsonl", {"step": "1", "split": "test"}, "line 1: expected step to be int, got '1'"),
        ("metrics.jsonl", {"step": 1, "split": "test"}, "line 1: expected count to be int, got nothing"),
    ],
)
def test_card_refuses_wrong_types_with_file_and_field(folder, file, content, reason):
    (folder / file).write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError, match=f"{re.escape(file)}.*{reason}"):
        build_card(folder)


def test_card_that_is_not_utf_8_is_named(folder):
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    with pytest.raises(UserError, match=r"README\.md: expected UTF-8 text"):
        build_card(folder)


def test_confidence_interval_is_wilsons():
    assert confidence_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert confidence_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
