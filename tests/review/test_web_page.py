"""The review page in a real browser: Chromium, driven by Playwright."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioner.caption.job import caption_images
from captioner.config import RunConfig
from captioner.output.decisions import read_decisions
from conftest import write_photos

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """An output of sixty photos, more than a page, and of a file that is no image."""
    folder = tmp_path_factory.mktemp("review")
    write_photos(folder / "photos", 60)
    (folder / "photos" / "x-<b>broken.jpg").write_bytes(b"no image")
    run = RunConfig(engine="local", shard_size=16)
    caption_images(str(folder / "photos"), str(folder / "out"), str(model_directory), run=run)
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@contextlib.contextmanager
def _served(output: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address, and the process that serves it."""
    command = [sys.executable, "-m", "captioner.cli", "review", str(output), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "http://" in line, line + process.stdout.read()
        yield line.split()[2], process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def address(output: Path) -> Iterator[str]:
    with _served(output) as (address, _):
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with _opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def _opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A tab on the page; what goes wrong in its script, or against its policy, fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: problems.append(message.text) if message.type == "error" else None,
    )
    page.goto(address)
    yield page
    context.close()
    assert [each for each in problems if "404" not in each and "409" not in each] == []


def _captions(page: Any) -> list[str]:
    return page.locator("article .caption").all_inner_texts()


def _saved(page: Any) -> None:
    page.locator("#message", has_text="Caption").wait_for()


def test_the_grid_shows_each_row_and_pages_through_them(page):
    assert page.locator("article").count() == 48
    assert page.locator("#total").inner_text() == "61 of 61 captions"

    with page.expect_navigation():
        page.get_by_role("link", name="Next").click()

    assert page.locator("article").count() == 13
    assert "page=2" in page.url
    assert "x-<b>broken.jpg" in page.locator("article .uri").last.inner_text()


def test_filters_narrow_the_rows_and_are_in_the_address(page, address):
    words = _captions(page)[0].split()
    page.get_by_label("Words in the caption").fill(words[0])
    with page.expect_navigation():
        page.get_by_role("button", name="Show").click()

    found = _captions(page)
    assert found
    assert all(words[0] in caption.split() for caption in found)
    page.goto(f"{address}?status=undecodable")
    assert page.locator("article .problem").inner_text().startswith("undecodable")
    page.goto(f"{address}?sort=worst")
    worst = _captions(page)[:5]
    page.goto(f"{address}?sort=best")
    assert _captions(page)[:5] != worst
    assert page.locator("#facets").get_by_role("link", name="ok 60").count() == 1


def test_a_map_is_laid_over_the_photo_for_the_word_under_the_pointer(page):
    with page.expect_navigation():
        page.locator("article .open").first.click()
    photo = page.locator(".photo")
    photo.locator("img").first.evaluate("each => each.decode()")

    def seen() -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(photo.screenshot())).convert("RGB"), np.int16)

    def look(action: Callable[[], object]) -> np.ndarray:
        action()
        page.locator("#map:not([hidden])").evaluate("each => each.decode()")
        return seen()

    before = seen()
    words = page.locator(".word")
    first = look(lambda: words.first.hover())
    last = look(lambda: words.last.focus())

    assert np.abs(first - before).mean() > 5
    assert np.abs(last - first).mean() > 1
    words.last.evaluate("each => each.blur()")
    page.mouse.move(0, 0)
    assert np.abs(seen() - before).mean() < 1


