"""The fields of the JSON files that a model card and a push read, and a check of their types."""

import json

from ..files import UserError

NUMBER, NULL = (int, float), type(None)
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NULL: "null", dict: "an object"}
# A field with ? may be missing, and * stands for every field; a list holds the type of its items.
RECORD_FIELDS = {
    "dataset?": {
        "name": str,
        "on_hub": bool,
        "config": (str, NULL),
        "revision": (str, NULL),
        "images": int,
        "has_16_bit_images?": bool,
    },
    "base_model?": (str, list),
    "base_model_relation?": str,
    "license?": (str, list),
    "license_name?": str,
    "license_link?": str,
    "commands?": [str],
    "hardware?": str,
    "versions?": {"*": str},
    "commit?": (str, NULL),
    "seconds?": NUMBER,
    "remarks?": [str],
}
CONFIG_FIELDS = {
    "architectures?": [str],
    "dtype?": (str, NULL),
    "torch_dtype?": (str, NULL),
    "id2label?": {"*": str},
    "label2id?": {"*": int},
    "problem_type?": (str, NULL),
    "num_hidden_layers": int,
    "hidden_size": int,
    "image_size": (int, list),
    "patch_size": (int, list),
}
METRICS_FIELDS = {
    "step": int,
    "split": str,
    "correct?": int,
    "weights?": (str, NULL),
    **{f"{name}?": NUMBER for name in ("loss", "top1", "top5", "map", "mae", "r2")},
}
SPLIT_FIELDS = {"train": {"epoch": NUMBER, "images_per_second": NUMBER}}  # of other splits: {"count": int}


def check_metrics(line, place: str):
    """Checks the types in a line of metrics.jsonl."""
    check_types(line, METRICS_FIELDS, place)
    check_types(line, SPLIT_FIELDS.get(line["split"], {"count": int}), place)


def check_types(value, expected, place: str):
    """Raises UserError if a value, or one inside it, has another type than expected.

    Args:
        expected: a type, a tuple of types, a list with the type of the items, or a dict as those above.
        place: file and field, with which the error begins.
    """
    kinds = (type(expected),) if isinstance(expected, (dict, list)) else expected
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(dict.fromkeys(NAMES.get(kind, "a list") for kind in kinds))
        raise UserError(f"{place.rstrip(': ')}: expected {names}, got {json.dumps(value)[:60]}")
    if isinstance(expected, list):
        for item in value:
            check_types(item, expected[0], place)
    elif isinstance(expected, dict):
        for field, kind in expected.items():
            name = field.rstrip("?")
            if name not in value and field == name != "*":
                raise UserError(f"{place.rstrip(': ')}: {name} is missing")
            for each in value if name == "*" else [name] if name in value else []:
                check_types(value[each], kind, f"{place.rstrip('.')}{'' if place.endswith(' ') else '.'}{each}")
