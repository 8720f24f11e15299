"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil
import zipfile

import pytest

from ebr_engine.engine.restorer import Restorer
from tests.media.clip_maker import write_clip
from tests.serve.conftest import StandIn, listening, png, until
from tests.tiny import make_prompt, save_tiny

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
    page.set_default_timeout(30_000)
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


def test_every_task_is_tried_and_one_chosen_by_keyboard(page, stand_in, tmp_path):
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.get_by_label("try every task").focus()
        page.keyboard.press("Space")
        assert not page.get_by_label("auto", exact=True).is_checked()
        page.locator("#files").set_input_files(png(tmp_path / "a.png", 120, 160))
        page.get_by_text("every task tried, choose one · auto: rain 60% + haze 90%").first.wait_for()
        tile = page.get_by_role("button", name="Restore a.png with rain+haze, as auto would")
        until(lambda: page.evaluate("document.querySelector('#sheet img').naturalWidth > 400"))
        box, sheet = tile.bounding_box(), page.locator("#sheet img").bounding_box()
        assert sheet["x"] <= box["x"]
        assert box["x"] + box["width"] <= sheet["x"] + sheet["width"] + 1
        page.get_by_role("button", name="Restore a.png with snow").focus()
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Compare a.png").wait_for()
        until(lambda: page.locator("#stage img").count() == 2)
        assert stand_in.seen[-1] == {"task": "snow"}
        page.get_by_role("button", name="Try every task on a.png").click()
        until(lambda: page.get_by_role("button", name="Choose a task for a.png").count() == 2)
        page.get_by_role("button", name="Choose a task for a.png").first.click()
        until(lambda: page.evaluate("document.activeElement.className") == "tile")
    assert not page.problems


def test_all_results_are_downloaded_as_one_archive(page, stand_in, tmp_path):
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        assert page.get_by_role("button", name="Download all").is_disabled()
        page.locator("#files").set_input_files([png(tmp_path / "a.png"), png(tmp_path / "b.png")])
        until(lambda: page.get_by_role("link", name="Download").count() == 2)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download all").click()
        assert download.value.suggested_filename == "restored.zip"
        with zipfile.ZipFile(download.value.path()) as archive:
            assert sorted(archive.namelist()) == ["a_restored.png", "b_restored.png"]
            assert archive.read("a_restored.png") == (tmp_path / "a.png").read_bytes()


def test_a_folder_is_dropped_with_all_that_lies_in_it(page, stand_in, tmp_path):
    for name in ("photos/a.png", "photos/deep/b.png", "photos/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        png(tmp_path / name)
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.get_by_label("auto", exact=True).wait_for()
        box = page.locator("#drop").bounding_box()
        there = {"x": box["x"] + 20, "y": box["y"] + 20, "data": {"items": [], "files": [str(tmp_path / "photos")]}}
        debugger = page.context.new_cdp_session(page)
        for kind in ("dragEnter", "dragOver", "drop"):
            debugger.send("Input.dispatchDragEvent", {"type": kind, **there, "data": {**there["data"], "dragOperationsMask": 1}})
        until(lambda: page.get_by_role("link", name="Download").count() == 2)
        assert sorted(job.name for job in server.hub.store.newest()) == ["a.png", "b.png"]
    assert not page.problems


def test_more_files_than_the_queue_takes_wait_on_the_page(page, stand_in, tmp_path):
    stand_in.go.clear()
    with listening(tmp_path / "store", stand_in, queue=1) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files([png(tmp_path / f"{name}.png") for name in "abcd"])
        page.get_by_text("to send; waiting for room in the queue").wait_for()
        stand_in.go.set()
        until(lambda: server.hub.store.count("done") == 4)
        assert page.locator("#problem").inner_text() == ""


def test_depth_alpha_and_profile_come_back_as_by_the_command(page, tmp_path, monkeypatch):
    import pyvips

    make_prompt().save(tmp_path / "prompts" / "mini" / "haze.safetensors")
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "prompts"))
    restorer = Restorer("mini", model=save_tiny(tmp_path / "tiny.safetensors"), compile="off")
    deep = pyvips.Image.new_from_file(str(png(tmp_path / "plain.png", bits=16, alpha=True)))
    source = tmp_path / "deep.png"
    deep.icc_transform("p3", input_profile="srgb", depth=16).write_to_file(str(source), profile="p3")
    restorer.restore_file(source, tmp_path / "straight.png", task="haze", steps=1)
    with listening(tmp_path / "store", restorer) as server:
        page.goto(server.url)
        page.get_by_label("haze").check(force=True)
        page.locator("#steps").fill("1")
        page.locator("#files").set_input_files(source)
        page.get_by_role("button", name="Compare").wait_for()
        until(lambda: page.evaluate("[...document.querySelectorAll('#stage img')].every(i => i.complete && i.naturalWidth)"))
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == (tmp_path / "straight.png").read_bytes()
    result = pyvips.Image.new_from_file(str(download.value.path()))
    assert (result.format, result.bands) == ("ushort", 4)
    assert result.get("icc-profile-data") == pyvips.Image.new_from_file(str(source)).get("icc-profile-data")


def test_a_clip_is_compared_and_can_be_held(page, stand_in, tmp_path):
    clip = write_clip(tmp_path / "a.webm", codec="libvpx-vp9")
    with listening(tmp_path / "store", stand_in) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files(clip)
        page.get_by_role("button", name="Pause").click()
        assert page.evaluate("[...document.querySelectorAll('#stage video')].map(v => v.paused)") == [True, True]
        page.get_by_role("button", name="Play").click()
        until(lambda: page.evaluate("[...document.querySelectorAll('#stage video')].every(v => !v.paused)"))


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
        page.get_by_role("button", name="Try every task").click()
        until(lambda: page.evaluate("document.querySelector('#sheet img')?.naturalWidth > 0"))
        assert page.locator("#sheet button").first.bounding_box()["width"] > 120  # its label can be read
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(22, 24, 27)") == (scheme == "dark")
    context.close()