def test_the_keyboard_decides_edits_and_undoes(page, output):
    keyboard = page.keyboard
    keyboard.press("j")
    keyboard.press("a")
    _saved(page)
    keyboard.press("j")
    keyboard.press("x")
    page.locator("#message", has_text="rejected").wait_for()
    keyboard.press("j")
    keyboard.press("e")
    keyboard.type("the dog's <b>ball</b>")
    keyboard.press("Enter")
    page.locator("#message", has_text="edited").wait_for()

    decided = page.locator("article").all()[:3]
    assert [each.get_attribute("data-decision") for each in decided] == [
        "accepted",
        "rejected",
        "edited",
    ]
    assert _captions(page)[2] == "the dog's <b>ball</b>"
    made = {uri[-8:-4]: each for uri, each in read_decisions(str(output)).items()}
    assert [(made[key].decision, made[key].caption) for key in ("0000", "0001", "0002")] == [
        ("accepted", None),
        ("rejected", None),
        ("edited", "the dog's <b>ball</b>"),
    ]

    for left in (2, 1, 0):
        keyboard.press("u")
        page.locator("#message", has_text="Undone").wait_for()
        page.wait_for_function(
            "count => document.querySelectorAll('article[data-decision]:not([data-decision=\"\"])')"
            ".length === count",
            arg=left,
        )
    assert read_decisions(str(output)) == {}


def test_two_decisions_on_one_image_are_undone_one_by_one(page):
    page.locator("article").first.focus()
    for key, said in (("a", "accepted"), ("x", "rejected")):
        page.keyboard.press(key)
        page.locator("#message", has_text=said).wait_for()

    decisions = []
    for _ in range(2):
        before = page.locator("article").first.get_attribute("data-revision")
        page.keyboard.press("u")
        page.wait_for_function(
            "before => document.querySelector('article').dataset.revision !== before", arg=before
        )
        decisions.append(page.locator("article").first.get_attribute("data-decision"))

    assert decisions == ["accepted", ""]


def test_two_tabs_do_not_lose_each_others_edits(browser, address, output):
    with _opened(browser, address) as one, _opened(browser, address) as other:
        one.locator("article").first.focus()
        one.keyboard.press("e")
        one.keyboard.type("from the first tab")
        one.keyboard.press("Enter")
        _saved(one)
        other.locator("article").first.focus()
        other.keyboard.press("x")
        other.locator("#message", has_text="elsewhere").wait_for()

        assert _captions(other)[0] == "from the first tab"
        [decision] = read_decisions(str(output)).values()
        assert decision.caption == "from the first tab"


def test_decisions_survive_a_server_that_is_killed(browser, output):
    with _served(output) as (address, process):
        with _opened(browser, address) as page:
            page.locator("article").nth(4).focus()
            page.keyboard.press("a")
            _saved(page)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    with _served(output) as (address, _), _opened(browser, f"{address}?decision=accepted") as page:
        assert page.locator("article").count() == 1
        assert page.locator("article").get_attribute("data-decision") == "accepted"
    assert (output / "__captioner" / "review.parquet").exists()


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    """The demo's photos, captioned by the model in the box."""
    pytest.importorskip("skimage")
    from captioner.model import bundle
    from captioner.review.demo import run_demo

    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        for _ in run_demo(folder, bundle.DEFAULT):
            pass
        yield Path(folder, "captions")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(browser, demo, scheme, tmp_path):
    """CAPTIONER_SCREENSHOTS=docs/images keeps the pictures that the documentation shows."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    pictures = Path(os.environ.get("CAPTIONER_SCREENSHOTS", tmp_path))
    options: dict[str, Any] = {
        "color_scheme": scheme,
        "viewport": {"width": 1200, "height": 800},
        "bypass_csp": True,  # the checker's script is not the page's
    }
    with _served(demo) as (address, _), _opened(browser, address, **options) as page:
        for name in ("grid", "row"):
            if name == "row":
                with page.expect_navigation():
                    page.locator("article .open").first.click()
                page.locator(".word").nth(4).focus()
                page.locator("#map:not([hidden])").evaluate("each => each.decode()")
            for photo in page.locator("article img:not([hidden])").all():
                photo.scroll_into_view_if_needed()
                photo.evaluate("each => each.decode()")
            page.evaluate("window.scrollTo(0, 0)")
            found = axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            picture = pictures / f"review-{name}-{scheme}.jpg"
            page.screenshot(path=picture, type="jpeg", quality=80)


def test_the_page_fits_a_phone(browser, address):
    with _opened(browser, address, viewport={"width": 360, "height": 740}) as page:
        for path in ("", "row/0"):
            page.goto(address + path)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360
