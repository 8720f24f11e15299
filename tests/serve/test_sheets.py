"""Every task on one sheet, the same file once more, and all results in one archive."""

import io
import zipfile

import numpy as np
import pytest

from ebr_engine.media.images import read_image
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.serve.archive import zipped
from tests.serve.conftest import client, over, png, post, until


def sheet_of(inside, *paths, request="{}"):
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    return inside.post("/v1/sheets", files=files, data={"request": request})


def test_a_sheet_shows_every_task_and_tells_where_each_is(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in) as inside:
        job = over(inside, sheet_of(inside, png(tmp_path / "a.jpg", 40, 60)).json()["data"][0]["id"])
        answer = inside.get(f"/v1/restorations/{job['id']}/result")
        assert 'filename="a_sheet.png"' in answer.headers["content-disposition"]
        shown = inside.get(f"/v1/restorations/{job['id']}/view/result")
        assert shown.headers["content-type"] == "image/webp"
    assert (job["object"], job["status"], job["note"]) == ("sheet", "done", "auto: rain 60% + haze 90%")
    assert [tile["task"] for tile in job["tiles"]] == [*TASKS, "rain+haze"]
    assert [tile["task"] for tile in job["tiles"] if tile["chosen"]] == ["rain+haze"]
    assert {tile["task"]: tile["probability"] for tile in job["tiles"]}["haze"] == 0.9
    (tmp_path / "sheet.png").write_bytes(answer.content)
    sheet, source = read_image(tmp_path / "sheet.png").pixels, read_image(tmp_path / "a.jpg").pixels
    assert sheet.shape[:2] == (job["height"], job["width"])
    for tile in job["tiles"]:
        left, top, width, height = tile["place"]
        expected = source * (0.2 + len(tile["task"]) / 20)
        np.testing.assert_allclose(sheet[top : top + height, left : left + width], expected, atol=0.01)


def test_a_file_that_is_there_is_tried_and_restored_again_without_being_sent(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in) as inside:
        first = over(inside, post(inside, png(tmp_path / "a.png")).json()["data"][0]["id"])
        at = f"/v1/restorations/{first['id']}"
        sheet = over(inside, inside.post(f"{at}/sheet", json={"steps": 2}).json()["data"][0]["id"])
        assert (sheet["object"], sheet["name"], sheet["request"]["steps"]) == ("sheet", "a.png", 2)
        assert inside.delete(at).status_code == 204  # the others keep the file
        again = inside.post(f"/v1/restorations/{sheet['id']}/again", json={"task": "rain", "strength": 0.5})
        job = over(inside, again.json()["data"][0]["id"])
        assert (job["object"], job["status"], job["result"]) == ("restoration", "done", "result.png")
        assert inside.get(f"/v1/restorations/{job['id']}/result").content == (tmp_path / "a.png").read_bytes()
        assert inside.post(f"{at}/again", json={"task": "rain"}).status_code == 404
    assert stand_in.seen[-1] == {"task": "rain", "strength": 0.5}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("again", {}, "say what to repair"),
        ("again", {"task": "dust"}, "unknown task"),
        ("again", {"task": "rain", "model": "/etc"}, "the server's own"),
        ("sheet", {"task": "rain"}, "task has no meaning for a sheet; what can be asked for: strength, steps, schedule, seed"),
        ("sheet", {"steps": 10**9}, "at most"),
    ],
)
def test_what_cannot_be_asked_for_again_is_told(stand_in, tmp_path, path, body, words):
    with client(tmp_path / "store", stand_in) as inside:
        job = over(inside, post(inside, png(tmp_path / "a.png")).json()["data"][0]["id"])
        answer = inside.post(f"/v1/restorations/{job['id']}/{path}", json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert len(inside.hub.store.newest()) == 1


def test_an_engine_file_has_nothing_to_choose_from(stand_in, tmp_path):
    stand_in.built = object()
    with client(tmp_path / "store", stand_in) as inside:
        assert "nothing to choose from" in sheet_of(inside, png(tmp_path / "a.png")).json()["error"]["message"]


def test_a_sheet_can_be_cancelled_between_two_tasks(stand_in, tmp_path):
    stand_in.go.clear()
    with client(tmp_path / "store", stand_in) as inside:
        id = sheet_of(inside, png(tmp_path / "a.png")).json()["data"][0]["id"]
        until(stand_in.began.is_set)
        inside.post(f"/v1/restorations/{id}/cancel")
        stand_in.go.set()
        assert over(inside, id)["status"] == "cancelled"
        assert [each.name for each in (inside.hub.store.files / id).iterdir()] == ["source.png"]
    assert len(stand_in.seen) == 1


def test_all_results_come_in_one_archive(stand_in, tmp_path):
    one, other = png(tmp_path / "a.png"), png(tmp_path / "b.png", bits=16)
    with client(tmp_path / "store", stand_in) as inside:
        assert inside.get("/v1/results.zip").status_code == 404
        ids = [over(inside, post(inside, path).json()["data"][0]["id"])["id"] for path in (one, other, one)]
        sheet = over(inside, sheet_of(inside, one).json()["data"][0]["id"])["id"]
        whole = inside.get("/v1/results.zip")
        assert whole.headers["content-type"] == "application/zip"
        assert 'filename="restored.zip"' in whole.headers["content-disposition"]
        some = inside.get("/v1/results.zip", params={"id": [ids[1], sheet]})
        assert inside.get("/v1/results.zip", params={"id": "none"}).status_code == 404
    with zipfile.ZipFile(io.BytesIO(whole.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a_restored.png", "b_restored.png", "a_restored (2).png"]
        assert archive.read("b_restored.png") == other.read_bytes()
    assert zipfile.ZipFile(io.BytesIO(some.content)).namelist() == ["b_restored.png", "a_sheet.png"]


def test_an_archive_is_sent_as_it_is_made_and_leaves_out_what_is_gone(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(50 << 20)
    pieces = [len(piece) for piece in zipped([(tmp_path / "gone", "gone"), (large, "large.bin")])]
    assert max(pieces) < 2 << 20
    assert sum(pieces) > 50 << 20
