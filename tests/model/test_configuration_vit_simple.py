import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig

from tests.conftest import EVERY_SWITCH, TINY, tiny
from vit_simple import ViTSimpleConfig, ViTSimpleForImageClassification, ViTSimpleModel
from vit_simple.configuration_vit_simple import OWN_FIELDS, label_maps


@pytest.mark.parametrize(
    "variant, millions",  # as in DeiT, ViT and Scaling ViT (its table has no head), to the digits that they show
    [
        ("Ti/16", 5.72),
        ("S/16", 22.05),
        ("B/16", 86.57),
        ("L/16", 304.33),
        ("H/14", 632.05),
        ("g/14", 1012.61),
    ],
)
def test_variant_has_the_published_number_of_parameters(variant, millions):
    with torch.device("meta"):
        model = ViTSimpleForImageClassification(ViTSimpleConfig.from_variant(variant, num_labels=1000))
    assert round(model.num_parameters() / 1e6, 2) == millions


def test_variant_accepts_any_patch_size_and_further_fields():
    config = ViTSimpleConfig.from_variant("S/8", image_size=64, num_labels=7, pooling="mean")
    assert (config.hidden_size, config.patch_size, config.grid_size, config.num_labels) == (384, 8, (8, 8), 7)


def test_variant_of_the_notebook_has_its_sizes():
    config = ViTSimpleConfig.from_variant("notebook/16")
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert sizes == (128, 3, 4, 128)


@pytest.mark.parametrize("variant", ["XL/16", "S", "S/", "S/x", "16", "", None, 16])
def test_variant_that_is_unknown_lists_those_that_exist(variant):
    with pytest.raises(ValueError, match=r"variant: expected NAME/PATCH with NAME in \['notebook', 'Ti'"):
        ViTSimpleConfig.from_variant(variant)


WRONG = [
    ("hidden_size", 30, "a multiple of num_attention_heads=4"),
    ("hidden_size", 0, "a positive integer"),
    ("hidden_size", 32.0, "a positive integer"),
    ("num_hidden_layers", -1, "a positive integer"),
    ("num_hidden_layers", True, "a positive integer"),
    ("num_attention_heads", "4", "a positive integer"),
    ("intermediate_size", None, "a positive integer"),
    ("num_channels", 0, "a positive integer"),
    ("num_register_tokens", -1, "0 or a positive integer"),
    ("image_size", 18, "a multiple of patch_size=4"),
    ("image_size", (16, 18), "a multiple of patch_size=4"),
    ("image_size", (16, 16, 16), "a positive integer or a (height, width) pair"),
    ("image_size", "16", "a positive integer or a (height, width) pair"),
    ("patch_size", 0, "a positive integer or a (height, width) pair"),
    ("hidden_act", "gleu", "a name in ACT2FN"),
    ("hidden_act", ["gelu"], "a name in ACT2FN"),
    ("hidden_dropout_prob", 1.0, "a number in [0, 1)"),
    ("attention_probs_dropout_prob", -0.1, "a number in [0, 1)"),
    ("drop_path_rate", "0.1", "a number in [0, 1)"),
    ("drop_path_rate", float("nan"), "a number in [0, 1)"),
    ("layer_norm_eps", 0, "a positive number"),
    ("initializer_range", float("inf"), "a positive number"),
    ("layerscale_value", -1e-5, "None or a number of at least 0"),
    ("head_init_std", "zero", "None or a number of at least 0"),
    ("qkv_bias", 1, "True or False"),
    ("use_class_token", None, "True or False"),
    ("use_class_token", False, "'mean' when use_class_token=False"),
    ("pooling", "max", "one of ('cls', 'mean')"),
    ("pooling", ["cls"], "one of ('cls', 'mean')"),
    ("position_embedding", "rope", "one of ('learned', 'sincos2d')"),
    ("problem_type", "multi_label", "one of (None, 'regression', 'single_label_classification', "),
    ("interpolate_antialias", None, "True or False"),
    ("interpolate_offset", 1, "a number in [0, 1)"),
    ("pretrain_image_size", 18, "a multiple of patch_size=4"),
    ("pretrain_image_size", "16", "a positive integer or a (height, width) pair"),
    ("num_labels", 0, "a positive integer"),
    ("num_labels", "5", "a positive integer"),
    ("num_labels", 2.5, "a positive integer"),
    ("num_labels", True, "a positive integer"),
]


@pytest.mark.parametrize("field, value, expected", WRONG)
def test_field_with_a_wrong_value_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ValueError) as error:
        ViTSimpleConfig(**{**TINY, field: value})
    assert "ViTSimpleConfig." in str(error.value) and expected in str(error.value)
    assert repr(value) in str(error.value) or "when use_class_token" in expected


@pytest.mark.parametrize("field, value, expected", WRONG)
def test_field_with_a_wrong_value_is_refused_by_from_pretrained(tmp_path, field, value, expected):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        ViTSimpleModel.from_pretrained(tmp_path, **{field: value})
    assert expected in str(error.value)


def test_fields_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="a multiple of 4 for position_embedding='sincos2d', got 30"):
        ViTSimpleConfig(**{**TINY, "hidden_size": 30, "num_attention_heads": 3, "position_embedding": "sincos2d"})
    with pytest.raises(ValueError, match=r"num_labels.*[>:].*(1|2)"):
        ViTSimpleConfig(**{**TINY, "num_labels": 1, "problem_type": "single_label_classification"})


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("hiden_size", "hidden_size"),
        ("poolin", "pooling"),
        ("drop_path", "drop_path_rate"),
        ("num_register_token", "num_register_tokens"),
        ("embed_dim", "hidden_size"),
        ("img_size", "image_size"),
        ("num_classes", "num_labels"),
        ("drop_rate", "hidden_dropout_prob"),
    ],
)
def test_keyword_that_resembles_a_field_is_refused_with_its_name(wrong, right):
    with pytest.raises(ValueError, match=f"no field '{wrong}': did you mean '{right}'"):
        ViTSimpleConfig(**{wrong: 4})


