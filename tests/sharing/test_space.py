"""The page of a static Space computes in a browser what Python computes, and refuses what it cannot show.

The page is opened from the Hub of tests/fake_hub in headless Chromium. Needs: apt-get install chromium npm, and
pip install playwright.
"""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset

from tests.conftest import DIGITS
from tests.fake_hub.hub import Hub
from tests.javascript import node_modules
from tests.sharing.conftest import NAME, TOKEN, call, edit
from vit_simple import ViTSimpleForImageClassification
from vit_simple.data.processors import open_processor, process, stock_processor
from vit_simple.files import ONNX_FILES, ROOT, UserError, read_json
from vit_simple.sharing.space import CDN, page_content, preview_space

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CROPPED = stock_processor((8, 8), 12, resample=3)  # bicubic, and only the center


def image(width: int, height: int) -> PIL.Image.Image:
    """A colored image with detail of every size."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3) + np.sin(y / 50), np.sin(x / 200 + y / 90), np.sin((x + y) / 7) * np.sin(x / 400)]
    return PIL.Image.fromarray((np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


def encoded(image: PIL.Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def spaces(exported, tmp_path_factory):
    """A Hub with the page of a pushed model, and with a self-contained page of one that crops; and their folders."""
    work = tmp_path_factory.mktemp("spaces")
    cropped = Path(shutil.copytree(exported, work / "cropped"))
    (cropped / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    page = preview_space(cropped, "user/cropped")
    files = {path.relative_to(page).as_posix(): path.read_bytes() for path in page.rglob("*") if path.is_file()}
    with Hub({TOKEN: "user"}) as hub:
        hub.create("spaces/user/cropped", files)
        result = call(hub, work, ROOT / "push_to_hub.py", exported, NAME, "--license", "mit", "--space")
        assert result.returncode == 0, result.stderr
        assert f"page: {hub.url}/spaces/{NAME}" in result.stdout
        yield hub, {NAME: exported, "user/cropped": cropped}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("the test of the page needs a browser: apt-get install chromium npm && pip install playwright")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def open_page(spaces, browser):
    """Opens the page of a Space; the content delivery network is answered from the package of npm."""
    distribution = node_modules() / "onnxruntime-web/dist"

    def answer(route):
        file = distribution / route.request.url.removeprefix(f"{CDN}/")
        route.fulfill(path=file, headers={"Access-Control-Allow-Origin": "*"})

    def open_page(name: str, language: str = "en"):
        page = browser.new_context(locale=language).new_page()
        page.set_default_timeout(120_000)
        page.route(f"{CDN}/*", answer)
        page.goto(f"{spaces[0].url}/spaces/{name}/resolve/main/index.html")
        return page

    return open_page


def drop(page, content: bytes, kind: str = "image/png") -> dict:
    """Drops an image on a page; returns what the page computed."""
    page.evaluate(
        """async ([text, type]) => {
            window.result = null;
            const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "image", { type }));
            dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }""",
        [base64.b64encode(content).decode(), kind],
    )
    page.wait_for_function("window.result")
    return page.evaluate(
        "({ pixels: [...result.pixels], scores: result.scores, attention: [...result.attentions[1].data] })"
    )


@torch.no_grad()
def expected(folder: Path, picture: PIL.Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (H, W, C), probabilities (K,) and the attention of the second block (h, T, T) in Python."""
    processor = open_processor(read_json(folder / "preprocessor_config.json"))
    model = ViTSimpleForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()
    picture = picture.convert("RGB")
    output = model(processor(picture, return_tensors="pt").pixel_values, output_attentions=True)
    return process(processor, [picture])[0].permute(1, 2, 0), output.logits.softmax(-1)[0], output.attentions[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, "user/cropped"])
