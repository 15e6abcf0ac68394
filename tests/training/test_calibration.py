import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from tests.conftest import DIGITS, tiny
from vit_simple import train
from vit_simple.data.labels import IGNORED, MULTI, SINGLE, Labels
from vit_simple.files import ROOT, read_metrics
from vit_simple.train import main
from vit_simple.training import calibration
from vit_simple.training.calibration import Fitted, KeptLogits, best_threshold
from vit_simple.training.config import TrainConfig
from vit_simple.training.metrics import METRICS_OF, Evaluation

NAMES = ["cat", "dog", "cow"]


def overconfident(count: int = 2000, factor: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose probabilities were right before they were multiplied, and classes drawn by those."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 3, generator=generator)
    return logits * factor, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def several(count: int = 2000, factor: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for classes of which an image may have several; the last one is in no image."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 3, generator=generator)
    targets = torch.bernoulli(logits.sigmoid(), generator=generator)
    targets[:, 2] = 0
    return logits * factor, targets


def measured(problem: str, logits, targets, fitted: Fitted | None = None) -> Evaluation:
    """In batches, with padding at the end."""
    padding = torch.full((5, *targets.shape[1:]), IGNORED if problem == SINGLE else torch.nan, dtype=targets.dtype)
    logits, targets = torch.cat([logits, torch.randn(5, 3)]), torch.cat([targets, padding])
    metrics = METRICS_OF[problem](Labels("label", "", NAMES), torch.device("cpu"), fitted or Fitted())
    for rows in torch.arange(len(logits)).split(300):
        metrics.update(logits[rows], targets[rows])
    return metrics.compute(Accelerator(cpu=True))


def fit(logits, targets, calibrate: bool = False) -> Fitted:
    Accelerator(cpu=True)
    kept = KeptLogits()
    for rows in torch.arange(len(logits)).split(300):
        kept.update(logits[rows], targets[rows])
    return kept.fit(NAMES, len(logits), calibrate)


def calibration_error(probabilities: np.ndarray, hits: np.ndarray) -> float:
    """By the definition: the gap between mean probability and frequency in 15 equal bins, weighted by their sizes."""
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (probabilities > low) & (probabilities <= high)
        if inside.any():
            error += inside.mean() * abs(probabilities[inside].mean() - hits[inside].mean())
    return error


def test_reliability_of_classes_is_that_of_references():
    logits, classes = overconfident()
    probabilities = logits.double().softmax(-1).numpy()
    values = measured(SINGLE, logits, classes).values
    hits = probabilities.argmax(-1) == classes.numpy()
    assert values["expected_calibration_error"] == pytest.approx(
        calibration_error(probabilities.max(-1), hits), abs=1e-6
    )
    assert values["negative_log_likelihood"] == pytest.approx(log_loss(classes, probabilities), rel=1e-5)
    assert values["loss"] == values["negative_log_likelihood"] and values["top1"] == hits.mean()
    one_hot = np.eye(3)[classes.numpy()]  # Brier's own definition: the sum over the classes
    assert values["brier_score"] == pytest.approx(
        3 * brier_score_loss(one_hot.ravel(), probabilities.ravel()), rel=1e-5
    )


def test_reliability_of_several_classes_is_that_of_references():
    logits, targets = several()
    probabilities, flat = logits.double().sigmoid().numpy().ravel(), targets.numpy().ravel()
    values = measured(MULTI, logits, targets).values
    assert values["expected_calibration_error"] == pytest.approx(calibration_error(probabilities, flat), abs=1e-6)
    assert values["negative_log_likelihood"] == pytest.approx(log_loss(flat, probabilities), rel=1e-5)
    assert values["brier_score"] == pytest.approx(brier_score_loss(flat, probabilities), rel=1e-5)
    assert values["micro_f1"] == pytest.approx(f1_score(targets, logits > 0, average="micro"))
    assert values["macro_f1"] == pytest.approx(f1_score(targets, logits > 0, average="macro", zero_division=0))


@pytest.mark.parametrize("make", [overconfident, several])
def test_temperature_has_the_lowest_negative_log_likelihood(make):
    logits, targets = make()
    temperature, smoothing = fit(logits, targets).temperature, 1 / 2002
    one_hot = np.eye(3)[targets] if make is overconfident else targets.numpy()
    others = smoothing / 2 if make is overconfident else smoothing
    soft = np.where(one_hot > 0, 1 - smoothing, others)

    def likelihood(divisor: float) -> float:
        scaled = logits.double().numpy() / divisor
        if make is overconfident:
            return -(soft * scaled).sum() + np.log(np.exp(scaled).sum(-1)).sum()
        return (np.log1p(np.exp(scaled)) - soft * scaled).sum()

    best = likelihood(temperature)
    assert all(best < likelihood(temperature * factor) for factor in (0.2, 0.999, 1.001, 5))
    assert make is several or 2.8 < temperature < 3.2  # the logits were multiplied by 3


def test_temperature_of_a_model_without_mistakes_stays_moderate():
    logits, _ = overconfident(200, factor=1.0)
    fitted = fit(logits, logits.argmax(-1), calibrate=True)
    assert fitted.calibrated and 0.12 < fitted.temperature < 0.7


def test_temperature_is_not_fitted_to_few_images_or_to_chance():
    logits, classes = overconfident(200)
    assert fit(logits[:99], classes[:99]) == Fitted()
    chance = fit(logits, logits.argmin(-1), calibrate=True)
    assert chance.temperature is None and not chance.calibrated and chance.keep_score is not None


def test_kept_logits_are_thinned_out_above_a_limit(monkeypatch):
    logits, classes = overconfident(6000)
    whole = fit(logits, classes)
    monkeypatch.setattr(calibration, "MAX_LOGITS", 6000)
    kept = KeptLogits()
    for rows in torch.arange(6000).split(300):
        kept.update(logits[rows], classes[rows])
    assert kept.stride == 4 and sum(len(batch) for batch, _ in kept.batches) == 1500
    assert kept.fit(NAMES, 6000, False).temperature == pytest.approx(whole.temperature, rel=0.1)


def test_calibrated_result_is_that_of_divided_logits_and_tells_both():
    logits, classes = overconfident()
    plain, divided = fit(logits, classes), fit(logits, classes, calibrate=True)
    assert plain.temperature == divided.temperature and divided.calibrated and not plain.calibrated
    scaled = measured(SINGLE, logits / plain.temperature, classes).values
    shown, applied = (measured(SINGLE, logits, classes, fitted).values for fitted in (plain, divided))
    assert shown.pop("calibration") == applied["calibration"]
    assert shown == measured(SINGLE, logits, classes).values
    assert {name: applied[name] for name in scaled} == scaled
    assert applied["calibration"]["after"]["brier_score"] == scaled["brier_score"] < shown["brier_score"]
    assert scaled["expected_calibration_error"] < 0.03 < 0.1 < shown["expected_calibration_error"]


@pytest.mark.parametrize("calibrate", [False, True])
def test_keep_score_keeps_95_percent_of_the_images(calibrate):
    logits, classes = overconfident(200)
    fitted = fit(logits, classes, calibrate)
    highest = (logits / fitted.divisor).softmax(-1).amax(-1)
    assert (highest >= fitted.keep_score).sum() == 191 and (highest > fitted.keep_score).sum() == 190


def test_thresholds_have_the_highest_f1_of_each_class():
    logits, targets = several(300)
    fitted = fit(logits, targets, calibrate=True)
    scores = (logits / fitted.divisor).sigmoid().numpy()
    for column, name in enumerate(NAMES[:2]):
        positive = targets[:, column].numpy()
        found = f1_score(positive, scores[:, column] >= fitted.thresholds[name])
        assert found == max(f1_score(positive, scores[:, column] >= score) for score in scores[:, column])
    assert fitted.thresholds["cow"] == 0.5 and fitted.keep_score is None  # no image has a cow
    predicted = scores >= np.array([fitted.thresholds[name] for name in NAMES])
    values = measured(MULTI, logits, targets, fitted).values
    assert values["micro_f1_at_thresholds"] == pytest.approx(f1_score(targets, predicted, average="micro"))
    assert values["macro_f1_at_thresholds"] == pytest.approx(
        f1_score(targets, predicted, average="macro", zero_division=0)
    )


def test_threshold_lies_halfway_between_the_scores():
    assert best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.4)


# A run


@pytest.mark.slow
def test_calibrated_run_exports_a_divided_head_and_keeps_its_checkpoints(tmp_path, capsys):
    """Both runs have the same bits except for the exported head; the second result has a temperature of 1."""
    for name in ("plain", "calibrated"):
        options = ["--calibrate", "true"] if name == "calibrated" else []
        main(["--num_train_epochs", "3", "--save_steps", "100", "--output_dir", str(tmp_path / name), *options])
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "calibrated"))
    records = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("plain", "calibrated")]
    temperature = records[0]["temperature"]
    assert [record["calibrated"] for record in records] == [False, True] and temperature == records[1]["temperature"]
    assert {name for name in plain if not plain[name].equal(other[name])} == {"head.weight", "head.bias"}
    assert other["head.weight"].equal(plain["head.weight"] / temperature)
    checkpoints = [tmp_path / name / "checkpoints/step_000100/model.safetensors" for name in ("plain", "calibrated")]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()

    shown, applied = (read_metrics(tmp_path / name)[-1] for name in ("plain", "calibrated"))
    validation = read_metrics(tmp_path / "plain")[-2]
    assert validation["temperature"] == shown["temperature"] == temperature and "calibration" not in validation
    assert shown["keep_score"] == records[0]["keep_score"] and applied["keep_score"] == records[1]["keep_score"]
    assert shown["calibration"] == applied["calibration"] and shown["correct"] == applied["correct"]
    assert shown["loss"] == shown["calibration"]["before"]["negative_log_likelihood"]
    assert applied["loss"] == applied["calibration"]["after"]["negative_log_likelihood"]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("plain", "calibrated")]
    assert "The weights do not contain it" in cards[0] and "calibrated as they are" in cards[1]
    capsys.readouterr()
    main(["--eval_only", "--model_name_or_path", str(tmp_path / "calibrated")])
    printed = capsys.readouterr().out
    assert f"{applied['loss']:.4f}   {applied['correct']} of 360 correct" in printed
    assert "temperature of the validation split: 1.000; the head is calibrated already" in printed