def test_keyword_that_resembles_a_field_is_refused_by_from_pretrained(tmp_path):
    tiny().save_pretrained(tmp_path)
    for auto_class in (AutoConfig, AutoModel, ViTSimpleConfig, ViTSimpleModel):
        with pytest.raises(ValueError, match="no field 'drop_path': did you mean 'drop_path_rate'"):
            auto_class.from_pretrained(tmp_path, drop_path=0.3)


def test_keywords_of_transformers_are_accepted():
    base = {key: value for key, value in PretrainedConfig().to_dict().items() if key != "model_type"}
    assert ViTSimpleConfig(**base, a_key_of_tomorrow=1).a_key_of_tomorrow == 1


def test_saved_config_has_a_complete_and_local_auto_map(tmp_path):
    config = ViTSimpleConfig(**TINY, **EVERY_SWITCH, id2label={i: name for i, name in enumerate("abcde")})
    config.auto_map["AutoModel"] = "somebody/else--modeling_vit_simple.ViTSimpleModel"
    ViTSimpleConfig(**config.to_dict()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "configuration_vit_simple.ViTSimpleConfig",
        "AutoModel": "modeling_vit_simple.ViTSimpleModel",
        "AutoModelForImageClassification": "modeling_vit_simple.ViTSimpleForImageClassification",
        "AutoBackbone": "modeling_vit_simple.ViTSimpleBackbone",
    }
    again = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(again, field) == getattr(config, field) for field in OWN_FIELDS)
    assert again.id2label == config.id2label


def test_label_maps_of_a_config_complete_each_other():
    maps = label_maps(["yes", "no"])
    assert maps == {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    for name in maps:
        config = ViTSimpleConfig(**{name: maps[name]})
        assert (config.id2label, config.label2id, config.num_labels) == (*maps.values(), 2)


LABELS = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}


@pytest.mark.parametrize(
    "given",
    [
        {"id2label": {"0": "yes", "1": "no"}},
        {"id2label": {"1": "no", "0": "yes"}, "label2id": {"yes": "0", "no": "1"}},
        {"label2id": {"no": "1", "yes": "0"}},
        {"label2id": {"yes": 0, "no": 1}, "num_labels": 2},
    ],
)
def test_label_maps_and_head_agree_whichever_is_given(tmp_path, given):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, **given)
    for config in (ViTSimpleConfig(**given), model.config):
        assert list(config.id2label.items()) == list(LABELS["id2label"].items())
        assert (config.label2id, config.num_labels) == (LABELS["label2id"], 2)
    assert model.head.out_features == 2


def test_numbers_as_names_of_classes_become_text():
    for given in (
        {"id2label": {0: 7, 1: 9}},
        {"label2id": {7: 0, 9: 1}},
        {"id2label": {0: 7, 1: 9}, "label2id": {"7": 0, "9": 1}},
    ):
        assert ViTSimpleConfig(**given).id2label == {0: "7", 1: "9"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"id2label": {1: "a", 2: "b"}}, r"id2label: expected the classes to be numbered from 0 without gaps, got \[1"),
        ({"label2id": {"a": 0, "b": 2}}, "id2label: expected the classes to be numbered from 0 without gaps"),
        ({"label2id": {"a": 0, "b": 0}}, "label2id: expected one name for each number"),
        ({"id2label": {"zero": "a"}}, "id2label and label2id: expected dictionaries of numbers and names"),
        ({"id2label": ["a", "b"]}, "id2label and label2id: expected dictionaries of numbers and names"),
        ({"id2label": {0: ["a"], 1: "b"}}, "id2label and label2id: expected dictionaries of numbers and names"),
        ({"label2id": {None: 0}}, "id2label and label2id: expected dictionaries of numbers and names"),
        ({**LABELS, "num_labels": 5}, "num_labels: expected 2, as in id2label, got 5"),
        ({**LABELS, "label2id": {"yes": 1, "no": 0}}, "label2id: expected {'yes': 0, 'no': 1}, as in id2label"),
        ({**LABELS, "label2id": {"yes": 0}}, "label2id: expected {'yes': 0, 'no': 1}, as in id2label"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(tmp_path, given, message):
    tiny().save_pretrained(tmp_path)
    for use in (ViTSimpleConfig, lambda **fields: AutoModelForImageClassification.from_pretrained(tmp_path, **fields)):
        with pytest.raises(ValueError, match=f"ViTSimpleConfig.{message}"):
            use(**given)


@pytest.mark.parametrize("labels", [{"0": "yes", "1": "no"}, {0: "yes", 2: "no"}, {0: "other", 1: "names"}])
def test_labels_that_are_set_later_are_checked_when_a_model_is_built(labels):
    config = ViTSimpleConfig(**TINY | {"num_labels": 2}, label2id=LABELS["label2id"])
    config.id2label = labels
    with pytest.raises(ValueError, match=r"ViTSimpleConfig\.(id2label|label2id): expected"):
        ViTSimpleForImageClassification(config)


def test_two_classes_may_have_one_name():
    config = ViTSimpleConfig(id2label={0: "crane", 1: "crane"}, label2id={"crane": 0})
    assert (config.num_labels, config.label2id) == (2, {"crane": 0})


def test_stored_names_win_over_a_stale_map_in_the_same_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["id2label"] = {str(number): name for number, name in enumerate("abcde")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(tmp_path).label2id == {name: number for number, name in enumerate("abcde")}
