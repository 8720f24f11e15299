"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil

import pytest

from tests.serve.conftest import StandIn, listening, png, until

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives a browser")
CHROMIUM = shutil.which("chromium")
OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{each}" for each in OFF)]
TOKEN = "a-token-of-the-tests-0123"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium, as in: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.problems = []
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    context.close()


def test_a_file_is_sent_compared_downloaded_and_removed(page, stand_in, tmp_path):
    source = png(tmp_path / "a <b>photo.png", bits=16)
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.get_by_label("haze").check(force=True)
        page.locator("#files").set_input_files(source)
        page.get_by_role("button", name="Compare").wait_for()
        assert page.locator("#jobs .name").inner_text() == source.name  # as text, not as markup
        until(
            lambda: page.evaluate("[...document.querySelectorAll('#stage img')].every(i => i.complete && i.naturalWidth == 24)")
        )
        assert page.locator("#stage img").count() == 2
        page.get_by_label("Where before ends").focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("getComputedStyle(document.querySelector('#stage')).getPropertyValue('--at')") == "50.5%"
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.path().read_bytes() == source.read_bytes()
        page.get_by_role("button", name="Remove").click()
        page.locator("#jobs li").wait_for(state="detached")
        assert not server.hub.store.newest()
    assert stand_in.seen[0]["task"] == "haze"
    assert not page.problems


def test_progress_is_shown_and_a_job_can_be_cancelled(page, stand_in, tmp_path):
    stand_in.go.clear()
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files([png(tmp_path / "a.png"), png(tmp_path / "b.png")])
        page.locator("#jobs progress:visible").wait_for()
        page.get_by_text("auto · waits, 1 ahead").wait_for()
        page.get_by_role("button", name="Cancel b.png").click()
        page.locator("#jobs").get_by_text("cancelled").wait_for()
        stand_in.go.set()
        page.get_by_role("button", name="Compare a.png").wait_for()


def test_a_file_that_is_none_is_told_on_the_page(page, stand_in, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files(bad)
        page.get_by_text("bad.png: is no picture or clip of a kind that is taken here").wait_for()


def test_the_queue_is_there_again_after_a_restart(page, tmp_path):
    first = StandIn()
    first.go.clear()
    with listening(tmp_path / "store", first) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files([png(tmp_path / "a.png"), png(tmp_path / "b.png")])
        page.get_by_text("1 ahead").wait_for()
        until(first.began.is_set)
        server.hub.worker.stopping.set()
        first.go.set()
    with listening(tmp_path / "store", StandIn()) as server:
        page.goto(server.url)
        page.get_by_role("button", name="Compare a.png").wait_for()
        page.get_by_role("button", name="Compare b.png").wait_for()


def test_the_token_opens_the_page(page, stand_in, tmp_path):
    with listening(tmp_path / "store", stand_in, token=TOKEN) as server:
        page.goto(server.url)
        page.locator("#token").fill("not-the-token-of-it")
        page.keyboard.press("Enter")
        page.get_by_text("show the server's token").or_(page.get_by_text("not the server's token")).wait_for()
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_text("model ebr-mini").wait_for()
        page.locator("#files").set_input_files(png(tmp_path / "a.png"))
        until(lambda: page.evaluate("[...document.querySelectorAll('#stage img')].some(i => i.naturalWidth == 24)"))


@pytest.mark.parametrize("width", [375, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, stand_in, tmp_path, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files(png(tmp_path / f"{'long' * 30}.png", 200, 300))
        page.get_by_role("button", name="Compare").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(22, 24, 27)") == (scheme == "dark")
    context.close()
