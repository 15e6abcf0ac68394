import math

import numpy as np
import pytest
from datasets import Array2D, Array3D, ClassLabel, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st

from vit_simple.data.labels import (
    IGNORED,
    MULTI,
    REGRESSION,
    SINGLE,
    BadLabel,
    build_labels,
    column_kind,
    count_labels,
    find_label_column,
)
from vit_simple.files import UserError

INTEGERS = st.integers(-(2**63), 2**63 - 1)


def learned(feature, values) -> tuple:
    """The labels of a column of training rows, and its summary."""
    counts = count_labels(values, column_kind(feature))
    labels = build_labels("label", feature, counts)
    labels.check("train", counts)
    labels.fit(counts)
    return labels, counts


@given(
    st.one_of(
        st.lists(INTEGERS, min_size=2),
        st.lists(st.text().filter(str.strip), min_size=2),
        st.lists(st.booleans(), min_size=2),
    )
)
def test_classes_of_plain_values_map_back_by_their_names(values):
    feature = Value({int: "int64", str: "string", bool: "bool"}[type(values[0])])
    if len(set(values)) == 1:
        with pytest.raises(UserError, match="expected several classes in the split 'train', got only"):
            learned(feature, values)
        return
    labels, _ = learned(feature, values)
    targets = [labels.target(value) for value in values]
    assert sorted(set(targets)) == list(range(len(set(values)))) and labels.problem_type == SINGLE
    assert [labels.class_names[target] for target in targets] == [str(value) for value in values]
    assert labels.class_counts == [targets.count(number) for number in range(len(labels.class_names))]
    assert [value for value, _ in sorted(labels.classes.items(), key=lambda item: item[1])] == sorted(set(values))


@given(st.integers(2, 9).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.lists(st.integers(0, size - 1))))))
def test_multi_label_targets_of_lists_and_of_vectors_are_the_same(drawn):
    size, lists = drawn
    lists = [[0], [1], *lists]
    vectors = [[int(number in row) for number in range(size)] for row in lists]
    names = [f"class {number}" for number in range(size)]
    of_lists, _ = learned(List(ClassLabel(names=names)), lists)
    of_vectors, _ = learned(List(Value("int8"), length=size), vectors)
    of_any_length, _ = learned(List(Value("float32")), [[float(bit) for bit in row] for row in vectors])
    for row, vector in zip(lists, vectors):
        assert of_lists.target(row) == of_vectors.target(vector) == of_any_length.target(vector) == vector
    for labels in (of_lists, of_vectors, of_any_length):
        assert labels.problem_type == MULTI
        assert labels.class_counts == [sum(column) for column in zip(*vectors)]
    assert of_lists.class_names == names
    assert of_vectors.class_names == of_any_length.class_names == [str(i) for i in range(size)]


@given(st.lists(st.integers(-(10**9), 10**9), min_size=2, unique=True))
def test_regression_targets_are_standardized(thousandths):
    values = [number / 1000 for number in thousandths]
    labels, _ = learned(Value("float64"), values)
    targets = np.array([labels.target(value) for value in values])
    assert (labels.problem_type, labels.class_names, labels.num_rows) == (REGRESSION, ["label"], len(values))
    assert targets.shape == (len(values), 1) and targets.mean() == pytest.approx(0, abs=1e-5)
    assert targets.std() == pytest.approx(1, abs=1e-5)
    assert targets[:, 0] * labels.std + labels.mean == pytest.approx(np.array(values), abs=1e-5)


def test_multi_label_classes_of_lists_of_strings():
    labels, _ = learned(List(Value("string")), [["dog", "cat"], [], ["cow"]])
    assert (
        labels.problem_type == MULTI
        and labels.class_names == ["cat", "cow", "dog"]
        and labels.class_counts == [1, 1, 1]
    )
    assert labels.target(["dog", "cow"]) == [0, 1, 1] and labels.target([]) == [0, 0, 0]
    with pytest.raises(BadLabel, match=r"lists of the labels of 'train' \(cat, cow, dog\), got \['ant'\]"):
        labels.target(["ant"])


@pytest.mark.parametrize(
    "feature, train, hidden, known",
    [
        (ClassLabel(names=["a", "b"]), [0, 1], [-1, None, -1], [-1, 0]),
        (Value("int64"), [3, 5], [-1, -1], [3, -1]),
        (Value("int64"), [-1, 5], [None], [-1, -1]),
        (Value("float32"), [3, 5], [None, math.nan], [math.nan, 1.0]),
        (List(Value("int64")), [[0, 1], [1, 0]], [None, None], [None, [0, 0]]),
    ],
)
def test_labels_are_hidden_if_all_are_missing(feature, train, hidden, known):
    labels, _ = learned(feature, train)
    assert labels.are_hidden(count_labels(hidden, labels.kind))
    assert not labels.are_hidden(count_labels(known, labels.kind))