def test_page_computes_what_python_computes(spaces, open_page, name):
    page, folder = open_page(name), spaces[1][name]
    digit = load_dataset(DIGITS, split="test")[0]["image"]
    for picture in (digit, image(500, 375), image(4000, 3000)):
        found = drop(page, encoded(picture, "PNG", compress_level=1))
        pixels, scores, attention = expected(folder, picture)
        assert (torch.tensor(found["pixels"]) - pixels.flatten()).abs().max() <= 1
        assert (torch.tensor(found["scores"]) - scores).abs().max() < 1e-3
        assert (torch.tensor(found["attention"]).view_as(attention) - attention).abs().max() < 1e-3
        label = read_json(folder / "config.json")["id2label"][str(scores.argmax().item())]
        assert page.locator("#top li").first.inner_text().split() == [label, f"{100 * scores.max():.1f}", "%"]


@pytest.mark.slow
def test_page_rotates_a_photo_and_speaks_japanese(spaces, open_page):
    page, picture, exif = open_page(NAME, "ja"), image(300, 200), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    stored = encoded(picture.transpose(PIL.Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    found = drop(page, stored, "image/jpeg")
    _, scores, _ = expected(spaces[1][NAME], picture)
    assert np.argmax(found["scores"]) == scores.argmax() and abs(max(found["scores"]) - scores.max()) < 0.02
    assert page.locator("html").get_attribute("lang") == "ja" and page.get_by_label("画像を選ぶ").count() == 1


@pytest.mark.slow
def test_patch_is_chosen_by_click_and_keyboard(open_page):
    page = open_page(NAME)
    page.locator("#examples button").first.click()
    page.wait_for_function("window.result")
    page.locator("#heat").click(position={"x": 5, "y": 5})
    assert "row 1, column 1" in page.locator("#query").inner_text()
    page.locator("#heat").press("ArrowRight")
    assert "row 1, column 2" in page.locator("#query").inner_text()
    page.get_by_role("button", name="head 1").press("Enter")
    assert page.get_by_role("button", name="head 1").get_attribute("aria-pressed") == "true"


def test_space_reads_the_weights_of_the_pushed_commit(spaces):
    hub, _ = spaces
    commit, space = (hub.repos[f"{kind}/{NAME}"].at("main") for kind in ("models", "spaces"))
    html = space.files["index.html"].decode()
    assert all(f"{hub.url}/{NAME}/resolve/{commit.sha}/{name}" in html for name in ONNX_FILES)
    assert not space.files.keys() & {*ONNX_FILES} and b"sdk: static" in space.files["README.md"]


def test_space_only_and_private_are_refused_with_a_way_out(spaces, tmp_path):
    hub, folders = spaces
    command = [ROOT / "push_to_hub.py", folders["user/cropped"], NAME, "--space_only"]
    assert "does not have the files of" in call(hub, tmp_path, *command).stderr
    assert "--self_contained, which copies" in call(hub, tmp_path, *command, "--private").stderr


def test_weights_of_a_private_model_go_into_a_private_space_only(spaces, tmp_path):
    hub, folders = spaces
    files = {path.name: path.read_bytes() for path in folders[NAME].iterdir() if path.is_file()}
    files |= {name: (folders[NAME] / name).read_bytes() for name in ONNX_FILES}
    hub.create("models/user/hidden", files, private=True)
    command = [ROOT / "push_to_hub.py", folders[NAME], "user/hidden", "--space_only", "--self_contained"]
    result = call(hub, tmp_path, *command)
    space = hub.repos["spaces/user/hidden"]
    assert space.private and {*ONNX_FILES} < space.at("main").files.keys(), result.stderr
    space.private = False
    assert "expected a private Space of a private model" in call(hub, tmp_path, *command).stderr


def test_space_needs_onnx_files_and_a_processor_that_the_page_can_follow(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "my digits"))
    edit(folder / "preprocessor_config.json", '"resample": 2', '"resample": 1')
    with pytest.raises(UserError, match=r"the page cannot follow .* expected resample of 2 or 3"):
        page_content(folder)
    (folder / ONNX_FILES[0]).unlink()
    with pytest.raises(UserError, match=r"--space needs onnx/model\.onnx: python export\.py '.*my digits' --to onnx"):
        page_content(folder)
