import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from tests.conftest import DIGITS, data_of, images_of, photographs, processor, tiny
from vit_simple import ViTSimpleModel, train
from vit_simple.data.labels import IGNORED
from vit_simple.data.reading import BadImage
from vit_simple.files import UserError
from vit_simple.inference import features
from vit_simple.inference.features import cached_features, choose_strength, extract_features, fit_logistic, knn_votes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def split(tmp_path):
    return images_of(data_of(photographs(tmp_path), [0, 1, 0, 1]), "train", processor(16, True), (16, 16), area=0.3)


def test_features_are_what_the_head_reads_of_images_that_are_not_cropped_at_random(split):
    model = tiny(num_labels=2)
    found, classes = extract_features(model.train(), split, batch_size=3)
    assert model.training and classes.tolist() == [0, 1, 0, 1]
    images = [PIL.Image.open(image["path"]) for image in split.rows["image"]]
    with torch.no_grad():
        logits = model.eval()(processor(16, True)(images, return_tensors="pt").pixel_values).logits
        torch.testing.assert_close(model.head(found), logits, rtol=0, atol=1e-4)


def test_features_are_computed_again_for_another_image_or_weight_but_not_for_another_head(split, cache, monkeypatch):
    model = tiny(num_labels=2)
    before = cached_features(model, split)
    with monkeypatch.context() as patch:
        patch.delattr(features, "extract_features")
        torch.nn.init.zeros_(model.head.weight)
        assert all(map(torch.equal, cached_features(model, split), before))
    (cache / next(cache.iterdir()).name).write_bytes(b"damaged")
    assert torch.equal(cached_features(model, split)[0], before[0])
    PIL.Image.new("RGB", (60, 90), "red").save(split.rows[1]["image"]["path"])
    changed = cached_features(model, split)[0]
    assert not torch.equal(changed[1], before[0][1]) and torch.equal(changed[2], before[0][2])
    torch.nn.init.ones_(model.norm.bias)
    assert not torch.equal(cached_features(model, split)[0][2], before[0][2])


def test_kept_features_know_the_images_that_could_not_be_used_or_have_other_pixels_in_a_pipeline(tmp_path):
    files = photographs(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    PIL.Image.new("LA", (40, 40)).save(tmp_path / "transparent.png")
    data = data_of([*files, str(tmp_path / "broken.jpg"), str(tmp_path / "transparent.png")], [0, 1] * 3)
    first, second, third = (
        images_of(data, "test", processor(16), (16, 16), 0, act) for act in ("skip", "skip", "error")
    )
    model = tiny(num_labels=2)
    for split in (first, second):
        assert cached_features(model, split)[1].tolist() == [0, 1, 0, 1, IGNORED, 1]
        assert len(split.bad) == len(split.changed) == 1
    with pytest.raises(BadImage, match=r"row 4 .*broken\.jpg\) cannot be used"):
        cached_features(model, third)


def test_features_are_computed_again_for_another_bit_depth(tmp_path):
    PIL.Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(tmp_path / "deep.png")
    splits = [images_of(data_of([str(tmp_path / "deep.png")], [0]), "train", processor(16), (16, 16)) for _ in range(2)]
    splits[0].decode.bit_depth = 12
    dark, bright = (cached_features(tiny(), split)[0] for split in reversed(splits))
    assert not torch.equal(dark, bright)


def test_neighbors_vote_by_cosine():
    train = torch.tensor([[1.0, 0], [10, 1], [0, 1], [-1, 0]]), torch.tensor([0, 0, 1, 2])
    votes = knn_votes(train, torch.tensor([[5.0, 0.1], [0, 3]]), 3, k=3)
    assert votes.argmax(-1).tolist() == [0, 1] and votes[0, 2] == 0
    torch.testing.assert_close(votes.sum(-1), torch.ones(2))
    weights = torch.tensor([1 / 101**0.5, 1, 0]).div(0.07).softmax(0)  # of rows 1, 2 and 0 or 3
    torch.testing.assert_close(votes[1, 1], weights[1])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_logistic_head_predicts_what_scikit_learn_does(num_classes):
    rng = np.random.default_rng(0)
    classes = np.arange(60) % num_classes
    x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + classes[:, None] * [1, 5, 0.1, 0, 2]
    head = fit_logistic(torch.tensor(x).float(), torch.tensor(classes), num_classes, strength=0.1)
    standardized = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(standardized, classes).predict_proba(standardized)
    torch.testing.assert_close(
        head(torch.tensor(x).float()).softmax(-1).double(), torch.tensor(expected), rtol=0, atol=1e-4
    )


def test_logistic_head_never_predicts_a_class_without_training_images():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    head = fit_logistic(x, (x[:, 0] > 0).long() * 2, 4)
    assert set(head(100 * x).argmax(-1).tolist()) == {0, 2}
    with pytest.raises(UserError, match="at least two classes, got one"):
        fit_logistic(x, torch.zeros(40, dtype=torch.int64), 4)


def test_strength_of_the_penalty_is_chosen_by_cross_validation():
    """Labels of noise need a strong penalty, labels that a feature gives a weak one."""
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.arange(100) % 2
    assert 10 * choose_strength(x, noise) < choose_strength(x, (x[:, 0] > 0).long())


@pytest.mark.parametrize("limit", [98, 50])
def test_strength_is_chosen_on_a_sample_and_without_classes_of_one_image(monkeypatch, limit):
    monkeypatch.setattr(features, "MAX_SEARCH_IMAGES", limit)
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    classes = (x[:, 0] > 0).long()
    classes[:8] = torch.arange(2, 10)
    assert choose_strength(x, classes) > 0.1
    assert choose_strength(x, torch.arange(100)) is None


def test_frozen_backbone_runs_once_for_each_image_with_the_result_of_the_slow_way(run_folder, tmp_path, monkeypatch):
    options = ["--dataset_name", DIGITS, "--model_name_or_path", str(run_folder), "--freeze_backbone", "true"]
    options += ["--horizontal_flip", "0", "--num_train_epochs", "3", "--learning_rate", "0.1"]
    options += ["--max_train_samples", "256", "--max_eval_samples", "100", "--card_images", "false"]
    seen = []
    encode = ViTSimpleModel._encode
    monkeypatch.setattr(ViTSimpleModel, "_encode", lambda *given: seen.append(len(given[1])) or encode(*given))
    train.main([*options, "--output_dir", str(tmp_path / "fast")])
    assert sum(seen) == 256 + 100 + 100
    monkeypatch.setattr(train, "can_train_on_features", lambda *_: False)
    train.main([*options, "--output_dir", str(tmp_path / "slow")])
    fast, slow = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "slow"))
    assert max((fast[name] - slow[name]).abs().max().item() for name in slow) < 1e-3
    before = load_file(run_folder / "model.safetensors")
    assert {name for name in fast if not torch.equal(fast[name], before[name])} == {"head.weight", "head.bias"}
