import json
import shutil
import warnings

import matplotlib
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, mathtext
from PIL import Image
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from tests.conftest import classes, tiny
from vit_simple import train
from vit_simple.files import shorten
from vit_simple.inference.fonts import readable_names
from vit_simple.sharing.card import build_card
from vit_simple.training import plots, report
from vit_simple.training.metrics import Evaluation, captions
from vit_simple.training.mistakes import Samples
from vit_simple.training.plots import plot_run

SHORT = ["--max_steps", "2", "--max_train_samples", "64", "--per_device_train_batch_size", "32"]
OF_DATA = {"predictions.png", "mistakes.png", "attention.png"}
PLOTS = {"curves.png", "confusion.png", "reliability.png", "positions.png", *OF_DATA}


def plot(folder, *names: str) -> list[int]:
    """Draws all plots for classes with these names; the last image is predicted wrongly."""
    folder.mkdir(exist_ok=True)
    line = {"step": 1, "split": "train", "loss": 1.0, "lr": 1e-3}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2)))
    count = len(names)
    targets, pixels = [*range(count - 1), 0], torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    samples = Samples(pixels, torch.eye(count), targets, torch.zeros(1, 3, 16, 16))
    confusion = torch.eye(count, dtype=torch.int64)
    values = {"correct": count, "count": count, "expected_calibration_error": 0.0}
    result = Evaluation(values, [1.0] * count, confusion, samples, {"before": torch.ones(3, 15)})
    tiny(num_labels=count).save_pretrained(folder)
    return plot_run(folder, "test", classes(*names), result, samples)


@pytest.fixture(autouse=True)
def quiet():
    """Saving a model shows no progress where the tests read what was printed."""
    disable_progress_bar()
    yield
    enable_progress_bar()


def plots_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".png"}


@pytest.fixture
def bundled_fonts(monkeypatch):
    """Only the fonts that come with matplotlib, which has none for Chinese."""
    folder = matplotlib.get_data_path()
    fonts = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(folder)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)


def add_font(file, character: str):
    """Makes matplotlib know a font with a square for this character."""
    pen = TTGlyphPen(None)
    for number, point in enumerate(((100, 0), (100, 700), (800, 700), (800, 0))):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    names = [".notdef", "square"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)
    font_manager.fontManager.addfont(file)


def test_class_names_are_drawn_and_never_parsed_as_formulas(tmp_path, monkeypatch, capsys):
    def parse(*_, **__):
        raise AssertionError("parsed as a formula")

    monkeypatch.setattr(mathtext.MathTextParser, "parse", parse)
    names = ["$5_$10", "$\\frac{$", "50$\\80$", "$x^2$", "$20#$50", "a\r\nb", "\x1b[2J", "%s {0}"]
    with matplotlib.rc_context({"text.usetex": True}):  # in the user's own settings
        plot(tmp_path, *names)
    assert plots_in(tmp_path) == PLOTS and capsys.readouterr().err == ""
    assert readable_names(["a\r\nb", "\x1b[2J"])[0] == ["a\\r\\nb", "\\x1b[2J"]