def test_export_in_mid_training_forgets_what_an_earlier_run_fitted(tmp_path):
    model, accelerator, labels = tiny(num_labels=3), Accelerator(cpu=True), Labels("label", "class", NAMES)
    fitted = Fitted(2.0, True, keep_score=0.5)
    train.export(TrainConfig(), accelerator, model, model, labels, tmp_path, fitted)
    assert load_file(tmp_path / "model.safetensors")["head.bias"].equal(model.head.bias / 2)
    train.export(TrainConfig(), accelerator, model, model, labels, tmp_path)
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert not record["calibrated"] and not {"temperature", "thresholds", "keep_score"} & record.keys()
    assert load_file(tmp_path / "model.safetensors")["head.bias"].equal(model.head.bias)


@pytest.mark.slow
def test_two_processes_fit_what_one_does(run_folder, capsys):
    """Rows are dealt to the processes; their logits stay there."""
    options = ["--eval_only", "--model_name_or_path", str(run_folder), "--dataset_name", DIGITS]
    main(options)
    printed = capsys.readouterr().out.splitlines()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "train.py"), *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    start = next(number for number, line in enumerate(printed) if line.startswith("probabilities"))
    assert printed[start : start + 5] == [line for line in output if line in printed[start : start + 5]]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--eval_only", "--model_name_or_path", "x"], "cannot be combined with --eval_only"),
        (["--max_eval_samples", "50"], "expected at least 100 validation images, got 50"),
        (["--train_val_split", "0"], "expected at least 100 validation images, got 0"),
    ],
)
def test_calibration_without_validation_images_is_refused(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"--calibrate.*{message}"):
        main(["--calibrate", "true", "--output_dir", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()
