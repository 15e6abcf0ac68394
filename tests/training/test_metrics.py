import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from vit_simple.data.labels import IGNORED, MULTI, REGRESSION, SINGLE, Labels
from vit_simple.data.reading import BadImage
from vit_simple.training.calibration import Fitted
from vit_simple.training.metrics import METRICS_OF, Evaluation, average_precision, class_table, table
from vit_simple.training.mistakes import mistake_captions


def scored(problem: str, classes: int, *batches) -> Evaluation:
    labels = Labels("label", "", [str(number) for number in range(classes)], std=2.0)
    scores = METRICS_OF[problem](labels, torch.device("cpu"), Fitted())
    for logits, labels in batches:
        scores.update(torch.tensor(logits), torch.tensor(labels))
    return scores.compute(Accelerator(cpu=True))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_follows_its_definition(rows):
    scores, positive = (np.array(column) for column in zip(*rows))
    if not positive.any():
        assert average_precision(scores, positive) is None
        return
    expected, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = scores >= threshold
        recall = positive[taken].sum() / positive.sum()
        expected += (recall - before) * positive[taken].mean()
        before = recall
    assert average_precision(scores, positive) == pytest.approx(expected)


def test_single_label_metrics_ignore_padding():
    logits = [[3.0, 1, 0], [0, 2, 1], [0, 2, 1], [9, 9, 9]]
    result = scored(SINGLE, 3, (logits, [0, 1, 2, IGNORED]), ([[0.0, 1, 2]], [0]))
    expected = F.cross_entropy(torch.tensor([*logits[:3], [0, 1, 2]]), torch.tensor([0, 1, 2, 0])).item()
    values = {name: result.values[name] for name in ("loss", "top1", "top5", "correct", "count")}
    assert values == {"loss": pytest.approx(expected), "top1": 0.5, "top5": 1.0, "correct": 2, "count": 4}
    assert result.per_class == [0.5, 1.0, 0.0] and result.score == 0.5
    assert result.confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_class_without_images_has_no_accuracy_and_many_classes_no_confusion():
    result = scored(SINGLE, 1001, (torch.eye(1001)[:2].tolist(), [0, 5]))
    assert result.confusion is None and result.per_class[:6] == [1.0, None, None, None, None, 0.0]


def test_multi_label_metrics_rank_images_within_each_class():
    logits, labels = [[2.0, -1, 0], [1, 1, 0], [9, 9, 9]], [[1.0, 0, 0], [0, 1, 0], [np.nan] * 3]
    result = scored(MULTI, 3, (logits, labels), ([[0.0, -2, 0]], [[1.0, 1, 0]]))
    assert result.per_class == [pytest.approx((1 + 2 / 3) / 2), pytest.approx((1 + 2 / 3) / 2), None]
    assert result.values["map"] == result.score == pytest.approx(5 / 6) and result.values["count"] == 3
    kept = torch.tensor([*logits[:2], [0, -2, 0]]), torch.tensor([*labels[:2], [1, 1, 0]])
    assert result.values["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(*kept).item())


def test_regression_metrics_use_the_unit_of_the_labels():
    result = scored(REGRESSION, 1, ([[1.0], [5.0], [0.0]], [[0.0], [8.0], [np.nan]]), ([[1.0]], [[1.0]]))
    assert result.values == {
        "loss": pytest.approx(10 / 3),
        "mae": pytest.approx(2 * 4 / 3),  # of a deviation of 2
        "r2": pytest.approx(1 - 10 / 38),  # about the mean of 0, 8 and 1
        "count": 3,
    }
    assert scored(REGRESSION, 1, ([[0.5]], [[0.0]])).score > result.score
    assert np.isnan(scored(REGRESSION, 1, ([[np.nan], [1.0]], [[3.0], [1.0]])).values["mae"])


@pytest.mark.parametrize(
    "problem, logits, labels, expected, captions",
    [
        (
            SINGLE,
            [[9.0, 0, 0], [0, 3, 0], [0, 9, 0], [5, 0, 0], [0, 9, 0]],
            [0, 0, IGNORED, 1, 1],
            [3, 1],
            ["0: 0.99\nlabel: 1", "1: 0.91\nlabel: 0"],
        ),
        (
            MULTI,
            [[9.0, -9], [9, 3], [-5, -9], [9, 9]],
            [[1.0, 0], [1, 0], [1, 0], [np.nan, np.nan]],
            [2, 1],
            ["0: 0.01\nlabel: yes", "1: 0.95\nlabel: no"],
        ),
        (REGRESSION, [[1.0], [5.0], [0.0]], [[0.0], [8.0], [np.nan]], [1, 0], ["10\nlabel: 16", "2\nlabel: 0"]),
    ],
)
def test_worst_predictions_come_first_without_correct_ones_and_padding(problem, logits, labels, expected, captions):
    kind = {SINGLE: "class", MULTI: "vector", REGRESSION: "number"}[problem]
    described = Labels("label", kind, [str(number) for number in range(len(logits[0]))], std=2.0)
    metrics = METRICS_OF[problem](described, torch.device("cpu"), Fitted())
    for number, (row, label) in enumerate(zip(logits, labels)):
        metrics.update(
            torch.tensor([row]).float(), torch.tensor([label]), torch.full((1, 3, 2, 2), number, dtype=torch.uint8)
        )
    mistakes = metrics.compute(Accelerator(cpu=True)).mistakes
    assert mistakes.pixels[:, 0, 0, 0].tolist() == expected
    assert mistake_captions(mistakes.logits, mistakes.targets, described) == captions


@pytest.mark.parametrize("problem, label", [(SINGLE, IGNORED), (MULTI, [np.nan] * 2), (REGRESSION, [np.nan])])
def test_metrics_without_images_raise_bad_image(problem, label):
    logits = [[0.0]] if problem == REGRESSION else [[0.0, 0.0]]
    with pytest.raises(BadImage, match="every image of a split is unreadable"):
        scored(problem, len(logits[0]), (logits, [label]))


def test_tables_show_metrics():
    single = scored(SINGLE, 2, ([[1.0, 0], [1, 0]], [0, 1]))
    assert table("end", {"test raw": single}).splitlines() == [
        "end                   top-1    top-5     loss   images",
        "  test raw           50.00%  100.00%   0.8133   1 of 2 correct",
    ]
    assert class_table("test", single, ["cat", "dog"]).splitlines() == [
        "test, accuracy of each class",
        "  cat               100.00%",
        "  dog                 0.00%",
    ]
    number = scored(REGRESSION, 1, ([[1.0]], [[3.5]]))
    assert [line.split() for line in table("end", {"test raw": number}).splitlines()] == [
        ["end", "error", "R2", "loss", "images"],
        ["test", "raw", "5", "0.0000", "6.2500", "1"],
    ]
    evaluation = Evaluation({"map": 0.5}, [number / 50 for number in range(50)])
    many = class_table("test", evaluation, [f"c{number}" for number in range(50)])
    assert many.splitlines()[0] == "test, average precision of each class, the lowest 10 of 50"
    assert [line.split()[0] for line in many.splitlines()[1:]] == [f"c{number}" for number in range(10)]