def test_long_class_names_are_cut_in_plots(tmp_path, capsys):
    names = [f"a class name that is longer than any panel, number {number}" for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as "constrained_layout not applied"
        plot(tmp_path, *names)
    assert plots_in(tmp_path) == PLOTS and capsys.readouterr().err == ""
    found = captions(torch.eye(3)[:2], [0, 2], classes(*names))
    assert found == [("a class name that…", True), ("a class name that…\n(a class name that…)", False)]
    assert [shorten(name, 5) for name in ("abcde", "abcdef", "犬犬", "犬犬犬")] == ["abcde", "abcd…", "犬犬", "犬犬…"]


def test_class_without_a_font_is_shown_by_number(tmp_path, bundled_fonts):
    assert readable_names(["cat", "猫", "kočička"]) == (["cat", "class 1", "kočička"], ["sans-serif"], [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as "Glyph 29483 missing from font"
        assert plot(tmp_path, "cat", "猫", "犬") == [1, 2]
    assert plots_in(tmp_path) == PLOTS


def test_class_name_is_drawn_with_a_font_that_has_its_characters(tmp_path, bundled_fonts, capsys):
    add_font(tmp_path / "square.ttf", "猫")
    assert readable_names(["cat", "猫"]) == (["cat", "猫"], ["sans-serif", "Square"], [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot(tmp_path / "run", "cat", "猫", "犬") == [2]  # the font has no 犬
    assert plots_in(tmp_path / "run") == PLOTS and capsys.readouterr().err == ""


def test_card_names_the_classes_that_plots_show_by_number(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    assert "show by number" not in build_card(folder)
    record = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(record | {"classes_shown_by_number": [3, 7]}))
    assert "Classes that the plots show by number: 3 is 3, 7 is 7." in build_card(folder)


def test_images_of_the_dataset_are_in_no_plot_if_none_may_be_shown(tmp_path):
    plot(tmp_path, "cat", "dog")
    assert plots_in(tmp_path) == PLOTS
    mistakes = Samples(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.eye(2)[:1], [1])
    values = {"correct": 1, "count": 2, "expected_calibration_error": 0.0}
    bins = {"before": torch.ones(3, 15)}
    result = Evaluation(values, [1.0], torch.eye(2, dtype=torch.int64), mistakes, bins)
    plot_run(tmp_path, "test", classes("cat", "dog"), result, None)
    assert plots_in(tmp_path) == PLOTS - OF_DATA  # nor in one of an earlier run


@pytest.mark.slow
def test_card_images_false_leaves_no_image_of_the_dataset(tmp_path):
    train.main([*SHORT, "--output_dir", str(tmp_path / "run"), "--card_images", "false"])
    assert plots_in(tmp_path / "run") == PLOTS - OF_DATA
    assert "card_images: false" in (tmp_path / "run/train_config.yaml").read_text()
    assert not any(name in (tmp_path / "run/README.md").read_text() for name in OF_DATA)


@pytest.mark.parametrize("name, function", [("curves.png", "plot_curves"), ("confusion.png", "plot_confusion")])
def test_plot_that_fails_is_one_line_and_leaves_no_old_file(tmp_path, monkeypatch, capsys, name, function):
    plot(tmp_path, "cat", "dog")
    monkeypatch.setattr(plots, function, lambda *_: 1 / 0)
    plot(tmp_path, "cat", "dog")
    assert plots_in(tmp_path) == PLOTS - {name}
    assert capsys.readouterr().err == f"{name} was left out: ZeroDivisionError: division by zero\n"


def test_plot_that_cannot_be_written_is_one_line_and_leaves_no_part(tmp_path, monkeypatch, capsys):
    def savefig(self, path, *_, **__):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", savefig)
    plot(tmp_path, "cat", "dog")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".png"]
    lines = capsys.readouterr().err.splitlines()
    assert {line.split()[0] for line in lines} == PLOTS and len(lines) == len(PLOTS)
    assert all(line.endswith("OSError: [Errno 28] No space left on device") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["plot_run", "predict_samples", "print_results"])
def test_run_is_complete_although_plots_or_tables_fail(tmp_path, monkeypatch, capsys, failing):
    def fail(*_):
        files = {path.name for path in (tmp_path / "run").iterdir()}
        assert {"model.safetensors", "config.json", "provenance.json", "README.md", "metrics.jsonl"} <= files
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(report if failing == "print_results" else train, failing, fail)
    train.main([*SHORT, "--output_dir", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert "was left out: BrokenPipeError: [Errno 32] Broken pipe" in printed.err and "saved in" in printed.out
    card, expected = (tmp_path / "run/README.md").read_text(), PLOTS - OF_DATA
    expected = {"plot_run": set(), "predict_samples": expected, "print_results": PLOTS}[failing]
    assert plots_in(tmp_path / "run") == expected
    assert "## Results" in card and {name for name in PLOTS if name in card} == expected
    for name in expected:
        Image.open(tmp_path / "run" / name).verify()
