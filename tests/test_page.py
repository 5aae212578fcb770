"""The page in a headless Chromium of the system, drawing with the embedded model."""

import io
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.picture_file import save_picture

from .serving import serving

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SECONDS = 60  # that a busy machine may take for what should take one


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with serving(None, tmp_path_factory.mktemp("gallery")) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        # The library that makes MLX fast on Linux makes the browser fall over.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], env=environment)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    page = browser.new_page()
    page.set_default_timeout(1000 * SECONDS)
    faults, hosts = [], []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: hosts.append(r.url))
    page.goto(served[0])
    wait(lambda: page.locator("[name=variant]").count() == 3)
    yield page
    page.close()
    assert not faults
    assert all(url.startswith((served[0], "data:", "blob:")) for url in hosts)


def wait(condition):
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def shown(page, frame: int = 0) -> str:
    pictures = page.locator("#pictures img")
    source = pictures.nth(frame).get_attribute("src") if pictures.count() > frame else ""
    return source if source.startswith("data:image/png") else ""


def test_typing_redraws_and_enter_keeps(page, served):
    page.fill("#prompt", "a red apple")
    wait(lambda: shown(page))
    apple = shown(page)
    page.fill("#prompt", "a blue fish")
    wait(lambda: shown(page) not in ("", apple))
    page.press("#prompt", "Enter")
    wait(lambda: "kept" in page.inner_text("#status"))
    wait(lambda: page.locator("#shelf li").count() == 1)
    assert len(served[1].gallery) == 1


def test_suggestions_complete_the_word(page):
    page.type("#prompt", "a rock")
    chip = page.locator("#suggestions button", has_text="rocket")
    wait(lambda: chip.count() == 1)
    chip.click()
    assert page.input_value("#prompt") == "a rocket"


def test_three_widths_side_by_side_with_their_times(page):
    page.fill("#prompt", "a cat")
    page.check("[name=mode][value=compare]", force=True)
    wait(lambda: "three widths" in page.inner_text("#status"))
    captions = page.locator("#pictures figcaption").all_inner_texts()
    assert [c.split()[0] for c in captions] == ["tiny", "small", "full"]
    assert all(c.endswith(" s") for c in captions)
    assert len({shown(page, i) for i in range(3)}) == 3


def test_blending_two_seeds(page):
    page.fill("#prompt", "a cat")
    page.check("[name=mode][value=blend]", force=True)
    wait(lambda: shown(page))
    before = shown(page)
    page.fill("#blend-amount", "90")
    wait(lambda: shown(page) != before)


def test_stop_cancels(page, served):
    page.locator("summary").click()
    page.uncheck("#live")
    page.fill("#steps", "1000")
    page.fill("#prompt", "a cat")
    before = len(served[1].gallery)
    page.click("#keep")
    wait(lambda: served[1].waiting == 1)
    page.press("body", "Escape")
    wait(lambda: served[1].waiting == 0)
    assert page.inner_text("#status") == "Stopped." and len(served[1].gallery) == before


def drop(page, data: bytes):
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "x.png", {type: "image/png"});
            transfer.items.add(file);
            const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        list(data),
    )


def test_a_dropped_picture_gives_its_settings_back(page, tmp_path):
    pipe = Pipeline.load(None, "small")
    settings = pipe.settings("a ghost", seed=11, steps=3)
    made = save_picture(
        pipe.generate("a ghost", seed=11, steps=3), tmp_path / "x.png", {**pipe.metadata(settings)}
    )
    drop(page, made.read_bytes())
    wait(lambda: page.input_value("#prompt") == "a ghost")
    assert page.input_value("#seed") == "11" and page.input_value("#steps") == "3"
    assert page.locator("[name=variant]:checked").get_attribute("value") == "small"
    wait(lambda: "small, seed 11, 3 steps" in page.inner_text("#status"))


def test_a_blend_comes_back_and_an_edit_says_what_is_lost(page, tmp_path):
    pipe = Pipeline.load(None, "tiny")
    given = dict(seed=4, steps=2, vary="9:0.25")
    settings, picture = pipe.settings("a ghost", **given), pipe.generate("a ghost", **given)
    blend = save_picture(picture, tmp_path / "x.png", pipe.metadata(settings))
    drop(page, blend.read_bytes())
    wait(lambda: page.input_value("#prompt") == "a ghost")
    assert page.locator("[name=mode]:checked").get_attribute("value") == "blend"
    assert page.input_value("#blend-b") == "9" and page.input_value("#blend-amount") == "25"
    about = pipe.metadata(settings) | {"image": "cat.png", "vary": None}
    edited = save_picture(picture, tmp_path / "y.png", about)
    drop(page, edited.read_bytes())
    wait(lambda: "made from another picture" in page.inner_text("#status"))
    assert page.locator("[name=mode]:checked").get_attribute("value") == "draw"


def test_editing_under_a_painted_mask(page, served):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, format="PNG")
    drop(page, file.getvalue())  # no settings inside: it is edited
    wait(lambda: page.locator("#editor").is_visible())
    page.fill("#prompt", "a red apple")
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
    page.mouse.up()
    before = len(served[1].gallery)
    page.click("#apply")
    wait(lambda: "Changed in" in page.inner_text("#status"))
    assert len(served[1].gallery) == before + 1
    newest = served[1].gallery.list()[0][0]["name"]
    with Image.open(served[1].gallery.path(newest)) as result:
        changed = (np.array(result) != np.array(image)).any(axis=2)
    assert changed[64, 70] and 0.01 < changed.mean() < 0.2
    assert not changed[:40].any() and not changed[90:].any()


def test_search_zip_and_delete(page, served):
    for name in ("a red apple", "a green book"):
        page.fill("#prompt", name)
        page.press("#prompt", "Enter")
        wait(lambda name=name: page.locator("#shelf .words", has_text=name).count())
    page.fill("#search", "green book")
    wait(lambda: page.locator("#shelf li").count() == 1)
    page.check("#shelf input")
    with page.expect_download() as download:
        page.click("#zip")
    assert download.value.suggested_filename == "pictures.zip"
    page.click("#delete")
    page.click("#confirm button[value=yes]")
    wait(lambda: page.locator("#shelf li").count() == 0)
    assert served[1].gallery.list("green book")[1] == 0 and served[1].gallery.list("apple")[1]


def test_it_fits_a_phone_and_has_names_for_all_controls(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select, button, progress")].filter(
            e => !(e.labels?.length || e.ariaLabel || e.textContent.trim() || e.hidden)
        ).map(e => e.id)"""
    )
    assert nameless == []