@pytest.mark.parametrize(
    "feature, values, message",
    [
        (
            Value("string"),
            ["a", "b", None, None],
            r"of 'train' \(a, b\), got None in row 2 .* \(2 such rows: they have no label",
        ),
        (Value("string"), ["a", " ", "b"], "got ' ' in row 1 .*; --on_missing_label skip leaves out the rows"),
        (Value("int64"), [*range(20), None], r"\(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\), got None in row 20"),
        (Value("float32"), [1.0, 1.0], "expected different numbers in the split 'train', got only 1$"),
        (Value("float32"), [1.0, math.nan], "expected finite numbers, got nan in row 1"),
        (Value("float32"), [math.inf, None], r"expected finite numbers, got inf in row 0 .* \(2 such rows\)"),
        (ClassLabel(names=["a", "b"]), [0, 1, 2], r"expected labels from 0 to 1, got 2 in row 2"),
        (List(ClassLabel(names=["a", "b"])), [[0], [], [0, 2]], r"lists of labels from 0 to 1, got \[0, 2\] in row 2"),
        (List(ClassLabel(names=["a", "b"])), [[0], [1], None], r"got None in row 2"),
        (List(ClassLabel(names=["a", "b"])), [[0], [1, None]], r"got \[1, None\] in row 1"),
        (
            List(Value("int64")),
            [[0, 1], [1, 2]],
            r"each 0 or 1 \(lists of classes need .*got \[1, 2\]",
        ),
        (List(Value("int64")), [[0, 1, 1], [1, 0]], r"lists of 3 numbers, each 0 or 1 .*, got \[1, 0\] in row 1"),
        (List(Value("float32")), [[0, 1], [0.5, 0]], r"got \[0.5, 0\] in row 1"),
        (List(Value("int64")), [[], []], r"expected at least two classes in 'label', got none"),
        (List(Value("int64")), [[0, 1], [0, 1]], r"expected several classes in the split 'train', got only '\[0, 1\]'"),
    ],
)
def test_bad_labels_are_named_with_their_row(feature, values, message):
    with pytest.raises(UserError, match=message):
        learned(feature, values)


def test_label_that_training_lacks_raises():
    labels, _ = learned(Value("string"), ["cat", "dog"])
    with pytest.raises(BadLabel, match=r"expected the labels of 'train' \(cat, dog\), got cow"):
        labels.target("cow")


def test_label_column_is_found_if_only_one_could_be_meant():
    image, text, number = Image(), Value("string"), Value("float32")
    names = ClassLabel(names=["a", "b"])
    for features, expected in (
        ({"image": image, "label": names, "caption": text}, "label"),
        ({"image": image, "labels": List(names), "width": Value("int64")}, "labels"),
        ({"image": image, "price": number}, "price"),
        ({"jpg": image, "cls": Value("int64"), "__key__": text, "__url__": text}, "cls"),
        ({"image": Array3D((4, 8, 8), "uint8"), "mask": Array2D((8, 8), "uint8"), "kind": text}, "kind"),
    ):
        assert find_label_column(Features(features), None) == expected
        assert find_label_column(Features(features), expected) == expected
    features = Features({"image": image, "kind": text, "price": number})
    assert find_label_column(features, "price") == "price"
    columns = r"got the columns image \(Image\), kind \(string\), price \(float32\)"
    with pytest.raises(UserError, match=f"--label_column_name: expected one column of labels, {columns}"):
        find_label_column(features, None)
    for name in ("image", "name"):
        with pytest.raises(UserError, match=f"expected labels in the column '{name}', {columns}"):
            find_label_column(features, name)


def test_class_weights_balance_the_classes():
    single, _ = learned(ClassLabel(names=["a", "b", "c"]), [0] * 6 + [1] * 2)
    assert single.weights().tolist() == pytest.approx([8 / 12, 8 / 4, 0])
    assert sum(weight * count for weight, count in zip(single.weights(), single.class_counts)) == pytest.approx(8)
    multi, _ = learned(List(Value("int64")), [[1, 1, 0]] * 2 + [[0, 1, 0]] * 6)
    assert multi.weights().tolist() == pytest.approx([3, 0.01, 100])


def test_ignored_targets_are_minus_100_or_nan():
    single, _ = learned(ClassLabel(names=["a", "b"]), [0, 1])
    assert single.ignored_targets(3).tolist() == [IGNORED] * 3
    multi, _ = learned(List(Value("int64")), [[0, 1], [1, 0]])
    assert multi.ignored_targets(3).shape == (3, 2) and multi.ignored_targets(3).isnan().all()
